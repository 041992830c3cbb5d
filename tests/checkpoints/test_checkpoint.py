from __future__ import annotations

import math
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from tests.full_disk import odd_file
from vilmedic.checkpoints import checkpoint
from vilmedic.checkpoints.checkpoint import improves
from vilmedic.errors import CheckpointError, ConfigError


def write(run_dir: Path, *names: str) -> None:
    for name in names:
        (run_dir / name).touch()


def save_best(
    run_dir: Path,
    score: float,
    epoch: int,
    seed: int = 1,
    *,
    metric: str = "validation_loss",
    **more: object,
) -> Path:
    path = run_dir / checkpoint.best_name(score, epoch, seed)
    state = {"model": {"w": torch.ones(1)}, "metric": metric, "score": score}
    checkpoint.save_checkpoint({**state, "epoch": epoch, "seed": seed, **more}, path)
    return path


def found(run_dir: Path, mode: str = "all", **more: str) -> list[str]:
    return [path.name for path in checkpoint.find_checkpoints(run_dir, mode, **more)]


def test_best_is_ranked_by_number_not_as_string(tmp_path: Path) -> None:
    for score, epoch, seed in ((10.0, 3, 1), (9.0, 2, 1), (1e-05, 7, 2)):
        save_best(tmp_path, score, epoch, seed)
    write(tmp_path, "last_1.pth")
    assert found(tmp_path) == ["1e-05_7_2.pth", "9.0_2_1.pth", "10.0_3_1.pth"]
    assert found(tmp_path, "best-2") == ["1e-05_7_2.pth", "9.0_2_1.pth"]
    with pytest.raises(CheckpointError, match="holds 3 checkpoints"):
        found(tmp_path, "best-4")
    with pytest.raises(ConfigError, match="allowed: best-1, best-N or all"):
        found(tmp_path, "best")


def test_the_direction_in_the_file_decides(tmp_path: Path) -> None:
    """Regardless of the name of the metric or of the file."""
    save_best(tmp_path, 3.0, 0, metric="validation_fid", better="lower")
    save_best(tmp_path, 2.0, 1, metric="validation_fid", better="lower")
    save_best(tmp_path, 2.0, 4, metric="validation_fid", better="lower", seed=2)
    renamed = save_best(tmp_path, 1.5, 2, metric="validation_fid", better="lower")
    renamed.rename(tmp_path / "9.5_2_1.pth")
    assert found(tmp_path) == ["9.5_2_1.pth", "2.0_1_1.pth", "2.0_4_2.pth", "3.0_0_1.pth"]


def test_files_without_a_direction_use_that_of_their_metric(tmp_path: Path) -> None:
    save_best(tmp_path, 0.5, 0, metric="validation_retrieval_image_to_text_median_rank")
    save_best(tmp_path, 0.7, 1, metric="validation_retrieval_image_to_text_median_rank")
    assert found(tmp_path, "best-1") == ["0.5_0_1.pth"]
    (tmp_path / "auroc").mkdir()
    save_best(tmp_path / "auroc", 0.5, 0, metric="ema_validation_zero_shot_auroc")
    save_best(tmp_path / "auroc", 0.7, 1, metric="ema_validation_zero_shot_auroc")
    assert found(tmp_path / "auroc", "best-1") == ["0.7_1_1.pth"]
    (tmp_path / "unknown").mkdir()
    save_best(tmp_path / "unknown", 0.5, 0, metric="validation_fid")
    with pytest.raises(CheckpointError, match=r"validation_fid, but it does not say.*ckpt=<file>"):
        found(tmp_path / "unknown")


def test_original_files_are_ranked_by_their_names(tmp_path: Path) -> None:
    for name in ("0.0023_32_951498.pth", "0.0107_3_951498.pth"):
        torch.save({"model": {"w": torch.ones(1)}, "config": {}}, tmp_path / name)
    assert found(tmp_path, "best-1") == ["0.0023_32_951498.pth"]
    assert found(tmp_path, "best-1", metric="validation_knn_auroc") == ["0.0107_3_951498.pth"]
    assert found(tmp_path, "best-1", rank_by="validation_knn_auroc") == ["0.0107_3_951498.pth"]


