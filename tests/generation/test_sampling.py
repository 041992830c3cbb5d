from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conversions import WeightConversions
from tests.small_dalles import dalle_batch, save_vae, tiny_dalle
from vilmedic.device import inference
from vilmedic.generation import sampling as sampling_module
from vilmedic.generation.sampling import Sampling, TokenDrawing, draw, generate_tokens
from vilmedic.models.dalle import DALLE


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae") / "vae.pth")


def strong(vae: Path, seed: int = 0, **options: Any) -> DALLE:
    """A model whose logits depend on all previous tokens."""
    model = tiny_dalle(vae, **options).eval()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.startswith("vae."):
            parameter.data = torch.randn_like(parameter) * 0.5
    return model


def numbers(size: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.rand(size, 16, generator=random, dtype=torch.float64)


def shares(logits: Tensor, sampling: Sampling, vocabulary: int) -> Tensor:
    """Frequency of each token for evenly spaced random numbers."""
    even = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    drawn = draw(logits.expand(len(even), -1), even, sampling, vocabulary)
    return drawn.bincount(minlength=logits.shape[1]) / len(even)


def test_samples_follow_the_softmax() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5, 0.0]])
    found = shares(logits, Sampling(temperature=0.7, filter_thres=0.0), 4)
    torch.testing.assert_close(found, (logits[0] / 0.7).softmax(0), atol=1e-3, rtol=0)


def test_the_filter_threshold_counts_the_text_vocabulary() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5, 0.0]])
    found = shares(logits, Sampling(filter_thres=0.75), 8)
    assert found.nonzero().flatten().tolist() == [0, 2]
    assert shares(logits, Sampling(filter_thres=0.99), 10).tolist() == [1, 0, 0, 0]


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.8, 2), (0.9, 3), (1.0, 4)):
        found = shares(logits, Sampling(filter_thres=0.0, top_p=top_p), 4)
        assert (found > 0).sum() == kept, top_p


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(filter_thres=0.5),
        Sampling(filter_thres=0.0, temperature=0.8, top_p=0.9),
        Sampling(filter_thres=0.2, cond_scale=3.0),
    ],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"attn_types": ["axial_row", "axial_col"]}, {"rotary_emb": False, "shift_tokens": False}],
)
def test_the_cache_changes_no_token(vae: Path, options: dict[str, Any], sampling: Sampling) -> None:
    models = [strong(vae, seed, **options) for seed in (0, 1)]
    batch = dalle_batch()
    for start in (None, torch.tensor([[3, 1, 4, 1, 5]]).expand(3, -1)):
        given = (models, batch["input_ids"], batch["attention_mask"], numbers(3), sampling)
        cached = generate_tokens(*given, start=start)
        assert torch.equal(cached, generate_tokens(*given, start=start, cached=False))
        if start is not None:
            assert torch.equal(cached[:, :5], start)
    assert len(cached.unique()) > 3


def test_an_image_depends_only_on_its_random_numbers_and_report(vae: Path) -> None:
    model, batch, sampling = strong(vae), dalle_batch(), Sampling()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    together = generate_tokens([model], ids, mask, numbers(3), sampling)
    alone = generate_tokens([model], ids[1:2], mask[1:2], numbers(3)[1:2], sampling)
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together, generate_tokens([model], ids, mask, numbers(3, 1), sampling))


def test_guidance_extrapolates_the_text_logits(vae: Path) -> None:
    """The first token's logits are those without text plus a multiple of the difference to them."""
    model, batch = strong(vae), dalle_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.inference_mode():
        texts = (model.text_tokens(ids, m) for m in (mask, torch.zeros_like(mask)))
        nothing = ids[:, :0]
        with_text, without = (
            model.image_logits(model.transformer(model.embed(text, nothing))[:, -1])
            for text in texts
        )
    expected = (without + 5 * (with_text - without)).argmax(dim=1)
    greedy = Sampling(filter_thres=0.999, cond_scale=5.0)
    assert torch.equal(generate_tokens([model], ids, mask, numbers(3), greedy)[:, 0], expected)


def test_progress_counts_tokens(vae: Path) -> None:
    told: list[int] = []
    batch = dalle_batch()
    start = torch.zeros(3, 4, dtype=torch.int64)
    generate_tokens(
        [strong(vae)],
        batch["input_ids"],
        batch["attention_mask"],
        numbers(3),
        Sampling(),
        start=start,
        progress=told.append,
    )
    assert told == [3] * 12


