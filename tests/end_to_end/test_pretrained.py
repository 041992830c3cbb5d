"""Runs that start from the encoders of another run."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import Tensor

import vilmedic
from tests.crash.systems import CONVIRT, GLORIA, System
from tests.end_to_end.conftest import ROOT, Run
from vilmedic import run
from vilmedic.errors import ConfigError
from vilmedic.phantom.write import Plan, build

UNTRAINED = ("trainor.epochs=0", "trainor.loggers=[]")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pretrained") / "data"
    build(root, Plan(train=9, validate=5, test=4, size=32), force=False, workers=1)
    return root


@pytest.fixture(autouse=True)
def from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(run, "write_pages", lambda run_dir: None)


def words(system: System, data: Path, ckpt_dir: Path, *more: str) -> list[str]:
    small = ["trainor.epochs=1", "trainor.num_workers=0", "trainor.save_every=null"]
    return [*system.arguments(data), *small, f"ckpt_dir={ckpt_dir}", *more]


def weights(run_dir: Path) -> dict[str, Tensor]:
    return torch.load(run_dir / "last_3.pth", weights_only=True)["model"]


@pytest.mark.parametrize(("first", "second"), [(CONVIRT, GLORIA), (GLORIA, CONVIRT)])
def test_training_starts_from_encoders_of_another_system(
    run_here: Run, data: Path, tmp_path: Path, first: System, second: System
) -> None:
    run_here("bin/train.py", *words(first, data, tmp_path, "name=first"))
    (best,) = (tmp_path / "first").glob("[0-9]*.pth")
    source = torch.load(best, weights_only=True)["model"]
    given = (f"model.cnn.pretrained={tmp_path}/first", f"model.encoder.pretrained={best}")

    config, *more = words(second, data, tmp_path, *UNTRAINED, *given)
    trained = vilmedic.train(config, *more, name="second")

    taken = weights(trained.directory)
    text = {"ConVIRT": "encoder.network.", "GLoRIA": "encoder.text.network."}
    for theirs, ours in (("cnn.network.",) * 2, (text[first.name], text[second.name])):
        names = [name.removeprefix(theirs) for name in source if name.startswith(theirs)]
        assert len(names) > 20
        assert all(torch.equal(taken[ours + name], source[theirs + name]) for name in names)

    # Now the checkpoint has all weights: the run that it started from is not needed.
    shutil.rmtree(tmp_path / "first")
    goes_on = [*words(second, data, tmp_path, *given), "name=second", "trainor.seed=3"]
    run_here("bin/train.py", *goes_on, "ckpt=auto")
    assert not torch.equal(weights(trained.directory)[ours + names[0]], source[theirs + names[0]])
    plain = ["ensemblor.splits=[test]", "ensemblor.metrics={}", "ensemblor.post_processing={}"]
    plain += ["ensemblor.baselines=[untrained]", "ensemblor.report=false"]
    done = run_here("bin/ensemble.py", *goes_on, *plain)
    assert "The baseline untrained is left out: model." in done.stdout
    assert "): there is no file" in done.stdout
    assert vilmedic.load(trained.directory).embed_texts(["no effusion"]).shape[0] == 1


def test_unavailable_weights_are_reported_before_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    config, *more = words(CONVIRT, tmp_path / "no data", tmp_path, "model.cnn.pretrained=true")
    with pytest.raises(ConfigError, match=r"model\.cnn\.pretrained .*no route to host"):
        vilmedic.train(config, *more, name="run")


def test_another_vocabulary_is_refused(run_here: Run, data: Path, tmp_path: Path) -> None:
    run_here("bin/train.py", *words(CONVIRT, data, tmp_path, *UNTRAINED, "name=first"))
    other = words(GLORIA, data, tmp_path, *UNTRAINED, "name=second", "dataset.seq.file=report.tok")
    given = f"model.encoder.pretrained={tmp_path}/first"
    done = run_here("bin/train.py", *other, given, status=2)
    remedy = f"dataset.seq.tokenizer={tmp_path}/first/tokenizer"
    assert f"Set {remedy.removeprefix('dataset.seq.')}." in done.stderr
    run_here("bin/train.py", *other, given, remedy)
    name = "embeddings.word_embeddings.weight"
    source, taken = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert torch.equal(taken[f"encoder.text.network.{name}"], source[f"encoder.network.{name}"])
