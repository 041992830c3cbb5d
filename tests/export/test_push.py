from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

import vilmedic
from tests.export.exports import TEXTS
from tests.export.hub import Hub
from vilmedic import cli
from vilmedic.errors import CheckpointError, ConfigError, VilmedicError
from vilmedic.export.push import push

NAME = "somebody/chest-x-rays"


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_push_creates_a_private_repository(made: Path, out: Path, hub: Hub) -> None:
    (out / "LICENSE").write_text("mine")
    (out / "notes.py").write_text("print('mine alone')")
    assert push(out, NAME) == f"{hub.url}/{NAME}"
    assert not hub.public
    uploaded = hub.files[NAME]
    assert uploaded.keys() - {".gitattributes"} == contents(out).keys() - {"notes.py"}
    assert all(uploaded[name] == content for name, content in contents(made / "out").items())
    model = vilmedic.load(NAME, device="cpu")
    expected = vilmedic.load(made / "run", device="cpu")
    assert torch.equal(model.embed_texts(TEXTS), expected.embed_texts(TEXTS))
    again = expected.model.state_dict()
    assert all(torch.equal(again[k], v) for k, v in model.model.state_dict().items())


def test_nothing_is_uploaded_without_push(run_dir: Path, tmp_path: Path, hub: Hub) -> None:
    vilmedic.load(run_dir, device="cpu").export(tmp_path / "new")
    assert not hub.files


def test_an_interrupted_upload_resumes(
    out: Path, hub: Hub, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = digest(out / "image_encoder/model.safetensors")
    hub.refused[large] = 400
    words = [str(made / "run"), str(out), "--push", NAME]
    assert cli.export(words) == 2
    told = capsys.readouterr().err
    assert f"--push: {NAME} was not uploaded completely (" in told
    assert "The same command resumes the upload" in told
    assert "model.safetensors" not in str(hub.files[NAME])
    first = list(hub.sent)
    assert large not in first
    hub.refused.clear()
    assert cli.export(words) == 0
    assert large in hub.sent
    assert sorted(hub.sent) == sorted(set(hub.sent)), "uploaded files are not sent again"
    assert hub.files[NAME]["image_encoder/model.safetensors"] in hub.blobs.values()
    assert hub.files[NAME].keys() - {".gitattributes"} == contents(out).keys()


def test_a_public_repository_needs_the_option_public(out: Path, hub: Hub) -> None:
    hub.files[NAME] = {}
    hub.public.add(NAME)
    with pytest.raises(ConfigError, match=f"the repository {NAME} is public, so everybody"):
        push(out, NAME)
    assert hub.files[NAME] == {}
    push(out, NAME, public=True)
    assert "heads.safetensors" in hub.files[NAME]
    push(out, "somebody/new", public=True)
    assert "somebody/new" in hub.public


def test_parts_of_an_earlier_export_are_removed(out: Path, hub: Hub) -> None:
    hub.files[NAME] = {"onnx/image_encoder.onnx": b"old", "mine.txt": b"kept"}
    push(out, NAME)
    assert "onnx/image_encoder.onnx" not in hub.files[NAME]
    assert hub.files[NAME]["mine.txt"] == b"kept"


def test_upload_errors_are_reported(out: Path, hub: Hub) -> None:
    for name in ("nobody", "a/b/c", "a b/c", "../x", ""):
        with pytest.raises(ConfigError, match=f"--push: given '{name}', allowed: user/name"):
            push(out, name)
    hub.forbids = 403
    with pytest.raises(VilmedicError, match=r"hub refuses to write .* \(403\).*hf auth login"):
        push(out, NAME)
    (out / "heads.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"heads\.safetensors: is damaged or was changed"):
        push(out, NAME)


def test_options_are_checked_before_the_export(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(made / "run"), str(tmp_path / "new")]
    assert cli.export([*words, "--public"]) == 2
    assert "--public: belongs to --push" in capsys.readouterr().err
    assert cli.export([*words, "--push", "nobody"]) == 2
    assert "allowed: user/name" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_without_a_network_nothing_hangs(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(VilmedicError, match=rf"nothing was uploaded to {NAME}: .* \(OfflineMode"):
        push(out, NAME)
    with pytest.raises(CheckpointError, match=f"{NAME}: there is no such run directory or checkp"):
        vilmedic.load(NAME)
