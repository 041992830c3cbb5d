from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.export.exports import BEST, LENGTH, convirt, evaluate, save_run
from tests.small_models import tiny_spec
from vilmedic.errors import CheckpointError
from vilmedic.evaluation.evaluations import write_index
from vilmedic.export.card import shortened
from vilmedic.run import load


def card(run_dir: Path, out: Path, **options: Any) -> str:
    load(run_dir, device="cpu", **options).export(out)
    return (out / "README.md").read_text()


def test_the_card_describes_the_model_and_its_training(made: Path) -> None:
    text = (made / "out/README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "unknown"
    assert front["library_name"] == "vilmedic"
    assert front["pipeline_tag"] == "zero-shot-image-classification"
    assert {"chest-x-ray", "convirt"} <= set(front["tags"])
    assert re.search(r"^license: unknown +# fill in", text, re.M)
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings == [
        *("What it must not be used for", "Licence", "What is here", "Load it"),
        *("How it was trained", "Numbers"),
    ]
    for told in (
        "# tiny-convirt: ConVIRT for chest X-rays",
        "**Weights trained on credentialed data may not be public.**",
        "Not for diagnosis, triage or any other decision about a patient",
        "| Data | `ImSeq` of `data/tiny` |",
        "| Images | grey, short side 40, middle 32 x 32, mean [0.485, 0.456, 0.406], std",
        "| Texts | as they are, at most 16 tokens |",
        "| Command | `python bin/train.py my.yml name=tiny-convirt` |",
        "| Checkpoint | epoch 4, step 40, seed 7 |",
        "| Chosen by | validation_loss = 0.5 (lower is better) |",
        "| Versions | vilmedic 0.1.0, torch 2.14.1, python 3.11.7 |",
        "| Commit | `0123456789abcdef0123456789abcdef01234567` |",
    ):
        assert told in text
    load_it = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)[0]
    assert len(load_it.splitlines()) <= 15
    assert max(map(len, re.sub(r"^\|.*$|^[^`|].*[.,:]$", "", text, flags=re.M).splitlines())) < 200


def test_the_card_explains_weights_that_transformers_misses(made: Path, tmp_path: Path) -> None:
    told = (
        "Of `text_encoder/` transformers prints that weights of `pooler` are missing and newly "
        "initialised: they were not trained, and the features below do not use them."
    )
    assert told in (made / "out/README.md").read_text()
    save_run(tmp_path / "run", convirt(pooling="pooler"))
    assert "newly initialised" not in card(tmp_path / "run", tmp_path / "out")


def test_numbers_have_intervals_and_protocols(made: Path) -> None:
    numbers = (made / "out/README.md").read_text().partition("## Numbers\n")[2]
    assert "| test | ConVIRT | untrained |" in numbers
    assert "| zero_shot auroc | 0.750 [0.650, 0.850] | - |" in numbers
    assert "| loss | 1.250 | 2.500 |" in numbers
    assert "Of ConVIRT, epoch 4, seed 7; test: 10 samples; batches of 4 in fp32, seed 0." in numbers
    assert "the same network before training (`untrained`)" in numbers
    assert "raw_pixels" not in numbers
    [protocol] = re.findall(r"```yaml\n(.*?)```", numbers, re.S)
    assert yaml.safe_load(protocol) == {"zero_shot": {"prompts": "mine.yml", "bootstrap": 1000}}


def test_numbers_are_from_the_latest_evaluation_of_these_weights(
    run_dir: Path, tmp_path: Path
) -> None:
    evaluate(run_dir, 0.875)
    record = run_dir / "evaluations" / evaluate(run_dir, 0.5, ema=True) / "evaluation.json"
    evaluate(run_dir, 0.25, file="0.4_5_7.pth")
    dates = {0.75: 1, 0.875: 2, 0.5: 3, 0.25: 4}
    for path in (run_dir / "evaluations").glob("*/evaluation.json"):
        said = json.loads(path.read_text())
        date = f"2026-01-0{dates[said['settings']['auroc']]}T00:00:00+00:00"
        path.write_text(json.dumps(said | {"date": date}))
    (run_dir / "evaluations/index.json").write_text("[]")
    write_index(run_dir)
    assert "zero_shot auroc | 0.875 [" in card(run_dir, tmp_path / "best")
    text = card(run_dir, tmp_path / "averaged", ema=True)
    assert "zero_shot auroc | 0.500 [" in text
    assert "Of ConVIRT, epoch 4, seed 7, averaged weights;" in text
    assert record.is_file()


