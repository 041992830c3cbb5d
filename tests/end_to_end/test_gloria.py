from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.datasets.test_text import sentence_pieces
from tests.end_to_end.conftest import ROOT, Run
from vilmedic.config.load import load
from vilmedic.errors import ConfigError, DataError
from vilmedic.training.trainor import Trainor


@pytest.fixture(scope="module")
def arguments(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of both commands for a small GLoRIA with 2 x 2 regions."""
    return [
        f"ckpt_dir={tmp_path_factory.mktemp('ckpt')}",
        "name=g",
        *(f"dataset.{part}.root={phantom}" for part in ("image", "seq", "label")),
        "dataset.image.resize=32",
        "dataset.image.crop=32",
        "model.local_layer=layer3",
        "model.visual_embedder.interm_feature_dim=256",
        "model.encoder.hidden_size=32",
        "model.encoder.intermediate_size=32",
        "model.encoder.num_attention_heads=2",
        "trainor.batch_size=8",
        "trainor.epochs=1",
        "trainor.seed=3",
        "trainor.precision=fp32",
        "trainor.num_workers=0",
        "ensemblor.num_workers=0",
    ]


@pytest.mark.slow
def test_trains_and_is_evaluated(run: Run, arguments: list[str]) -> None:
    run("bin/train.py", "config/phantom/gloria.yml", *arguments)
    done = run(
        "bin/ensemble.py",
        "config/phantom/gloria.yml",
        *arguments,
        "ensemblor.post_processing.plot_representation.method=pca",
        "ensemblor.post_processing.plot_attention.num_samples=1",
    )

    run_dir = Path(arguments[0].partition("=")[2]) / "g"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[-1]["validation_zero_shot_auroc"] < 1
    for split, samples in (("validate", 17), ("test", 16)):
        results = json.loads((run_dir / f"results_{split}.json").read_text())
        assert results["samples"] == samples
        assert results["protocols"]["zero_shot"]["similarity"] == "both"
        assert results["protocols"]["zero_shot"]["local_aggregation"] == "max"
        for system in (results, results["baselines"]["untrained"]):
            metrics = system["metrics"]
            low, high = metrics["zero_shot"]["auroc_interval"]
            assert 0 <= low <= metrics["zero_shot"]["auroc"] <= high <= 1
            assert 0 <= metrics["retrieval"]["image_to_text_r10"] <= 1
            low, high = metrics["pointing_game"]["side_interval"]
            assert 0 <= low <= metrics["pointing_game"]["side"] <= high <= 1
            assert metrics["pointing_game"]["words"] > 5
        pixels = results["baselines"]["raw_pixels"]["metrics"]
        assert pixels["linear_probe"]["auroc"] > 0
        assert pixels["zero_shot"]["auroc"] is pixels["pointing_game"]["side"] is None
        for name in ("attention_0", "full_visual", "full_linguistic"):
            folder = run_dir / "evaluations" / results["evaluation"]
            with Image.open(folder / f"{split}_{name}.png") as picture:
                assert min(picture.size) > 300
    assert "pointing_game side" in done.stdout


def test_unsuitable_settings_are_refused(
    arguments: list[str], phantom: Path, tmp_path: Path
) -> None:
    def start(*changes: str) -> None:
        given = [*arguments, "name=bad", f"ckpt_dir={tmp_path}", *changes]
        trainor = Trainor(load(ROOT / "config/phantom/gloria.yml", given))
        trainor.start()

    with pytest.raises(DataError, match=r"48 samples, fewer than trainor\.batch_size=64"):
        start("trainor.batch_size=64")
    with pytest.raises(ConfigError, match=r"trainor\.batch_size: given 1, .*at least 2"):
        start("trainor.batch_size=1")
    with pytest.raises(ConfigError, match=r"model\.local_layer \(.*\): the layer 'layer9'.*'layer"):
        start("model.local_layer=layer9")

    prompts = tmp_path / "prompts.yml"
    prompts.write_text("Mass:\n  positive: [a mass]\n  negative: [no mass]\n")
    with pytest.raises(DataError, match=r"prompts\.yml:1: the data has no label 'Mass'"):
        start(f"validator.metrics.zero_shot.prompts={prompts}")

    lines = (phantom / "validate.label.tok").read_text().splitlines()
    (tmp_path / "labels").mkdir()
    for split in ("train", "validate", "test"):
        text = (phantom / f"{split}.label.tok").read_text()
        (tmp_path / "labels" / f"{split}.label.tok").write_text(text)
    rare = [line if line != "Pneumonia" else "No Finding" for line in lines]
    rare = [line.replace("Pneumonia,", "").replace(",Pneumonia", "") for line in rare]
    (tmp_path / "labels" / "validate.label.tok").write_text("\n".join(rare) + "\n")
    with pytest.raises(DataError, match=r"'validate' lacks.*'Pneumonia' \(0 of 17 samples\)"):
        start(f"dataset.label.root={tmp_path}/labels")

    tokenizer = tmp_path / "tokenizer"
    sentence_pieces(split=False).save_pretrained(tokenizer)
    with pytest.raises(ConfigError, match=r"model\.encoder.*: the tokenizer .*one word"):
        start(f"dataset.seq.tokenizer={tokenizer}")
