from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import vilmedic
from tests.export import exports
from tests.export.exports import save_run, simclr
from tests.export.hub import Hub, serve, use
from vilmedic.checkpoints.repository import fetch_export
from vilmedic.errors import CheckpointError
from vilmedic.manifest import is_repository

NAME = "somebody/simclr"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as server:
        use(server, tmp_path / "cache", monkeypatch)
        yield server


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    save_run(folder / "run", simclr(exports.cnn("shufflenet_v2_x0_5"), 1024))
    return vilmedic.load(folder / "run", device="cpu").export(folder / "out")


def test_only_files_in_the_manifest_are_fetched_and_no_code(
    hub: Hub, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fill(NAME, exported)
    marker = tmp_path / "executed"
    for name in ("modeling.py", "image_encoder/modeling.py", "__init__.py"):
        hub.files[NAME][name] = f"open({str(marker)!r}, 'w')".encode()
    config = json.loads(hub.files[NAME]["image_encoder/config.json"])
    assert config["library"] == "torchvision"
    folder = fetch_export(NAME)
    assert not list(folder.rglob("*.py"))
    model = vilmedic.load(NAME, device="cpu")
    assert model.abilities == ["embed_images"]
    assert not marker.exists()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert vilmedic.load(NAME, device="cpu").path == folder, "fetched files need no network"


def test_paths_outside_the_repository_are_refused(hub: Hub, exported: Path) -> None:
    hub.fill(NAME, exported)
    manifest = json.loads(hub.files[NAME]["vilmedic.json"])
    some = next(iter(manifest["files"].values()))
    for name in ("../out.json", "/etc/x.json", "a/../../b.json", "modeling.py", "a\\..\\b.json"):
        changed = manifest | {"files": {**manifest["files"], name: some}}
        hub.files[NAME]["vilmedic.json"] = json.dumps(changed).encode()
        hub.commits += 1
        with pytest.raises(CheckpointError, match=r"vilmedic\.json: is damaged: the file '"):
            vilmedic.load(NAME)


def test_missing_repositories_and_non_exports_are_an_error(hub: Hub, exported: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{NAME}: there is no such .*repository"):
        vilmedic.load(NAME)
    hub.files[NAME] = {"config.json": b"{}"}
    with pytest.raises(CheckpointError, match=r"is no complete export: it has no vilmedic\.json"):
        vilmedic.load(NAME)
    hub.fill(NAME, exported)
    del hub.files[NAME]["heads.safetensors"]
    with pytest.raises(CheckpointError, match=r"it has no heads\.safetensors"):
        vilmedic.load(NAME)
    hub.fill(NAME, exported)
    with pytest.raises(CheckpointError, match="has no meaning"):
        vilmedic.load(NAME, ckpt="last")


def test_a_path_is_not_taken_for_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt").mkdir()
    assert is_repository("user/name")
    for name in ("ckpt/missing", "/a/b", "./a/b", "a/b/c", "name", "../a", "user/name.pth/"):
        assert not is_repository(name)
    with pytest.raises(CheckpointError, match="ckpt/missing: there is no such run directory"):
        vilmedic.load("ckpt/missing")


def test_without_a_network_the_hub_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def ask(url: str) -> None:
        asked.append(url)
        raise RuntimeError("Connection refused")  # like httpx, whose errors are not OSErrors

    with serve() as server:
        use(server, tmp_path / "cache", monkeypatch)
    monkeypatch.setattr("vilmedic.checkpoints.repository.get_hf_file_metadata", ask)
    monkeypatch.setattr("vilmedic.checkpoints.repository.hf_hub_download", None)
    with pytest.raises(CheckpointError, match=f"{NAME}: .*could not be fetched.*Connection ref"):
        vilmedic.load(NAME)
    assert len(asked) == 1
