from __future__ import annotations

import subprocess
import sys

import torch

from vilmedic.datasets.sample import seeded, stable_seed


def test_seed_is_the_same_in_every_process() -> None:
    code = "from vilmedic.datasets.sample import stable_seed; print(stable_seed('image', 1, 2, 3))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == stable_seed("image", 1, 2, 3)


def test_seed_depends_on_everything_it_is_given() -> None:
    seeds = {
        stable_seed("image", 1, 2, 3),
        stable_seed("sentence", 1, 2, 3),
        stable_seed("image", 2, 2, 3),
        stable_seed("image", 1, 23),
        stable_seed("image", 12, 3),
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_seeded_block_leaves_the_callers_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = torch.rand(1)
    with seeded(stable_seed("image", 0)):
        inside = torch.rand(1)
    with seeded(stable_seed("image", 0)):
        assert torch.equal(torch.rand(1), inside)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