def test_original_files_use_the_metric_in_their_settings(tmp_path: Path) -> None:
    settings = {"trainor": {"early_stop_metric": "validation_loss"}}
    for name in ("0.0023_32_951498.pth", "0.0107_3_951498.pth"):
        torch.save({"model": {"w": torch.ones(1)}, "config": settings}, tmp_path / name)
    now = "validation_knn_auroc"
    assert found(tmp_path, "best-1", metric=now) == ["0.0023_32_951498.pth"]
    with pytest.raises(CheckpointError, match=rf"given '{now}'.*Allowed: validation_loss"):
        found(tmp_path, rank_by=now)


def test_scores_of_several_metrics_are_not_compared(tmp_path: Path) -> None:
    save_best(tmp_path, 2.5, 0)
    save_best(tmp_path, 0.7, 1, metric="validation_zero_shot_auroc", better="higher")
    with pytest.raises(CheckpointError) as caught:
        found(tmp_path)
    for part in (
        "validation_loss (lower is better): 2.5_0_1.pth",
        "validation_zero_shot_auroc (higher is better): 0.7_1_1.pth",
        "ensemblor.rank_by",
    ):
        assert part in str(caught.value)
    assert found(tmp_path, rank_by="validation_zero_shot_auroc") == ["0.7_1_1.pth"]
    with pytest.raises(CheckpointError, match=r"Did you mean 'validation_loss'\?"):
        found(tmp_path, rank_by="validation_los")


def test_ranking_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_best(tmp_path, 0.5, 1)
    mapped: list[object] = []
    load = torch.load

    def watched(*arguments: object, **options: object) -> object:
        mapped.append(options["mmap"])
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", watched)
    assert checkpoint.read_best(path).score == 0.5
    assert mapped == [True]


@pytest.mark.parametrize("score", [1.661213994026184, 1e-07, 123456789.25, -0.5, 3e20])
def test_file_name_holds_the_exact_score(score: float) -> None:
    match = checkpoint.NAME.match(checkpoint.best_name(score, epoch=4, seed=406122))
    assert match is not None
    assert (float(match["score"]), match["epoch"], match["seed"]) == (score, "4", "406122")


def test_no_scored_checkpoint_names_the_last_one(tmp_path: Path) -> None:
    write(tmp_path, "last_7.pth")

    with pytest.raises(CheckpointError, match=r"ckpt=last_7\.pth"):
        found(tmp_path, "best-1")


def test_locate_prefers_the_run_directory_and_suggests_a_near_name(tmp_path: Path) -> None:
    write(tmp_path, "last_12.pth")

    assert checkpoint.locate("last_12.pth", tmp_path) == tmp_path / "last_12.pth"
    assert checkpoint.locate(str(tmp_path / "last_12.pth"), Path("elsewhere")).name == "last_12.pth"
    with pytest.raises(CheckpointError, match=r"Did you mean 'last_12\.pth'"):
        checkpoint.locate("lst_12.pth", tmp_path)


def test_saved_state_is_read_back(tmp_path: Path) -> None:
    state = {"model": {"w": torch.arange(3.0)}, "progress": {"epoch": 2, "best": None}}

    checkpoint.save_checkpoint(state, tmp_path / "last_1.pth")
    loaded = checkpoint.load_checkpoint(tmp_path / "last_1.pth")

    assert torch.equal(loaded["model"]["w"], torch.arange(3.0))
    assert loaded["progress"] == {"epoch": 2, "best": None}
    assert [path.name for path in tmp_path.iterdir()] == ["last_1.pth"]


def test_crash_while_writing_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last_1.pth"
    checkpoint.save_checkpoint({"model": {"w": torch.zeros(1)}}, path)

    def crash(descriptor: int) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk is full"):
        checkpoint.save_checkpoint({"model": {"w": torch.ones(1)}}, path)

    assert checkpoint.load_checkpoint(path)["model"]["w"].item() == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["last_1.pth"]


