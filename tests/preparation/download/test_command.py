"""The download command with the shipped resource table, on generated archives in real layout."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.preparation.archives import (
    Mimic,
    lines,
    make_mimic,
    write_csv,
    write_images,
    write_mimic,
)
from tests.preparation.builders.test_chexpert import HEADER as CHEXPERT_HEADER
from tests.preparation.builders.test_chexpert import row as chexpert_row
from tests.preparation.builders.test_chexpert import training
from tests.preparation.builders.test_indiana import many as indiana_reports
from tests.preparation.builders.test_padchest import HEADER as PADCHEST_HEADER
from tests.preparation.builders.test_padchest import TABLE
from tests.preparation.builders.test_padchest import many as padchest_rows
from tests.preparation.download.server import PASSWORD, USER, Fault, Seen, Server
from vilmedic.preparation.download.command import main

DATA = Path(__file__).parents[3] / "data"
JPG, CXR = "/files/mimic-cxr-jpg/2.1.0/", "/files/mimic-cxr/2.1.0/"
Run = Callable[..., int]


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (660, 530), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def made(server: Server, tmp_path: Path) -> Mimic:
    """A PhysioNet server with a small MIMIC-CXR: one project has reports, one tables and images."""
    mimic = make_mimic()
    write_mimic(tmp_path / "release", mimic)
    for path in (tmp_path / "release").iterdir():
        base = CXR if path.suffix == ".zip" else JPG
        server.files[base + path.name] = path.read_bytes()
    for number, name in enumerate(mimic.images):
        server.files[JPG + name] = jpeg(number)
    for base in (CXR, JPG):
        server.add_sums(base)
    server.closed = True
    return mimic


@pytest.fixture
def run(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in this process; the shipped table points to the test server."""

    def fake_model(repo: str, local_dir: Path, **_: Any) -> None:
        local_dir.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors", "vocab.json"):
            (local_dir / name).write_text(repo)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_model)
    monkeypatch.setattr("vilmedic.preparation.download.progress.SPARE", 0)

    def call(*arguments: str, status: int = 0, change: Callable[[str], str] = str) -> int:
        table = write_table(server, tmp_path, change)
        options = ["--data", str(tmp_path / "data"), "--resources", str(table)]
        options += ["--wait", "0.005", "--timeout", "5", "--workers", "1"]
        got = main([*arguments, *options], scripts=DATA)
        assert got == status
        return got

    return call


def write_table(server: Server, folder: Path, change: Callable[[str], str] = str) -> Path:
    text = (DATA / "resources.yml").read_text()
    for host in ("physionet.org", "openi.nlm.nih.gov"):
        text = text.replace(f"https://{host}/files", f"{server.url}/files")
        text = text.replace(f"https://{host}/imgs", f"{server.url}/imgs")
    text = text.replace("host: physionet.org", "host: 127.0.0.1")
    text = text.replace("bytes: 1500000000", "bytes: 1000").replace("0000000", "0")
    path = folder / "resources.yml"
    path.write_text(change(text))
    return path


def check_images(data: Path, names: list[str]) -> None:
    folder = data / "images" / "mimic-cxr-images-512"
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    assert found == sorted(names)
    for name in names:
        with Image.open(folder / name) as image:
            assert (image.size, image.format, image.mode) == ((512, 638), "JPEG", "L")


def leftovers(data: Path) -> list[Path]:
    return [p for p in data.rglob("*") if ".part" in p.name or p.name.startswith(".")]


