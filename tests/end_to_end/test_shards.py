from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.conftest import Run
from tests.end_to_end.test_phantom import CONSTANT_RATE, assert_same_weights
from vilmedic.preparation.shards import write_shards


@pytest.mark.slow
def test_cache_and_workers_give_the_same_run_on_shards(
    run: Run, tiny: list[str], phantom: Path, tmp_path: Path
) -> None:
    write_shards(phantom, tmp_path / "shards", samples=7)
    arguments = [
        *tiny,
        "dataset.proto=ImSeqShards",
        "dataset.mixed=3",
        *(f"dataset.{part}.root={tmp_path}/shards" for part in ("image", "seq", "label")),
        *CONSTANT_RATE,
        "trainor.seed=5",
        "trainor.epochs=1",
        "trainor.early_stop_metric=validation_loss",
        "~validator.metrics.zero_shot",
    ]
    cache = [f"dataset.image.cache={tmp_path}/cache", "trainor.num_workers=2"]
    run("bin/train.py", *arguments, f"ckpt_dir={tmp_path}/plain")
    run("bin/train.py", *arguments, *cache, f"ckpt_dir={tmp_path}/cached")
    name = "phantom-convirt/last_5.pth"
    assert_same_weights(tmp_path / "plain" / name, tmp_path / "cached" / name)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2
