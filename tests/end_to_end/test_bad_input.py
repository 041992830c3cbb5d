from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Run


@pytest.fixture
def broken(phantom: Path, tmp_path: Path, tiny: list[str]) -> tuple[Path, list[str]]:
    """A copy of the data set to damage, with the arguments for it."""
    root = tmp_path / "data"
    shutil.copytree(phantom, root)
    sections = [f"dataset.{part}.root={root}" for part in ("image", "seq", "label")]
    rest = [f"ckpt_dir={tmp_path}/ckpt", "name=x", "trainor.epochs=1", "trainor.seed=0"]
    return root, [*tiny, *sections, *rest]


def complaint(run: Run, arguments: list[str]) -> str:
    done = run("bin/train.py", *arguments, status=2)
    assert "Traceback" not in done.stderr + done.stdout
    return done.stderr


def test_misspelt_keys_are_reported_together(run: Run, tiny: list[str]) -> None:
    text = complaint(run, [*tiny, "trainor.batchsize=3", "model.los.tau=0.2"])
    assert "trainor.batchsize" in text
    assert "'trainor.batch_size'" in text
    assert "model.los" in text
    assert "command line" in text


def test_missing_image_names_file_and_line(run: Run, broken: tuple[Path, list[str]]) -> None:
    root, arguments = broken
    first = (root / "train.image.tok").read_text().splitlines()[4]
    (root / "images" / first).unlink()

    text = complaint(run, arguments)

    assert "train.image.tok:5" in text
    assert first in text


def test_truncated_image_names_file_and_line(run: Run, broken: tuple[Path, list[str]]) -> None:
    root, arguments = broken
    path = root / "images" / (root / "train.image.tok").read_text().splitlines()[4]
    path.write_bytes(path.read_bytes()[:200])

    text = complaint(run, arguments)

    assert "train.image.tok:5" in text
    assert path.name in text


def test_mismatched_counts_name_both_files(run: Run, broken: tuple[Path, list[str]]) -> None:
    root, arguments = broken
    lines = (root / "train.impression.tok").read_text().splitlines()
    (root / "train.impression.tok").write_text("\n".join(lines[:-1]) + "\n")

    text = complaint(run, arguments)

    assert "train.image.tok" in text
    assert "train.impression.tok" in text
    assert "48" in text
    assert "47" in text


def test_empty_report_names_file_and_line(run: Run, broken: tuple[Path, list[str]]) -> None:
    root, arguments = broken
    lines = (root / "validate.impression.tok").read_text().splitlines()
    lines[2] = ""
    (root / "validate.impression.tok").write_text("\n".join(lines) + "\n")

    assert "validate.impression.tok:3" in complaint(run, arguments)


def test_non_finite_loss_stops_and_names_the_samples(
    run: Run, broken: tuple[Path, list[str]]
) -> None:
    _, arguments = broken
    text = complaint(
        run,
        [
            *arguments,
            "trainor.optim_params={lr: 1000, weight_decay: 1000}",  # weights explode
            "trainor.epochs=3",
            "trainor.lr_decay=null",
            "trainor.max_bad_steps=2",
        ],
    )
    assert "2 steps in a row" in text
    assert "train.image.tok:" in text


def test_batch_larger_than_the_split_is_an_error(run: Run, broken: tuple[Path, list[str]]) -> None:
    _, arguments = broken
    text = complaint(run, [*arguments, "trainor.batch_size=64"])
    assert "48 samples" in text
    assert "trainor.batch_size=64" in text


def test_checkpoint_of_another_model_is_an_error(run: Run, broken: tuple[Path, list[str]]) -> None:
    _, arguments = broken
    run("bin/train.py", *arguments)
    text = complaint(
        run,
        [*arguments, "ckpt=last_0.pth", "trainor.epochs=2", "model.projection.projection_dim=8"],
    )
    assert "last_0.pth" in text
    assert "the model wants" in text


def test_an_invalid_ckpt_dir_is_an_error(run_here: Run, tiny: list[str]) -> None:
    done = run_here("bin/train.py", *tiny, "ckpt_dir=/dev/null", status=2)
    assert done.stderr.startswith("error: ckpt_dir: the folder /dev/null/phantom-convirt cannot be")


def test_the_smallest_numbers_train(run_here: Run, tiny: list[str], tmp_path: Path) -> None:
    """The lower bounds of the trainor's keys."""
    least = [
        *("seed=0", "ema=0", "num_workers=0", "eval_start=0", "grad_accu=1", "keep=1"),
        *("log_every=1", "max_bad_steps=1"),
    ]
    rest = [f"ckpt_dir={tmp_path}", "name=x", *(f"trainor.{word}" for word in least)]
    run_here("bin/train.py", *tiny, *rest, "trainor.epochs=1")
    assert (tmp_path / "x" / "last_0.pth").is_file()
    run_here("bin/train.py", *tiny, *rest, "trainor.epochs=0", "name=none")
    assert (tmp_path / "none" / "config_0.yml").is_file()