def test_truncated_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "last_1.pth"
    checkpoint.save_checkpoint({"model": {"w": torch.rand(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-500])

    with pytest.raises(CheckpointError, match=r"last_1\.pth: not a readable checkpoint"):
        checkpoint.load_checkpoint(path)


def test_pickled_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(os.system))

    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        checkpoint.load_checkpoint(path)


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    state = {"model": {"weight": torch.zeros(2, 4), "scale": torch.zeros(1)}}

    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_weights(model, state, tmp_path / "x.pth")

    text = str(caught.value)
    assert "weights that the file lacks (1): bias" in text
    assert "weights that the model does not have (1): scale" in text
    assert "weight is (2, 4), the model wants (2, 3)" in text


def test_networks_that_need_state_dict_metadata_load(tmp_path: Path) -> None:
    given, model = (models.mnasnet0_5(weights=None) for _ in range(2))
    path = tmp_path / "x.pth"
    checkpoint.save_checkpoint({"model": given.state_dict()}, path)
    checkpoint.load_weights(model, checkpoint.load_checkpoint(path), path)
    name = "layers.0.weight"
    assert torch.equal(model.state_dict()[name], given.state_dict()[name])


def test_latest_state_and_its_name(tmp_path: Path) -> None:
    write(tmp_path, "last_1.pth", "last_2.pth", "0.5_9_3.pth")
    os.utime(tmp_path / "last_1.pth", (9, 9))
    os.utime(tmp_path / "last_2.pth", (5, 5))
    assert checkpoint.newest(tmp_path) == tmp_path / "last_1.pth"
    assert checkpoint.newest(tmp_path, seed=2) == tmp_path / "last_2.pth"
    assert checkpoint.newest(tmp_path, seed=7) is None
    assert checkpoint.locate("last", tmp_path).name == "last_1.pth"
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="there is no file 'last'"):
        checkpoint.locate("last", tmp_path / "empty")


def test_leftovers_of_a_killed_write_are_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "last_1.pth"
    (tmp_path / ".last_1.pth.tmp").write_bytes(b"half")
    checkpoint.save_checkpoint({"model": {}}, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last_1.pth"]


def test_averaged_weights_are_loaded_if_requested(tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False)
    state = {"model": {"weight": torch.ones(1, 1)}, "ema": {"weight": torch.full((1, 1), 2.0)}}
    checkpoint.load_weights(model, state, tmp_path / "x.pth", ema=True)
    assert model.weight.item() == 2
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        checkpoint.load_weights(model, {**state, "ema": None}, tmp_path / "x.pth", ema=True)


def test_a_missing_run_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "convirt_mimic").mkdir()
    missing = tmp_path / "convirt_mimc"
    expected = "there is no such run directory.*Did you mean 'convirt_mimic'"
    with pytest.raises(CheckpointError, match=expected):
        checkpoint.find_checkpoints(missing, "best-1")
    with pytest.raises(CheckpointError, match=expected):
        checkpoint.locate("last", missing)
    with pytest.raises(CheckpointError, match=r"nothing/x: there is no such run directory"):
        checkpoint.locate("last_0.pth", tmp_path / "nothing" / "x")


def test_the_previous_state_is_kept(tmp_path: Path) -> None:
    last, previous = tmp_path / "last_1.pth", tmp_path / "previous_1.pth"
    for step in range(3):
        kept = (last, previous)
        checkpoint.save_checkpoint({"model": {"w": torch.full((1,), float(step))}}, last, kept)
    assert checkpoint.load_checkpoint(last)["model"]["w"].item() == 2
    assert checkpoint.load_checkpoint(previous)["model"]["w"].item() == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_1.pth", "previous_1.pth"]


def test_the_previous_state_is_a_hard_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last, previous = tmp_path / "last_1.pth", tmp_path / "previous_1.pth"
    checkpoint.save_checkpoint({"model": {}}, last)
    number = last.stat().st_ino
    checkpoint.save_checkpoint({"model": {}}, last, (last, previous))
    assert previous.stat().st_ino == number

    def crash(source: Path, target: Path) -> None:
        raise OSError("the power is gone")

    number = last.stat().st_ino
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power"):
        checkpoint.save_checkpoint({"model": {"w": torch.ones(1)}}, last, (last, previous))
    assert last.stat().st_ino == number, "the latest state always exists"


def test_the_previous_state_is_kept_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    last, previous = tmp_path / "last_1.pth", tmp_path / "previous_1.pth"
    other = tmp_path / "0.5_0_1.pth"
    for step, kept in enumerate((other, last, last, other)):
        state = {"model": {"w": torch.full((1,), float(step))}}
        checkpoint.save_checkpoint(state, last, (kept, previous))
        if step == 0:
            checkpoint.save_checkpoint(state, other)
        elif step < 3:
            assert checkpoint.load_checkpoint(previous)["model"]["w"].item() == step - 1
    assert not previous.exists(), "a state of another training is worse than none"