def test_numbers_of_other_weights_are_not_shown(run_dir: Path, tmp_path: Path) -> None:
    text = card(run_dir, tmp_path / "averaged", ema=True)
    assert (
        "These weights were not evaluated. The newest evaluation of the run is of others:" in text
    )
    assert "0.750" not in text


@pytest.mark.parametrize("lost", ["environment_7.json", "evaluations"])
def test_missing_files_of_the_run_are_left_out_of_the_card(
    run_dir: Path, tmp_path: Path, lost: str
) -> None:
    (run_dir / lost).rename(tmp_path / "gone")
    text = card(run_dir, tmp_path / "out")
    assert ("| Versions |" in text) == (lost == "evaluations")
    assert ("These weights were not evaluated.\n" in text) == (lost == "evaluations")
    alone = (run_dir / BEST).rename(tmp_path / "alone.pth")
    assert "| Checkpoint | epoch 4" in card(alone, tmp_path / "alone")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"command": 3, "versions": []}', "nan"])
def test_a_damaged_environment_file_is_ignored(run_dir: Path, tmp_path: Path, content: str) -> None:
    (run_dir / "environment_7.json").write_text(content)
    assert "| System | ConVIRT |" in card(run_dir, tmp_path / "out")


def test_damaged_results_are_skipped(
    run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    [path] = (run_dir / "evaluations").glob("*/results_test.json")
    for number, content in enumerate(("", "[]", "{}", path.read_text().replace('"ema"', '"a"'))):
        path.write_text(content)
        caplog.clear()
        text = card(run_dir, tmp_path / str(number))
        assert "These weights were not evaluated." in text
        assert f"{path} is left out of the model card: it is damaged" in caplog.text


def test_exporting_a_damaged_export_is_refused(out: Path, tmp_path: Path) -> None:
    path = out / "vilmedic.json"
    manifest = json.loads(path.read_text())
    for about in ({"results": {"test": {}}}, {"environment": 3}, {"results": {"a": {"cells": 1}}}):
        path.write_text(json.dumps(manifest | {"about": about}))
        with pytest.raises(CheckpointError, match="its description of the run is damaged"):
            load(out, device="cpu").export(tmp_path / "again")


def test_the_home_directory_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    given = {"a": ["/home/somebody/data", 3, None], "b": "root=/home/somebody/x,/data"}
    assert shortened(given) == {"a": ["~/data", 3, None], "b": "root=~/x,/data"}


def test_special_characters_do_not_break_the_card(tmp_path: Path) -> None:
    spec = dataclasses.replace(tiny_spec(LENGTH), labels=("a|b", "c\n\n# d"))
    config = convirt("squeezenet1_1", 512) | {"name": "x\n---\n# y"}
    save_run(tmp_path / "run", config, spec)
    text = card(tmp_path / "run", tmp_path / "out")
    assert r"| Labels | a\|b, c # d (not trained on) |" in text
    assert "# x --- # y: ConVIRT for chest X-rays" in text
    assert text.splitlines().count("---") == 2, "no rule but those around the front matter"


def test_the_card_lists_transforms_missing_in_the_image_processor(
    made: Path, tmp_path: Path
) -> None:
    config = convirt("shufflenet_v2_x0_5", 1024)
    blur = [{"GaussianBlur": {"kernel_size": 3, "sigma": 1.0}}]
    config["dataset"] = {**config["dataset"]}
    config["dataset"]["image"] = config["dataset"]["image"] | {"eval_transforms": blur}
    save_run(tmp_path / "run", config)
    text = card(tmp_path / "run", tmp_path / "out")
    assert "images also go through\n# `transforms` of preprocessor_config.json." in text
    assert "What the processor leaves out" not in (made / "out/README.md").read_text()
    said = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert said["transforms"] == blur
