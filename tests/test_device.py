from __future__ import annotations

import pytest
import torch

from tests.conversions import WeightConversions
from vilmedic.device import (
    autocast,
    block_numbers,
    constants,
    float32_products,
    inference,
    move,
    pick_device,
    pick_precision,
    random_state,
    uses_tf32,
    weights_converted_once,
)
from vilmedic.errors import ConfigError


def test_named_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"given 'gpu', allowed: cpu, cuda, cuda:N, mps or null"):
        pick_device("gpu")
    with pytest.raises(ConfigError, match="this machine has"):
        pick_device(f"cuda:{torch.cuda.device_count()}")


def test_precision_of_the_forward_pass() -> None:
    layer, x = torch.nn.Linear(4, 4), torch.rand(2, 4)
    with autocast(torch.device("cpu"), "bf16"):
        assert layer(x).dtype is torch.bfloat16
    with autocast(torch.device("cpu"), "fp32"):
        assert layer(x).dtype is torch.float32


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_weight_is_converted_once_for_many_forward_passes(precision: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].requires_grad_(False)
    x, device = torch.rand(2, 4), torch.device("cpu")
    with autocast(device, precision), torch.no_grad():
        expected = model(x)
    with WeightConversions(model) as seen, weights_converted_once(device, precision, model):
        for _ in range(3):
            with inference(device, precision):
                found = model(x)
    assert torch.equal(found, expected)
    assert sorted(seen.counts.values()) == [1, 1, 1, 1]
    assert [weight.requires_grad for weight in model.parameters()] == [True, True, False, False]


def test_converted_weights_are_released_at_the_end() -> None:
    model, x, device = torch.nn.Linear(4, 4), torch.rand(2, 4), torch.device("cpu")
    found = []
    for _ in range(2):
        with weights_converted_once(device, "bf16", model), inference(device, "bf16"):
            found.append(model(x))
        with torch.no_grad():
            model.weight.add_(1)
    assert not torch.equal(*found)


def test_float32_is_computed_in_inference_mode() -> None:
    model, device = torch.nn.Linear(4, 4), torch.device("cpu")
    with weights_converted_once(device, "fp32", model), inference(device, "fp32"):
        found = model(torch.rand(2, 4))
    assert found.is_inference()
    assert found.dtype is torch.float32


def test_only_tensors_move() -> None:
    moved = move({"index": torch.arange(2), "names": ["a", "b"]}, torch.device("meta"))
    assert moved["index"].device.type == "meta"
    assert moved["names"] == ["a", "b"]


def test_values_that_determine_shapes_stay_on_the_host() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    batch = {"word_ids": torch.tensor([[0, 1], [0, -1]]), "images_mask": mask}
    moved = move(batch, torch.device("meta"))
    assert moved["word_ids"].device.type == "meta"
    assert moved["host_word_count"] == [2, 1]
    assert moved["host_image_count"] == [2, 1]
    assert move(batch, torch.device("cpu")).keys() == batch.keys()


def test_constants_are_made_once_for_each_device() -> None:
    made = []

    def make(number: float) -> tuple[torch.Tensor, ...]:
        made.append(number)
        return (torch.full((2,), number),)

    with torch.inference_mode():
        [first] = constants(make, 3.0, like=torch.zeros(1))
    for _ in range(3):
        assert constants(make, 3.0, like=torch.zeros(5))[0] is first
    assert not first.is_inference(), "training saves it"
    assert constants(make, 4.0, like=torch.zeros(1))[0].tolist() == [4.0, 4.0]
    assert constants(make, 3.0, like=torch.zeros(1, device="meta"))[0].device.type == "meta"
    assert made == [3.0, 4.0, 3.0]


def test_each_process_uses_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_precision_follows_the_gpu_or_the_resumed_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for capable, chosen in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, one=capable: one
        )
        assert pick_precision("auto", gpu) == chosen
        assert pick_precision("auto", gpu, kept="fp16") == "fp16"
        assert pick_precision("fp32", gpu, kept="bf16") == "fp32"
        assert pick_precision("auto", cpu) == "fp32"
        assert pick_precision("auto", cpu, kept="bf16") == "bf16"
        assert pick_precision("auto", gpu, kept="auto") == chosen


def products() -> tuple[bool, bool, bool]:
    backends = torch.backends
    return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_enabled_only_inside_the_context(tf32: bool) -> None:
    before, gpu, cpu = products(), torch.device("cuda", 1), torch.device("cpu")
    with float32_products(gpu, tf32=tf32):
        assert products() == (tf32,) * 3
        with float32_products(gpu, tf32=False):
            assert products() == (False,) * 3
        assert products() == (tf32,) * 3
    assert products() == before
    with float32_products(cpu, tf32=tf32):
        assert products() == before
    assert uses_tf32(gpu, tf32) is tf32
    assert not uses_tf32(cpu, tf32)


def test_block_size_depends_on_the_device() -> None:
    assert block_numbers(torch.device("cpu"), 100) == 100
    assert block_numbers(torch.device("cuda", 1), 100) == 2**27


@pytest.mark.parametrize("name", ["cuda:²", "cuda:", "cuda:-1", "cpu:0", "cuda:9999", "cuda:1 "])
def test_unknown_device_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="allowed: cpu, cuda, cuda:N, mps or null"):
        pick_device(name)


def test_a_numbered_gpu_becomes_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generator state and pinned memory are those of the current device."""
    current: list[torch.device] = []
    states = [torch.full((16,), number, dtype=torch.uint8) for number in range(3)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: states[current[-1].index])
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 1)]
    assert torch.equal(random_state()["cuda"][0], states[1])
    pick_device("cpu")
    pick_device("cuda")
    pick_device(None)
    assert current == [torch.device("cuda", 1)]
    with pytest.raises(ConfigError, match="3 CUDA devices"):
        pick_device("cuda:3")
    assert len(current) == 1
