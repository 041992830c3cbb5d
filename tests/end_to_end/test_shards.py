from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.conftest import Run
from tests.end_to_end.test_phantom import CONSTANT_RATE, assert_same_weights


@pytest.mark.slow
def test_shards_cache_workers_and_a_restart_give_the_same_run(
    run: Run, tiny: list[str], phantom: Path, tmp_path: Path
) -> None:
    done = run("data/make_shards.py", phantom, tmp_path / "shards", "--samples", 7)
    assert "train: 48 lines with 48 images in 7 shards" in done.stdout
    arguments = [
        *tiny,
        "dataset.proto=ImSeqShards",
        "dataset.mixed=3",
        *(f"dataset.{part}.root={tmp_path}/shards" for part in ("image", "seq", "label")),
        *CONSTANT_RATE,
        "trainor.seed=5",
    ]
    cache = [f"dataset.image.cache={tmp_path}/cache", "trainor.num_workers=2"]
    run("bin/train.py", *arguments, *cache, f"ckpt_dir={tmp_path}/whole", "trainor.epochs=2")
    parts = [*arguments, f"ckpt_dir={tmp_path}/parts"]
    run("bin/train.py", *parts, "trainor.epochs=1")
    run("bin/train.py", *parts, "trainor.epochs=2", "ckpt=last_5.pth")
    name = "phantom-convirt/last_5.pth"
    assert_same_weights(tmp_path / "whole" / name, tmp_path / "parts" / name)
