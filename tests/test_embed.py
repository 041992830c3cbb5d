from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet

import vilmedic
from tests.crash.killing import PROCESSES
from tests.crash.systems import CONVIRT, SIMCLR, VAE
from tests.finished_runs import ROOT, Runs
from vilmedic import cli, embedding_file

NAMES = ["--batch-size", "4", "--device", "cpu"]


def embed(*words: object, status: int = 0) -> None:
    assert cli.embed([*map(str, words), *NAMES]) == status


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as found:
        return dict(found)


def write_list(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_file_holds_the_same_as_the_python_api(
    trained: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = trained(CONVIRT), tmp_path / "new" / "features.npz"
    texts = write_list(tmp_path / "texts.txt", trained.reports())
    capsys.readouterr()
    embed(run, "--images", trained.data / "images", "--texts", texts, "--out", out)
    assert capsys.readouterr().out == f"Written: {out}\n"
    found = arrays(out)
    model = vilmedic.load(run, device="cpu")
    paths = vilmedic.images_in(trained.data / "images")
    assert found["path"].tolist() == paths
    assert found["text"].tolist() == trained.reports()
    assert np.array_equal(found["visual"], model.embed_images(paths, batch_size=4).numpy())
    expected = model.embed_texts(trained.reports(), batch_size=4).numpy()
    assert np.array_equal(found["linguistic"], expected)
    assert set(found["path_error"]) == set(found["text_error"]) == {""}
    assert json.loads(str(found["plan"]))["features"] == "visual"


def test_lists_and_tables_name_images(trained: Runs, tmp_path: Path) -> None:
    run, paths = trained(CONVIRT), trained.images()
    listed = write_list(tmp_path / "images.txt", [*paths, ""])
    rows = [f'{number},"{path}",x' for number, path in enumerate(paths)]
    table = write_list(tmp_path / "table.csv", ["id,where,note", *rows])
    options = ["--features", "visual_backbone", "--no-normalize"]
    embed(run, "--images", listed, "--out", tmp_path / "a.npz", *options)
    embed(run, "--images", table, "--image-column", "where", "--out", tmp_path / "b.npz", *options)
    embed(run, "--images", paths[0], "--out", tmp_path / "c.parquet", *options)
    first, second = arrays(tmp_path / "a.npz"), arrays(tmp_path / "b.npz")
    assert all(np.array_equal(first[name], second[name]) for name in first if name != "plan")
    assert first["path"].tolist() == paths
    model = vilmedic.load(run, device="cpu")
    expected = model.embed_images(
        paths, features="visual_backbone", normalize=False, batch_size=4
    ).numpy()
    assert np.array_equal(first["visual"], expected)
    whole = parquet.read_table(tmp_path / "c.parquet").to_pylist()
    assert [row["path"] for row in whole] == paths[:1]
    alone = model.embed_images(paths[0], features="visual_backbone", normalize=False)
    assert whole[0]["visual"] == alone[0].tolist()


def test_checkpoint_and_precision_options(trained: Runs, tmp_path: Path) -> None:
    run, paths = trained(CONVIRT), trained.images()
    listed = write_list(tmp_path / "images.txt", paths)
    options = ["--ckpt", "last_3.pth", "--ema", "--precision", "bf16", "--workers", "1"]
    embed(run, "--images", listed, "--out", tmp_path / "a.npz", *options)
    model = vilmedic.load(run, ckpt="last_3.pth", ema=True, device="cpu")
    expected = model.embed_images(paths, batch_size=4, precision="bf16").numpy()
    assert np.array_equal(arrays(tmp_path / "a.npz")["visual"], expected)


def test_a_second_call_does_nothing(
    trained: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, out = trained(CONVIRT), tmp_path / "features.npz"
    listed = write_list(tmp_path / "images.txt", trained.images())
    embed(run, "--images", listed, "--out", out)
    before = out.stat().st_mtime_ns
    capsys.readouterr()
    monkeypatch.setattr("vilmedic.embed.load", None)  # the model is not needed
    embed(run, "--images", listed, "--out", out)
    assert capsys.readouterr().out == f"{out} is complete: nothing to do.\n"
    assert out.stat().st_mtime_ns == before
    monkeypatch.undo()
    embed(run, "--images", listed, "--out", out, "--no-normalize", status=2)
    assert "--force" in capsys.readouterr().err
    embed(run, "--images", listed, "--out", out, "--no-normalize", "--force")
    assert np.linalg.norm(arrays(out)["visual"], axis=1).std() > 1e-3


def test_unreadable_inputs_are_errors_or_skipped(
    trained: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, paths = trained(CONVIRT), trained.images()
    bad = tmp_path / "bad.png"
    bad.write_bytes(Path(paths[0]).read_bytes()[:60])
    images = write_list(tmp_path / "images.txt", [*paths[:5], str(bad), "none.png", *paths[5:]])
    texts = write_list(tmp_path / "texts.txt", ["Clear lungs.", "", "Large effusion."])
    given = [run, "--images", images, "--texts", texts, "--out", tmp_path / "a.npz"]
    embed(*given, status=2)
    assert f"1 empty input: {texts}:2" in capsys.readouterr().err
    embed(run, "--images", images, "--out", tmp_path / "a.npz", status=2)
    assert "1 of 12 images do not exist: none.png" in capsys.readouterr().err
    embed(run, "--images", bad, "--out", tmp_path / "a.npz", status=2)
    assert "bad.png" in capsys.readouterr().err
    embed(*given, "--on-error", "skip")
    found = arrays(tmp_path / "a.npz")
    assert np.isnan(found["visual"]).all(axis=1).tolist() == [n in (5, 6) for n in range(12)]
    assert [bool(error) for error in found["path_error"]] == [n in (5, 6) for n in range(12)]
    assert "bad.png" in found["path_error"][5]
    assert np.isnan(found["linguistic"]).all(axis=1).tolist() == [False, True, False]
    assert found["text_error"].tolist() == ["", "is empty", ""]
    only = write_list(tmp_path / "only.txt", [*paths[:2], str(bad)])
    given = [run, "--images", only, "--out", tmp_path / "b.npz"]
    embed(*given, "--on-error", "skip")
    capsys.readouterr()
    embed(*given, status=2)
    assert f"b.npz is complete, but an earlier call left out 1 input: {bad} " in (
        capsys.readouterr().err
    )
    embed(*given, "--force", status=2)
    assert str(bad) in capsys.readouterr().err
    embed(*given, "--on-error", "skip")
    assert "nothing to do" in capsys.readouterr().out


def stopped(words: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt with Ctrl-C after all parts are written and before the file is."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(embedding_file, "_write_npz", stop)
        embed(*words, status=130)


@pytest.mark.parametrize("change", ["none", "content", "order", "text", "weights"])
def test_changed_inputs_are_embedded_again(
    change: str, trained: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_file, "PART", 8)
    run = shutil.copytree(trained(CONVIRT), tmp_path / "run")
    images = []
    for number in range(10):
        image = np.random.default_rng(number).integers(0, 256, (32, 32), dtype=np.uint8)
        images.append(tmp_path / f"{number}.npy")
        np.save(images[-1], image)
    listed = write_list(tmp_path / "images.txt", [str(path) for path in images])
    texts = write_list(tmp_path / "texts.txt", trained.reports())
    words = [run, "--images", listed, "--texts", texts, "--out"]
    embed(*words, tmp_path / "before.npz")
    stopped([*words, tmp_path / "a.npz"], monkeypatch)
    if change == "content":  # with the same size and date
        date = images[3].stat().st_mtime_ns
        np.save(images[3], np.load(images[4]))
        os.utime(images[3], ns=(date, date))
    elif change == "order":
        write_list(listed, [str(path) for path in images[::-1]])
    elif change == "text":
        write_list(texts, trained.reports()[::-1])
    elif change == "weights":
        [best] = run.glob("[0-9]*.pth")
        shutil.copy(run / "last_3.pth", best)
        state = torch.load(best, weights_only=True)
        for name, value in state["model"].items():
            state["model"][name] = value * 2 if value.is_floating_point() else value
        torch.save(state, best)
    embed(*words, tmp_path / "a.npz")
    embed(*words, tmp_path / "whole.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    same = (tmp_path / "a.npz").read_bytes() == (tmp_path / "before.npz").read_bytes()
    assert same == (change == "none")
    embed(*words, tmp_path / "before.npz", status=0 if same else 2)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "a.npz"], "Nothing to embed is given"),
        (["--images", "{data}", "--out", "{data}/folder.npz"], "folder.npz', which is a folder"),
        (["--images", "{data}", "--out", "a.csv"], "allowed: a name that ends in .npz or .parquet"),
        (["--images", "{data}", "--texts", "x", "--out", "a.parquet"], "one table"),
        (["--texts", "x", "--image-column", "a", "--out", "a.npz"], "belongs to --images"),
        (["--images", "{data}", "--out", "{data}/a.csv/x.npz"], "a.csv is a file, not a folder"),
        (["--images", "{data}", "--out", "{data}/a.csv/b/x.npz"], "a.csv is a file, not a folder"),
        (["--images", "{data}/none", "--out", "a.npz"], "there is no folder or file"),
        (["--images", "{data}/empty", "--out", "a.npz"], "holds no image"),
        (["--images", "{data}/blank.txt", "--out", "a.npz"], "names no image"),
        (["--images", "{data}/a.csv", "--out", "a.npz"], "--image-column. Allowed: id, where"),
        (["--images", "{data}/a.csv", "--image-column", "wher", "--out", "a.npz"], "'where'"),
        (["--texts", "{data}/none.txt", "--out", "a.npz"], "there is no file"),
        (["--texts", "{data}/blank.txt", "--out", "a.npz"], "holds no text"),
    ],
)
def test_bad_options_are_refused_before_loading_the_model(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.npz").mkdir()
    write_list(tmp_path / "blank.txt", ["", " "])
    write_list(tmp_path / "a.csv", ["id,where", "1,a.png"])
    embed("no_run", *(word.format(data=tmp_path) for word in words), status=2)
    out, err = capsys.readouterr()
    assert (out, err[:7]) == ("", "error: ")
    assert message in err
    assert not (tmp_path / "a.npz").exists()


def test_unsuitable_runs_are_refused(
    trained: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write_list(tmp_path / "texts.txt", ["Clear lungs."])
    images = trained.data / "images"
    out = tmp_path / "a.npz"
    embed(tmp_path / "none", "--images", images, "--out", out, status=2)
    assert "there is no such run directory or checkpoint" in capsys.readouterr().err
    embed(trained(VAE), "--images", images, "--out", out, status=2)
    assert "VAE has no embed_images. It has encode" in capsys.readouterr().err
    embed(trained(SIMCLR), "--images", images, "--texts", texts, "--out", out, status=2)
    assert "SimCLR has no embed_texts. It has embed_images" in capsys.readouterr().err


def command(words: list[str]) -> None:
    """Run in a child process: the command, with parts of two batches."""
    os.chdir(ROOT)
    torch.set_num_threads(1)
    embedding_file.PART = 8
    sys.exit(cli.embed(words))


def start(words: list[str]) -> Any:
    process = PROCESSES.Process(target=command, args=(words,))
    process.start()
    return process


@pytest.mark.slow
def test_resumes_after_kill_at_any_moment(trained: Runs, tmp_path: Path) -> None:
    paths = [path for split in ("train", "validate", "test") for path in trained.images(split)]
    images = write_list(tmp_path / "images.txt", paths)
    texts = write_list(tmp_path / "texts.txt", trained.reports("train"))
    run = str(trained(CONVIRT))
    words = [run, "--images", str(images), "--texts", str(texts), *NAMES, "--out"]
    whole, out = tmp_path / "whole.npz", tmp_path / "killed.npz"
    began = 0.0
    for _ in range(2):  # the first start also loads the libraries
        whole.unlink(missing_ok=True)
        began = time.monotonic()
        process = start([*words, str(whole)])
        process.join(200)
        assert process.exitcode == 0
    seconds = time.monotonic() - began
    draws = random.Random(int.from_bytes(os.urandom(2)))
    kills = 0
    while kills < 10:
        process = start([*words, str(out)])
        process.join(draws.uniform(0, seconds))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it finished before the kill
            assert out.read_bytes() == whole.read_bytes()
            out.unlink()
            continue
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    process = start([*words, str(out)])
    process.join(200)
    assert process.exitcode == 0
    assert out.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir() if "killed" in path.name} == {"killed.npz"}


def test_the_script(trained: Runs, tmp_path: Path) -> None:
    words = [trained(SIMCLR), "--images", trained.data / "images", "--out", "a.npz", *NAMES]
    script = [sys.executable, str(ROOT / "bin" / "embed.py")]
    done = subprocess.run([*script, *map(str, words)], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "Written: a.npz\n"), done.stderr
    assert len(arrays(tmp_path / "a.npz")["path"]) == 40
    done = subprocess.run([*script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "a row for each" in done.stdout
    done = subprocess.run([*script, "x", "--outt", "y"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
