from __future__ import annotations

import pytest
import torch

from vilmedic.device import autocast, move, pick_device
from vilmedic.errors import ConfigError


def test_named_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"given 'gpu', allowed: cpu, cuda, cuda:N or null"):
        pick_device("gpu")
    with pytest.raises(ConfigError, match="this machine has"):
        pick_device(f"cuda:{torch.cuda.device_count()}")


def test_precision_of_the_forward_pass() -> None:
    layer, x = torch.nn.Linear(4, 4), torch.rand(2, 4)
    with autocast(torch.device("cpu"), "bf16"):
        assert layer(x).dtype is torch.bfloat16
    with autocast(torch.device("cpu"), "fp32"):
        assert layer(x).dtype is torch.float32


def test_only_tensors_move() -> None:
    moved = move({"index": torch.arange(2), "names": ["a", "b"]}, torch.device("meta"))
    assert moved["index"].device.type == "meta"
    assert moved["names"] == ["a", "b"]


def test_each_process_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device(None) == pick_device("cuda") == torch.device("cuda", 1)
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="takes the GPU of its own number"):
        pick_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="Lower --nproc-per-node"):
        pick_device(None)


@pytest.mark.parametrize("name", ["cuda:²", "cuda:", "cuda:-1", "cpu:0", "cuda:9999", "cuda:1 "])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="allowed: cpu, cuda, cuda:N or null"):
        pick_device(name)
