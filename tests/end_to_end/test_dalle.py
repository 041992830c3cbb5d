from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.dalles import TINY_VAE, save_vae
from tests.end_to_end.conftest import Run
from tests.end_to_end.test_real import COVID, needs_covid

TRANSFORMER = {
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "dim_head": 12,
    "text_seq_len": 24,
    "null_cond_prob": 0.2,
}


@pytest.fixture(scope="module")
def small(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small DALLE behind a VAE with random weights, as arguments of both commands."""
    vae = save_vae(tmp_path_factory.mktemp("frozen") / "vae.pth")
    return [
        "config/phantom/dalle.yml",
        f"dataset.image.root={phantom}",
        f"dataset.seq.root={phantom}",
        *(f"model.vae.{name}={value}" for name, value in TINY_VAE.items()),
        *(f"model.dalle.{name}={value}" for name, value in TRANSFORMER.items()),
        f"model.vae.ckpt={vae}",
        "trainor.batch_size=16",
        "trainor.num_workers=0",
        "ensemblor.num_workers=0",
        "trainor.log_every=1",
        "trainor.lr_decay=null",
        "ensemblor.num_images=3",
    ]


@pytest.fixture(scope="module")
def trained(run_here: Run, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of two epochs with seed 5."""
    ckpt = tmp_path_factory.mktemp("dalle")
    run_here(
        "bin/train.py",
        *small,
        f"ckpt_dir={ckpt}",
        "name=two",
        "trainor.seed=5",
        "trainor.epochs=2",
    )
    return ckpt / "two"


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation_loss" in line]


def test_training_learns_and_keeps_the_tokens(trained: Path) -> None:
    first, second = evaluations(trained)
    assert second["validation_loss"] < first["validation_loss"]
    names = sorted(path.name.split("_")[0] for path in (trained / "tokens").iterdir())
    assert names == ["train", "validate"]


def test_without_the_cache_a_run_is_the_same(
    run_here: Run, small: list[str], trained: Path, tmp_path: Path
) -> None:
    options = ["name=again", "trainor.seed=5", "trainor.epochs=2", "dataset.image.tokens=null"]
    run_here("bin/train.py", *small, f"ckpt_dir={tmp_path}", *options)
    again = evaluations(tmp_path / "again")
    for found, expected in zip(again, evaluations(trained), strict=True):
        assert found["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-3)


@pytest.mark.slow
def test_evaluation_asks_a_classifier_of_real_images(
    run_here: Run, small: list[str], trained: Path
) -> None:
    metric = "ensemblor.metrics.prompted_findings"
    done = run_here(
        "bin/ensemble.py",
        *small,
        f"ckpt_dir={trained.parent}",
        "name=two",
        f"{metric}.num_images=2",
        f"{metric}.epochs=1",
    )
    results = json.loads((trained / "results_test.json").read_text())
    found = results["metrics"]["prompted_findings"]
    assert 0 <= found["auroc"] <= 1
    assert found["accuracy_chance"] == 0.25
    assert set(found["probabilities"]) == set(found["classes"])
    assert "pneumothorax right" in done.stdout
    assert results["loss"] > 0


def test_images_of_reports(run_here: Run, small: list[str], trained: Path) -> None:
    arguments = [*small, f"ckpt_dir={trained.parent}", "name=two", "ensemblor.generate_images=True"]
    done = run_here("bin/ensemble.py", *arguments, "ensemblor.num_samples=2", "ensemblor.mode=all")

    for line in (1, 2):
        folder = trained / "generated" / f"test_{line}"
        pictures = [folder / f"{n}.png" for n in (1, 2, 3)]
        assert [Image.open(path).size for path in pictures] == [(16, 16)] * 3
        assert len({path.read_bytes() for path in pictures}) == 3
        assert min(Image.open(folder / "sheet.png").size) > 300
        settings = json.loads((folder / "settings.json").read_text())
        assert settings["filter_thres"] == 0.9
        assert settings["report"]
        assert [image["number"] for image in settings["images"]] == [1, 2, 3]
        assert len(settings["checkpoints"]) == len(list(trained.glob("[0-9]*_5.pth")))
    assert "sheet.png" in done.stdout


def test_images_of_prompts_do_not_depend_on_their_company(
    run_here: Run, small: list[str], trained: Path
) -> None:
    arguments = [*small, f"ckpt_dir={trained.parent}", "name=two", "ensemblor.generate_images=True"]
    prompt = "Large left zebra."
    done = run_here(
        "bin/ensemble.py",
        *arguments,
        f"ensemblor.prompt=[Severe cardiomegaly., {prompt}]",
        "ensemblor.num_images=2",
    )
    assert "does not have: zebra" in done.stdout
    [folder] = (trained / "generated").glob("prompt_large-left-zebra*")
    first = (folder / "1.png").read_bytes()

    run_here(
        "bin/ensemble.py",
        *arguments,
        f"ensemblor.prompt={prompt}",
        "ensemblor.num_images=1",
        "ensemblor.batch_size=1",
    )
    assert (folder / "1.png").read_bytes() == first
    assert not (folder / "2.png").exists()


def test_priming_keeps_the_top_of_the_real_image(
    run_here: Run, small: list[str], trained: Path, phantom: Path
) -> None:
    image = phantom / "images" / (phantom / "test.image.tok").read_text().split()[0]
    arguments = [*small, f"ckpt_dir={trained.parent}", "name=two", "ensemblor.generate_images=True"]
    run_here(
        "bin/ensemble.py",
        *arguments,
        "ensemblor.prompt=Heart size is normal.",
        "ensemblor.prime=0.5",
        f"ensemblor.prime_image={image}",
    )
    [folder] = (trained / "generated").glob("prompt_heart-size*")
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["primed_tokens"] == 8

    refused = run_here(
        "bin/ensemble.py", *arguments, "ensemblor.prompt=x", "ensemblor.prime=0.5", status=2
    )
    assert "ensemblor.prime_image" in refused.stderr


def test_a_convirt_puts_images_in_order(
    run_here: Run, small: list[str], trained: Path, tiny: list[str], tmp_path: Path
) -> None:
    run_here(
        "bin/train.py",
        *tiny,
        f"ckpt_dir={tmp_path}",
        "name=convirt",
        "trainor.seed=0",
        "trainor.epochs=1",
    )
    ranker = tmp_path / "convirt" / "last_0.pth"
    run_here(
        "bin/ensemble.py",
        *small,
        f"ckpt_dir={trained.parent}",
        "name=two",
        "ensemblor.generate_images=True",
        f"ensemblor.rerank.ckpt={ranker}",
    )
    settings = json.loads((trained / "generated" / "test_1" / "settings.json").read_text())
    agreement = [image["agreement"] for image in settings["images"]]
    assert agreement == sorted(agreement, reverse=True)
    assert sorted(image["number"] for image in settings["images"]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.vae.ckpt=nowhere/vae.pth"], "nowhere/vae.pth"),
        (["model.vae.num_tokens=32"], "num_tokens is 24, the configuration says 32"),
        (["model.dalle.reversible=True"], "activation_checkpointing"),
        (["dataset.seq.tokenizer_max_len=30"], "tokenizer_max_len: given 30"),
        (["model.dalle.num_text_tokens=12"], "model.dalle.num_text_tokens: given 12"),
        (["dataset.image.preset=resize_crop"], "preset=center_crop"),
        (["dataset.image.resize=32", "dataset.image.crop=32", "dataset.image.tokens=null"], "16 x"),
    ],
)
def test_bad_input_is_named_before_training(
    run_here: Run, small: list[str], tmp_path: Path, changes: list[str], words: str
) -> None:
    done = run_here(
        "bin/train.py", *small, f"ckpt_dir={tmp_path}", "trainor.seed=0", *changes, status=2
    )
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_of_another_vae_is_not_averaged(
    run_here: Run, small: list[str], trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "two")
    [path, *_] = sorted((tmp_path / "two").glob("[0-9]*_5.pth"))
    state = torch.load(path, weights_only=True)
    state["model"]["vae.codebook.weight"] += 1
    torch.save(state, path.with_name("0.5_9_7.pth"))
    done = run_here(
        "bin/ensemble.py",
        *small,
        f"ckpt_dir={tmp_path}",
        "name=two",
        "ensemblor.generate_images=True",
        "ensemblor.mode=all",
        status=2,
    )
    assert re.search(r"its VAE is another one", done.stderr)


@needs_covid
@pytest.mark.slow
def test_an_epoch_on_real_xrays_and_notes(run_here: Run, small: list[str], tmp_path: Path) -> None:
    arguments = [
        *small,
        f"dataset.image.root={COVID}",
        f"dataset.seq.root={COVID}",
        "dataset.seq.file=report.tok",
        "dataset.seq.sample_sentence=False",
        f"ckpt_dir={tmp_path}",
        "name=real",
    ]
    done = run_here("bin/train.py", *arguments, "trainor.seed=1", "trainor.epochs=1")
    assert "were longer than tokenizer_max_len and were cut" in done.stdout
    assert evaluations(tmp_path / "real")[0]["validation_loss"] > 0
    run_here("bin/ensemble.py", *arguments, "ensemblor.generate_images=True", "ckpt=last_1.pth")
    assert (tmp_path / "real" / "generated" / "test_1" / "sheet.png").exists()