@pytest.mark.parametrize("shared", [False, True])
def test_weights_are_converted_once_for_all_tokens_of_all_batches(vae: Path, shared: bool) -> None:
    models = [strong(vae, seed, share_input_output_emb=shared) for seed in (0, 1)]
    batch, sampling = dalle_batch(), Sampling(cond_scale=2.0)
    # Biases of the position-wise maps are small, and views on a CPU.
    with (
        WeightConversions(*models, least=2) as seen,
        TokenDrawing(models, sampling, precision="bf16") as drawing,
    ):
        for seed in (0, 1):
            tokens = drawing(batch["input_ids"], batch["attention_mask"], numbers(3, seed))
    assert len(seen.counts) == 2 * (4 * 2 + 1)
    assert set(seen.counts.values()) == {1}
    assert len(tokens.unique()) > 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batches_do_not_affect_each_other(vae: Path, precision: str) -> None:
    model, batch = strong(vae), dalle_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    start = torch.tensor([[3, 1, 4, 1, 5]]).expand(3, -1)
    options: dict[str, Any] = {"precision": precision}
    with TokenDrawing([model], Sampling(), **options) as drawing:
        drawing(ids, mask, numbers(3))
        primed = drawing(ids.flip(0), mask.flip(0), numbers(3, 1), start=start)
        smaller = drawing(ids[:2], mask[:2], numbers(2, 2))
    given = ([model], ids.flip(0), mask.flip(0), numbers(3, 1), Sampling())
    assert torch.equal(primed, generate_tokens(*given, start=start, **options))
    given = ([model], ids[:2], mask[:2], numbers(2, 2), Sampling())
    assert torch.equal(smaller, generate_tokens(*given, **options))


class Recording(TorchDispatchMode):
    """Records every operation and can replay them on the same tensors.

    Like a CUDA graph, but on a CPU: numbers computed in Python stay those of the recording.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def run(self) -> None:
        for func, args, kwargs, result in self.operations:
            fresh = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(fresh), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({}, Sampling(filter_thres=0.5)),
        ({"attn_types": ["axial_row", "axial_col"]}, Sampling(top_p=0.9, cond_scale=2.0)),
        ({"rotary_emb": False, "shift_tokens": False}, Sampling(filter_thres=0.0)),
    ],
)
def test_a_recorded_step_generates_all_later_tokens(
    vae: Path,
    options: dict[str, Any],
    sampling: Sampling,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recordings: list[Recording] = []

    def record(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        recordings.append(Recording())
        place = steps[0].place.clone()
        with recordings[-1]:
            step()
        steps[0].place.copy_(place)  # a capture does not run the operations
        return recordings[-1].run

    steps: list[Any] = []
    made = sampling_module._Steps
    monkeypatch.setattr(
        sampling_module, "_Steps", lambda *a, **k: steps.append(made(*a, **k)) or steps[0]
    )
    models = [strong(vae, seed, **options) for seed in (0, 1)]
    batch = dalle_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    # With fixed shapes, as on a GPU.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    expected = [
        generate_tokens(models, ids, mask, numbers(3, seed), sampling, precision=precision)
        for seed in (0, 1)
    ]
    steps.clear()
    monkeypatch.setattr(sampling_module, "recorded", record)
    with TokenDrawing(models, sampling, precision=precision) as drawing:
        found = [drawing(ids, mask, numbers(3, seed)) for seed in (0, 1)]
    assert len(recordings) == 1
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def pretend_cuda(model: nn.Module) -> None:
    """Move a model to a fake GPU, with tensors without values."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            fake = torch.empty(weight.shape, device="cuda")
            module._parameters[name] = nn.Parameter(fake, requires_grad=weight.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_step_has_no_waits_and_no_conversions(
    vae: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fake GPU without values: reading one would fail."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    model = tiny_dalle(vae).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        pretend_cuda(model)
        ids = torch.ones(3, 5, dtype=torch.int64, device="cuda")
        random = torch.rand(3, 16, dtype=torch.float64, device="cuda")
        with (
            TokenDrawing([model], Sampling(top_p=0.9), precision=precision) as drawing,
            inference(drawing.device, precision),
        ):
            steps = sampling_module._Steps([model], drawing.sampling, random, cached=True)
            logits = steps.streams[0].begin(ids, torch.ones_like(ids), steps.tokens[:, :0], False)
            assert logits.device.type == "cuda"
            assert logits.dtype is {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
            steps.step()
            with WeightConversions(model) as seen:
                steps.step()
    assert not seen.counts