@pytest.mark.usefixtures("account")
def test_the_command_of_the_documentation(
    server: Server, made: Mimic, run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run("mimic-cxr-images-512,SELFSUP", "--parallel", "3")
    data = tmp_path / "data"
    check_images(data, made.images)
    assert leftovers(data) == []
    assert not list((data / "raw" / "mimic-cxr-jpg").rglob("*.jpg"))
    for root in ("SELFSUP/mimic-cxr", "SELFSUP/mimic-cxr-balanced"):
        for name in ("image", "report", "label"):
            assert (data / root / f"train.{name}.tok").is_file()
    for name in ("biomed_roberta_base", "Bio_ClinicalBERT"):
        assert (data / "SELFSUP" / "huggingface" / name / "config.json").is_file()
    assert 1 < server.most <= 3
    requests = len(server.seen)
    run("mimic-cxr-images-512,SELFSUP")
    assert len(server.seen) == requests  # everything is present, so there are no requests
    printed = capfd.readouterr()
    assert "nothing to do" in printed.out
    files = [path.read_bytes() for path in data.rglob("*") if path.is_file()]
    for secret in (PASSWORD, USER):
        assert secret not in printed.out + printed.err
        assert not any(secret.encode() in content for content in files)


@pytest.mark.usefixtures("account")
@pytest.mark.parametrize("seed", [0, 1])
def test_all_kinds_of_faults_still_give_the_same_files(
    server: Server, made: Mimic, run: Run, tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)

    def faults(seen: Seen, number: int) -> Fault | None:
        if seen.method == "HEAD" or number > 6:
            return None
        kinds = [
            Fault(cut=draw.randrange(1, 200_000)),
            Fault(status=draw.choice([500, 502, 503])),
            Fault(slow=0.02),
            None,
        ]
        if number < 2:
            kinds.append(Fault(wrong=draw.randrange(200_000)))
        return draw.choice(kinds)

    run("mimic-cxr-images-512", "--keep-originals", "--subset", "5")
    clean = tmp_path / "clean"
    (tmp_path / "data").rename(clean)
    server.faults = faults
    run("mimic-cxr-images-512", "--keep-originals", "--subset", "5", "--retries", "10")
    assert leftovers(tmp_path / "data") == []
    for path in clean.rglob("*"):
        if path.is_file():
            other = tmp_path / "data" / path.relative_to(clean)
            assert other.read_bytes() == path.read_bytes()
    for path in (tmp_path / "data" / "raw" / "mimic-cxr-jpg").rglob("*.jpg"):
        name = str(path.relative_to(tmp_path / "data" / "raw" / "mimic-cxr-jpg"))
        assert path.read_bytes() == server.files[JPG + name]


def start(server: Server, tmp_path: Path, *options: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(DATA.parent)}
    table = write_table(server, tmp_path)
    command = [sys.executable, str(DATA / "download.py"), "mimic-cxr-images-512"]
    command += ["--data", str(tmp_path / "data"), "--resources", str(table), *options]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


@pytest.mark.usefixtures("account")
def test_a_killed_download_resumes(server: Server, made: Mimic, run: Run, tmp_path: Path) -> None:
    server.pace = 0.05
    process = start(server, tmp_path, "--parallel", "2")
    deadline = time.monotonic() + 60
    while len(server.gets(".jpg")) < 6 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.pace = 0.0
    done = {
        path.name for path in (tmp_path / "data" / "images").rglob("*.jpg") if path.name[0] != "."
    }
    assert done
    before = len(server.seen)
    run("mimic-cxr-images-512")
    check_images(tmp_path / "data", made.images)
    again = [seen.path for seen in server.seen[before:]]
    assert not any(path.endswith(name) for path in again for name in done)


@pytest.mark.usefixtures("account")
def test_subsets(server: Server, made: Mimic, run: Run, tmp_path: Path) -> None:
    split = {dicom: split for dicom, _, _, split in made.split}
    validate = [name for name in made.images if split[Path(name).stem] == "validate"]
    run("mimic-cxr-images-512,SELFSUP", "--subset", "validate:2", status=2)  # no training data
    studies = list(dict.fromkeys(name.split("/")[3] for name in validate))[:2]
    check_images(tmp_path / "data", [name for name in validate if name.split("/")[3] in studies])
    run("mimic-cxr-images-512", "--subset", "validate")
    check_images(tmp_path / "data", validate)
    shutil.rmtree(tmp_path / "data" / "images")
    run("CLIP", "mimic-cxr-images-512", "--subset", "4")
    first = list(dict.fromkeys(name.split("/")[3] for name in made.images))[:4]
    expected = [name for name in made.images if name.split("/")[3] in first]
    check_images(tmp_path / "data", expected)
    root = tmp_path / "data" / "CLIP" / "mimic-cxr"
    listed = [n for f in root.glob("*.image.tok") for line in lines(f) for n in line.split(",")]
    assert sorted(listed) == sorted(expected)
    assert list(root.glob("*.impression.tok"))
    run("CLIP", "mimic-cxr-images-512", "--subset", "6")
    listed = [n for f in root.glob("*.image.tok") for line in lines(f) for n in line.split(",")]
    assert set(listed) > set(expected)
    run("CLIP")
    listed = [n for f in root.glob("*.image.tok") for line in lines(f) for n in line.split(",")]
    assert sorted(listed) == sorted(made.images)


@pytest.mark.usefixtures("made")
def test_missing_and_wrong_credentials_are_an_error(
    server: Server, run: Run, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    run("mimic-cxr-images-512", status=2)
    assert "PHYSIONET_USERNAME" in capsys.readouterr().err
    (home / ".netrc").write_text(f"machine 127.0.0.1 login {USER} password wrong\n")
    (home / ".netrc").chmod(0o600)
    run("mimic-cxr-images-512", status=2)
    message = capsys.readouterr().err
    assert "does not accept user and password" in message
    assert len(server.seen) == 1  # one request, not one per file
    (home / ".netrc").unlink()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: USER)
    monkeypatch.setattr("getpass.getpass", lambda _: PASSWORD)
    run("mimic-cxr-images-512", "--subset", "1")


@pytest.mark.usefixtures("account", "made")
def test_failures_have_their_own_messages(
    server: Server, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def message(*names: str, status: int = 2) -> str:
        run(*names, status=status)
        return capsys.readouterr().err

    server.signed = False
    assert "sign the data use agreement at https://physionet.org/content/" in message("SELFSUP")
    server.signed = True
    zipped = server.files.pop(CXR + "mimic-cxr-reports.zip")
    assert "mimic-cxr-reports.zip does not exist" in message("SELFSUP")
    server.files[CXR + "mimic-cxr-reports.zip"] = zipped[:-1] + b"?"
    assert "is published. It was deleted 3 times" in message("CLIP")
    assert not list((tmp_path / "data" / "raw" / "mimic-cxr").glob("mimic-cxr-reports*"))
    server.faults = lambda seen, _: Fault(status=500)
    assert "gave up" in message("CLIP", "--retries", "1")


@pytest.mark.usefixtures("account", "made")
def test_disk_space_is_checked_first(
    server: Server, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)  # type: ignore[attr-defined]
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    run("mimic-cxr-images-512", status=2)
    error = capsys.readouterr().err
    assert "has 1.0 MB free" in error
    assert "--subset" in error
    assert server.gets(".jpg") == []


@pytest.mark.usefixtures("account")
def test_failed_images_are_listed(
    server: Server, made: Mimic, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, torn = made.images[0], made.images[1]
    whole = server.files.pop(JPG + gone)
    server.files[JPG + torn] = server.files[JPG + torn][:-500]
    run("mimic-cxr-images-512", "CLIP", status=1)
    check_images(tmp_path / "data", made.images[2:])
    notes = lines(tmp_path / "data" / "images" / "mimic-cxr-images-512" / "failed.txt")
    assert sorted(note.split("\t")[0] for note in notes) == sorted([gone, torn])
    assert "2 images could not be fetched" in capsys.readouterr().out
    assert not (tmp_path / "data" / "CLIP").exists()
    server.files[JPG + gone] = whole
    server.files[JPG + torn] = jpeg(1)
    run("mimic-cxr-images-512", "CLIP")
    check_images(tmp_path / "data", made.images)


def indiana_release(server: Server, tmp_path: Path) -> Callable[[str], str]:
    (tmp_path / "xml").mkdir()
    for uid, text in indiana_reports().items():
        (tmp_path / "xml" / f"{uid}.xml").write_text(text)
    names = [f"CXR{uid}_IM-{uid:04d}-{n}001.png" for uid in indiana_reports() for n in (1, 2)]
    write_images(tmp_path / "png", names, size=(20, 30))
    for name, folder, inside in (
        ("NLMCXR_reports.tgz", "xml", "ecgen-radiology"),
        ("NLMCXR_png.tgz", "png", "."),
    ):
        with tarfile.open(tmp_path / name, "w:gz") as archive:
            archive.add(tmp_path / folder, inside)
        server.files[f"/imgs/collections/{name}"] = (tmp_path / name).read_bytes()

    def change(text: str) -> str:
        kept = [
            line for line in text.splitlines() if "1112632" not in line and "8fb6de" not in line
        ]
        return "\n".join(kept)

    return change


def test_indiana(server: Server, run: Run, tmp_path: Path) -> None:
    change = indiana_release(server, tmp_path)
    run("indiana-images-512", change=change)
    data = tmp_path / "data"
    assert len(list((data / "images" / "indiana-images-512").glob("CXR*.png"))) == 60
    root = data / "SELFSUP" / "indiana"
    for line in lines(root / "train.image.tok"):
        for name in line.split(","):
            assert (data / "images" / "indiana-images-512" / name).is_file()
    assert not (data / "raw" / "indiana" / "png").exists()
    requests = len(server.seen)
    run("indiana-images-512", change=change)
    assert len(server.seen) == requests


def test_padchest_is_built_from_local_files(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "data" / "raw" / "padchest"
    run("padchest-images-512", status=2)
    error = capsys.readouterr().err
    assert "Register at https://bimcv.cipf.es" in error
    assert error.count("missing:") == 2
    write_csv(raw / TABLE, PADCHEST_HEADER, padchest_rows())
    run("padchest-images-512", status=2)
    assert "found:" in capsys.readouterr().err
    for number, row in enumerate(padchest_rows()):
        path = raw / "images" / row[2] / row[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        deep = np.random.default_rng(number).integers(0, 4095, (40, 30)).astype(np.uint16)
        Image.fromarray(deep).save(path)
    run("padchest-images-512")
    root = tmp_path / "data" / "SELFSUP" / "padchest"
    folder = tmp_path / "data" / "images" / "padchest-images-512"
    names = [
        n for split in ("train", "validate", "test") for n in lines(root / f"{split}.image.tok")
    ]
    assert len(names) == len(padchest_rows())
    for name in names:
        with Image.open(folder / name) as image:
            assert (image.mode, image.size) == ("L", (30, 40))


def test_linked_image_folders_are_accepted(run: Run, tmp_path: Path) -> None:
    raw = tmp_path / "data" / "raw" / "padchest"
    write_csv(raw / TABLE, PADCHEST_HEADER, padchest_rows())
    write_images(tmp_path / "disk", [row[1] for row in padchest_rows()])
    (raw / "images").mkdir()
    (raw / "images" / "0").symlink_to(tmp_path / "disk")
    run("padchest-images-512")
    assert len(lines(tmp_path / "data" / "SELFSUP" / "padchest" / "train.image.tok")) == 72


def only_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - free, free)  # type: ignore[attr-defined]
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)


def test_space_is_required_only_for_missing_files(
    server: Server, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "data" / "raw" / "padchest"
    write_csv(raw / TABLE, PADCHEST_HEADER, padchest_rows())
    write_images(raw / "images", [row[1] for row in padchest_rows()])
    only_free(monkeypatch, 2_500)  # the table states 3,000
    run("padchest-images-512", status=2)
    only_free(monkeypatch, 10**6)
    run("padchest-images-512")
    only_free(monkeypatch, 0)
    run("padchest-images-512")
    only_free(monkeypatch, 10**6)
    change = indiana_release(server, tmp_path)
    run("indiana-images-512", "--keep-originals", change=change)
    (tmp_path / "data" / "images" / "indiana-images-512" / ".complete").unlink()
    only_free(monkeypatch, 0)
    run("indiana-images-512", change=change)  # as after an interruption


@pytest.mark.usefixtures("account", "made")
def test_space_for_models_is_checked(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("SELFSUP")
    only_free(monkeypatch, 0)
    run("SELFSUP")  # everything is present
    shutil.rmtree(tmp_path / "data" / "SELFSUP" / "huggingface")
    run("SELFSUP", status=2)
    assert "1.4 kB will be written" in capsys.readouterr().err


def test_chexpert_is_built_from_local_files(run: Run, tmp_path: Path) -> None:
    raw = tmp_path / "data" / "raw" / "chexpert"
    valid = [chexpert_row(n, split="valid", Edema="1.0") for n in range(64541, 64544)]
    write_csv(raw / "train.csv", CHEXPERT_HEADER, training())
    write_csv(raw / "valid.csv", CHEXPERT_HEADER, valid)
    names = [row[0].split("/", 1)[1] for row in training() + valid]
    write_images(raw, names, size=(12, 10))

    def fewer(text: str) -> str:
        text = text.replace("--five-by-200]", '--five-by-200, --each, "9"]')
        return text.replace(
            '--root, "{data}/SELFSUP/chexpert"]',
            '--root, "{data}/SELFSUP/chexpert", --each, "9", --validate, "20"]',
        )

    run("chexpert", change=fewer)
    five = tmp_path / "data" / "SELFSUP" / "chexpert-5x200"
    folder = tmp_path / "data" / "images" / "chexpert-images-512"
    assert len(lines(five / "test.image.tok")) == 45
    assert all((folder / name).is_file() for name in lines(five / "test.image.tok"))


def test_phantom(run: Run, tmp_path: Path) -> None:
    def small(text: str) -> str:
        text = text.replace('"4000"', '"3"').replace('"500"', '"1"')
        return text.replace('"128"', '"32"')

    run("phantom", change=small)
    assert len(lines(tmp_path / "data" / "phantom" / "train.report.tok")) == 3


def test_a_file_instead_of_the_data_folder_is_an_error(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").write_text("")
    run("phantom", status=2)
    assert "data is a file" in capsys.readouterr().err


def test_the_list_shows_all_resources(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    text = capsys.readouterr().out
    for name in ("phantom", "SELFSUP", "CLIP", "padchest-images-512", "chexpert"):
        assert f"\n{name}\n" in "\n" + text
    for word in ("570 GB", "CC BY-NC-ND 4.0", "PHYSIONET_PASSWORD", "data use agreement"):
        assert word in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["selfsup"], "Did you mean 'SELFSUP'?"),
        (["SELFSUP", "--subset", "trian"], "Did you mean 'train'?"),
        (["SELFSUP", "--subset", "validate:x"], "'x' is no number of studies"),
        (["indiana-images-512", "--subset", "5"], "concerns images of MIMIC-CXR"),
    ],
)
def test_wrong_arguments_are_refused(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    run(*arguments, status=2)
    assert message in capsys.readouterr().err


def test_a_card_records_the_images_of_a_subset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With more images the same command is another build, which needs --force."""
    from vilmedic.preparation.builders.mimic_cxr import main as make

    mimic = make_mimic()
    write_mimic(tmp_path / "raw", mimic)
    write_images(tmp_path / "images", mimic.images[:20])
    arguments = ["--reports", str(tmp_path / "raw"), "--tables", str(tmp_path / "raw")]
    arguments += ["--images", str(tmp_path / "images"), "--root", str(tmp_path / "out")]
    assert make([*arguments, "--workers", "1"]) == 0
    write_images(tmp_path / "images", mimic.images)
    assert make([*arguments, "--workers", "1"]) == 2
    assert "was made with images of other content. Replace it" in capsys.readouterr().err
    report_lines = tmp_path / "out" / "train.report.tok"
    before = report_lines.read_text()
    report_lines.write_text("mine\n")
    assert make([*arguments, "--workers", "1", "--force", "images"]) == 2
    assert "was changed" in capsys.readouterr().err
    report_lines.write_text(before)
    assert make([*arguments, "--workers", "1", "--force", "images", "--line", "image"]) == 2
    assert make([*arguments, "--workers", "1", "--force", "images"]) == 0
    card = json.loads((tmp_path / "out" / "data_card.json").read_text())
    assert card["inputs"]["images"]["files"] == len(mimic.images)
