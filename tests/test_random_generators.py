from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from vilmedic.device import random_state, restore_random_state, seed_everything


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_state_survives_a_checkpoint_file(tmp_path: Path) -> None:
    seed_everything(5)
    draw()
    torch.save(random_state(), tmp_path / "state.pth")
    expected = [draw() for _ in range(3)]

    restore_random_state(torch.load(tmp_path / "state.pth", weights_only=True))

    assert [draw() for _ in range(3)] == expected


def test_same_seed_same_draws() -> None:
    seed_everything(2**40 + 1)
    first = draw()
    seed_everything(2**40 + 1)
    assert draw() == first
