"""Write made-up run directories with the files of training and evaluation."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vilmedic.drawing.images import thumbnails
from vilmedic.evaluation.predictions import pack_predictions

LABELS = ["Effusion", "Mass"]
EVIL = "<img src=x onerror=\"document.title='broken'\"></script><script>alert(1)</script>"
RANKS = ("above", "beside")
CONFIG = """\
name: demo
trainor:
  batch_size: 8
  epochs: 3
  early_stop_metric: validation_loss
  optim_params:
    lr: 0.001
model:
  proto: ConVIRT
ensemblor:
  splits: [test]
"""


def write_run(run_dir: Path, *, samples: int = 40, seeds: tuple[int, ...] = (1,)) -> Path:
    """Write a small run with everything that the report shows."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (run_dir / f"config_{seed}.yml").write_text(CONFIG)
        overrides = ["trainor.batch_size=8", "trainor.optim_params={lr: 1e-3}", "~trainor.lr_decay"]
        environment = {
            "command": ["bin/train.py", "x.yml", EVIL],
            "overrides": [*overrides, f"name={EVIL}"],
            "device": "cpu",
            "versions": {"torch": "2"},
            "git_commit": None,
        }
        (run_dir / f"environment_{seed}.json").write_text(json.dumps(environment))
        write_curves(run_dir, seed)
    content = results() | {"samples": samples}
    content["metrics"]["retrieval"] = {"image_to_text_r5": None}
    (run_dir / "results_test.json").write_text(json.dumps(content))
    write_predictions(run_dir, samples)
    Image.new("RGB", (2000, 500), "white").save(run_dir / "test_full_visual.png")
    write_explorer(run_dir, samples)
    return run_dir


def write_curves(run_dir: Path, seed: int, steps: int = 30) -> None:
    """Write the lines of metrics.jsonl and timing.jsonl."""
    with (
        open(run_dir / "metrics.jsonl", "a") as metrics,
        open(run_dir / "timing.jsonl", "a") as timing,
    ):
        for step in range(1, steps + 1):
            head = {"seed": seed, "step": step}
            numbers = {"epoch": 0, "loss": 2 / step, "lr": 1e-3, "grad_norm": 10.0 / step}
            numbers |= {"loss_over_ln_batch": 1 / step, "feature_std_visual": 0.9}
            metrics.write(json.dumps(head | numbers) + "\n")
            timing.write(json.dumps(head | {"time": 1.0, "samples_per_second": 50.0}) + "\n")
        for step in (10, 20, 30):
            scores = {
                "train_loss": 1.0,
                "validation_loss": 3 / step,
                "validation_retrieval_image_to_text_r1": step / 100,
                "validation_retrieval_image_to_text_median_rank": 100 / step,
            }
            metrics.write(json.dumps({"seed": seed, "step": step, "epoch": 0} | scores) + "\n")


def write_predictions(run_dir: Path, samples: int) -> Path:
    """Write predictions of a probe and of retrieval: the report of sample k has rank k + 1."""
    random = np.random.default_rng(0)
    labels = np.array([[k % 2, k // 2 % 2] for k in range(samples)], np.int8)
    names = np.array(LABELS, np.str_)
    ranks = {f"image_to_text_{one}": np.arange(samples) * (one == "above") for one in RANKS}
    probe = {"scores": labels + random.random((samples, 2)), "classes": names}
    known = {"lines": np.arange(1, samples + 1), "labels": labels, "label_names": names}
    known["images"] = np.array([f"{k}.png" for k in range(samples)], np.str_)
    path = run_dir / "predictions_test.npz"
    path.write_bytes(pack_predictions(known, {"linear_probe": probe, "retrieval": ranks}))
    return path


def results() -> dict[str, Any]:
    """The results of a split, as `Ensemblor` writes them."""
    probe = {
        "auroc": 0.91234,
        "auroc_interval": [0.9, 0.95],
        "accuracy": None,
        "accuracy_interval": None,
        "classes": {name: {"auroc": 0.8, "auroc_interval": [0.7, 0.9]} for name in LABELS},
        "fit": {"l2": 0.5, "iterations": 12},
        "excluded": [],
    }
    return {
        "run": "demo",
        "system": "ConVIRT",
        "ema": False,
        "split": "test",
        "samples": 1234,
        "models_used": 1,
        "checkpoints": [{"file": f"0.1_2_1.pth{EVIL}", "epoch": 2, "metric": "x", "seed": 1}],
        "loss": 1.5,
        "metrics": {"linear_probe": probe},
        "baselines": {"raw_pixels": {"loss": None, "metrics": {"linear_probe": {"auroc": 0.6}}}},
    }


def pictures(count: int = 40) -> list[torch.Tensor]:
    """Images with about as much detail as an X-ray, uint8 [1, 160, 160]."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 1, 40, 40, generator=random) * 200
    smooth = torch.nn.functional.interpolate(coarse, size=(160, 160), mode="bicubic")
    noise = torch.randn(smooth.shape, generator=random) * 6
    return list((smooth + noise).clamp(0, 255).byte())


def write_explorer(run_dir: Path, samples: int, words: int = 12) -> Path:
    """Write a file of the embedding explorer; every fifth report names pneumothorax."""
    random = np.random.default_rng(0)
    drawn = pictures()
    pool = thumbnails(lambda i: drawn[i % len(drawn)], list(range(samples)))
    vocabulary = np.array(
        [
            "lungs",
            "clear",
            "heart",
            "normal",
            "effusion",
            "left",
            "right",
            "lower",
            "lobe",
            "opacity",
        ]
    )
    reports = [" ".join(random.choice(vocabulary, words)) for _ in range(samples)]
    for i in range(0, samples, 5):
        reports[i] = f"Small pneumothorax. {reports[i]}"
    reports[1] = EVIL
    maps = []
    for key in ("visual", "linguistic"):
        x, y = random.random((2, samples)).round(4).tolist()
        maps.append({"key": key, "method": "UMAP", "x": x, "y": y})
    index = np.argsort(random.random((samples, min(samples, 50))), axis=1)[:, :10].tolist()
    cosine = np.sort(random.random((samples, 10)))[:, ::-1].round(3).tolist()
    content = {
        "run": "demo",
        "split": "test",
        "total": samples,
        "source": "ConVIRT, epoch 3, seed 1",
        "labels": LABELS,
        "samples": {
            "line": list(range(1, samples + 1)),
            "report": reports,
            "image": [f"{i}.png" for i in range(samples)],
            "thumbnail": pool,
            "labels": [[[], [0], [1], [0, 1]][i % 4] for i in range(samples)],
        },
        "maps": maps,
        "neighbours": [
            {"name": name, "index": index, "cosine": cosine}
            for name in ("same visual", "reports for this image")
        ],
    }
    path = run_dir / "test_explorer.json.gz"
    path.write_bytes(gzip.compress(json.dumps(content).encode(), 6))
    return path