def test_an_unsyncable_folder_does_not_fail_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example on Windows, where folders cannot be opened, and on some network shares."""
    sync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    checkpoint.save_checkpoint({"model": {}}, tmp_path / "last_1.pth")
    opened = os.open

    def no_folder(path: object, *arguments: object, **options: object) -> int:
        if Path(str(path)).is_dir():
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", no_folder)
    checkpoint.save_checkpoint({"model": {}}, tmp_path / "last_2.pth")
    assert (tmp_path / "last_2.pth").stat().st_size > 0


def test_similar_file_names_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, "last_3.pth", "last_3.pth.bak", "last_best.pth", "last_03.pth", "last_-1.pth")
    write(tmp_path, "1.2.3_0_1.pth", "._0_1.pth", "0.5_1_2 (1).pth", "nan_0_1.pth", "last_².pth")
    write(tmp_path, "0.5_²_1.pth", "last_٣.pth", "0.25_4_3.pth", "previous_3.pth")
    assert [path.name for path in checkpoint.scored(tmp_path)] == ["0.25_4_3.pth"]
    assert checkpoint.newest(tmp_path) == tmp_path / "last_3.pth"
    assert checkpoint.newest_seed(tmp_path) == 3
    names = [path.name for path in checkpoint.states(tmp_path, 3)]
    assert names == ["last_3.pth", "previous_3.pth"]
    write(tmp_path, "state_9_3.pth", "state_20_3.pth", "state_30_13.pth", "state_x_3.pth")
    kept = [path.name for path in checkpoint.states(tmp_path, 3)[2:]]
    assert kept == ["state_20_3.pth", "state_9_3.pth"]


@pytest.mark.parametrize("ckpt", ["x" * 300, "a\nb", "nul\0", ""])
def test_invalid_file_names_are_an_error(tmp_path: Path, ckpt: str) -> None:
    with pytest.raises(CheckpointError, match="ckpt: "):
        checkpoint.locate(ckpt, tmp_path)


@pytest.mark.parametrize("kind", ["a folder", "a named pipe", "a socket", "a device"])
def test_special_files_are_refused_at_once(tmp_path: Path, kind: str) -> None:
    """Opening a pipe without a writer would block."""
    path = odd_file(tmp_path / "x.pth", kind)
    with pytest.raises(CheckpointError, match=f"ckpt: .* is {kind}, not a checkpoint"):
        checkpoint.locate(str(path), tmp_path)
    with pytest.raises(CheckpointError, match=f"is {kind}, not a checkpoint"):
        checkpoint.load_checkpoint(path)


@pytest.mark.parametrize(
    "more",
    [{"config": [1]}, {"progress": 3}, {"ema": [torch.ones(1)]}, {"ema": {"w": "x"}}],
    ids=str,
)
def test_parts_of_wrong_types_are_an_error(tmp_path: Path, more: dict[str, Any]) -> None:
    path = tmp_path / "x.pth"
    checkpoint.save_checkpoint({"model": {"w": torch.zeros(1)}, **more}, path)
    with pytest.raises(CheckpointError, match=r"x\.pth: is damaged"):
        checkpoint.load_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [{"networks": torch.zeros(0)}, {"networks": {"cnn": 3}}, {"networks": {3: {}}}, {"data": "x"}],
    ids=str,
)
def test_model_metadata_types_are_validated(tmp_path: Path, change: dict[str, Any]) -> None:
    state = {"model": {"w": torch.zeros(1)}, **change}
    checkpoint.save_checkpoint(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: is damaged: its '(networks|data)'"):
        checkpoint.load_checkpoint(tmp_path / "a.pth")


def test_a_score_improves_in_its_direction() -> None:
    assert improves(1.0, 2.0, "lower")
    assert not improves(2.0, 2.0, "lower")
    assert not improves(10.0, 9.0, "lower")
    assert improves(0.9, 0.8, "higher")
    assert not improves(0.8, 0.8, "higher")
    assert improves(1.0, None, "lower")


@pytest.mark.parametrize("score", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("better", ["lower", "higher"])
def test_only_finite_scores_improve(score: float, better: str) -> None:
    assert not improves(score, None, better)
    assert not improves(score, 0.5, better)
