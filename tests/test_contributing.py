"""Train and evaluate the examples of CONTRIBUTING.md."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.systems import CONVIRT
from vilmedic import cli
from vilmedic.phantom.write import Plan, build
from vilmedic.registry import REGISTRIES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
FILES = dict(re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```$", PAGE, re.M | re.S))
SMALL = (
    "trainor.epochs=1",
    "trainor.num_workers=0",
    "trainor.device=cpu",
    "trainor.seed=0",
    "trainor.batch_size=8",
)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the files of the page, and data with one age per line."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    build(tmp_path / "data/ages", Plan(train=16, validate=8, test=8, size=48), force=False)
    for split, count in (("train", 16), ("validate", 8), ("test", 8)):
        ages = "".join(f"{20 + 5 * line}\n" for line in range(count))
        (tmp_path / f"data/ages/{split}.age.tok").write_text(ages)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for registry in REGISTRIES.values():  # unregister the examples afterwards
        monkeypatch.setattr(registry, "_table", dict(registry._table))
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_pkg"]:
        del sys.modules[name]


def test_the_page_shows_four_kinds_of_plugin_and_a_configuration() -> None:
    assert list(FILES) == [
        "my_pkg/losses.py",
        "my_pkg/data.py",
        "my_pkg/models.py",
        "my_pkg/metrics.py",
        "age.yml",
    ]


def test_a_loss_in_the_working_directory_trains(clone: Path) -> None:
    [words] = re.findall(r"^    python bin/train\.py (\S+ .*SigmoidLoss)$", PAGE, re.MULTILINE)
    config, *given = shlex.split(words)
    small = CONVIRT.arguments(clone / "data/ages")[1:]
    assert cli.train([str(ROOT / config), *given, *small, *SMALL, "name=own"]) == 0
    [last] = (clone / "ckpt/own").glob("metrics*.jsonl")
    rows = [json.loads(line) for line in last.read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses
    assert all(loss > 0 for loss in losses)


def test_a_data_set_a_model_and_a_metric_train_and_evaluate(clone: Path) -> None:
    small = ["model.cnn.backbone=shufflenet_v2_x0_5", "dataset.image.resize=32"]
    small += ["dataset.image.crop=32", *SMALL, "ensemblor.device=cpu", "ensemblor.num_workers=0"]
    assert cli.train(["age.yml", *small]) == 0
    assert cli.ensemble(["age.yml", *small, "ensemblor.splits=[test]"]) == 0
    results = json.loads((clone / "ckpt/age/results_test.json").read_text())
    error = results["metrics"]["age_error"]
    assert error["mean"] > 0
    assert 0 <= error["right"] <= 1
    assert list((clone / "ckpt/age").glob("*.pth"))


def test_the_keys_of_the_examples_are_checked(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["age.yml", "validator.metrics.age_error.tolerance=-1", "model.cn.backbone=resnet18"]
    assert cli.train([*words, "--check"]) == 2
    told = capsys.readouterr().err
    assert "tolerance" in told
    assert "Did you mean 'model.cnn" in told
    (clone / "data/ages/train.age.tok").write_text("old\n" * 16)
    assert cli.train(["age.yml", *SMALL]) == 2
    assert "train.age.tok: could not convert string to float: 'old'" in capsys.readouterr().err
