"""Write made-up directories of evaluated runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vilmedic.metrics.classification import RankedScores

CLASSES = ["Effusion", "Mass"]
CONFIG: dict[str, Any] = {
    "name": "run",
    "ckpt_dir": "ckpt",
    "ckpt": None,
    "dataset": {"proto": "ImSeqLabel", "fraction": 1.0, "image": {"root": "data"}},
    "model": {"proto": "ConVIRT"},
    "trainor": {"seed": 0, "epochs": 2, "optim_params": {"lr": 0.001}, "num_workers": None},
    "ensemblor": {"splits": ["test"]},
}


def write_run(
    directory: Path,
    *,
    seed: int = 0,
    skill: float = 1.0,
    samples: int = 200,
    split: str = "test",
    predictions: bool = True,
    names: list[str] | None = None,
    classes: list[str] = CLASSES,
    protocol: dict[str, Any] | None = None,
    draw: int | None = None,
    **changes: Any,
) -> Path:
    """Write a run of one seed, with zero-shot and retrieval numbers computed from predictions.

    Args:
        directory: the run directory.
        seed: training seed.
        skill: mean difference between the scores of positives and negatives.
        samples: number of samples in the split.
        split: name of the split.
        predictions: whether to write predictions of single samples.
        names: names of the samples.
        classes: names of the labels.
        protocol: options of the zero-shot protocol.
        draw: seed of the scores; default: the training seed.
        changes: dotted configuration keys, with `__` for dots.
    """
    config = json.loads(json.dumps(CONFIG))
    config["name"], config["trainor"]["seed"] = directory.name, seed
    for key, value in changes.items():
        node = config
        *path, last = key.split("__")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    folder = directory / "evaluations" / f"best-1-{seed:08x}"
    folder.mkdir(parents=True)
    (directory / f"config_{seed}.yml").write_text(yaml.safe_dump(config))

    labels = np.random.default_rng(7).random((samples, len(classes))) < 0.4
    generator = np.random.default_rng(100 + (seed if draw is None else draw))
    hard = np.random.default_rng(8).normal(size=labels.shape)
    noise = generator.normal(size=labels.shape)
    scores = skill * labels + 0.7 * hard + 0.7 * noise
    above = (scores[:, 0] < np.median(scores[:, 0])) * 20
    areas = [RankedScores(scores[:, k], labels[:, k]).measure() for k in range(len(classes))]
    area, precision = np.mean(areas, axis=0)[:, 0].tolist()
    metrics = {
        "zero_shot": {
            "auroc": area,
            "auroc_interval": [area - 0.1, area + 0.1],
            "average_precision": precision,
            "average_precision_interval": None,
            "classes": {name: {"auroc": 0.5} for name in classes},
            "excluded": [],
        },
        "retrieval": {"image_to_text_r1": float((above == 0).mean())},
    }
    options = {"zero_shot": {"prompts": "p.yml", **(protocol or {})}, "retrieval": {}}
    results = {
        "run": directory.name,
        "evaluation": folder.name,
        "system": "ConVIRT",
        "split": split,
        "samples": samples,
        "checkpoints": [{"file": "a.pth", "epoch": 1, "metric": "m", "score": 1.0, "seed": seed}],
        "models_used": 1,
        "ema": False,
        "seed": 0,
        "batch_size": 64,
        "precision": "fp32",
        "changed": {},
        "protocols": options,
        "loss": 1.0 + seed / 10,
        "metrics": metrics,
        "baselines": {},
    }
    hashed = {"zero_shot": {**options["zero_shot"], "prompts_sha256": "ab"}, "retrieval": {}}
    record = {
        "folder": folder.name,
        "date": f"2026-01-0{1 + seed}",
        "settings": {"protocols": hashed},
    }
    (folder / "evaluation.json").write_text(json.dumps(record))
    for place in (folder, directory):
        (place / f"results_{split}.json").write_text(json.dumps(results))
    if predictions:
        np.savez(
            folder / f"predictions_{split}.npz",
            **{
                "version": np.array(1),
                "lines": np.arange(1, samples + 1),
                "images": np.array(names or [f"{directory}/{i}.png" for i in range(samples)]),
                "label_names": np.array(classes),
                "labels": labels.astype(np.int8),
                "zero_shot/scores": scores,
                "zero_shot/classes": np.array(classes),
                "retrieval/image_to_text_above": above,
                "retrieval/image_to_text_beside": np.zeros_like(above),
            },
        )
    return directory
