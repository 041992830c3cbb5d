from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tests.losses import reference
from tests.losses.inputs import assert_same_gradients, pairs
from tests.losses.targets import HASHES, agreements, cosines, slow_both_ways, vectors
from vilmedic.device import float32_products
from vilmedic.errors import ConfigError
from vilmedic.losses import gloria_local
from vilmedic.losses.gloria import GLoRIALoss, gloria_global_loss, gloria_local_loss
from vilmedic.losses.gloria_local import (
    ProductBits,
    SimilaritySettings,
    attention_maps,
    block_shape,
    local_similarity,
)

LENGTHS = (6, 3, 1, 2, 6, 4, 5)
TEMPERATURES = {"temp1": 4.0, "temp2": 5.0}


def features(
    images: int = 7,
    lengths: tuple[int, ...] = LENGTHS,
    padding: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Regions [I, 8, 3, 4], words [J, L, 8] of different lengths, and their mask."""
    generator = torch.Generator().manual_seed(0)
    regions = torch.randn(images, 8, 3, 4, generator=generator, dtype=torch.float64)
    words = torch.randn(len(lengths), max(lengths), 8, generator=generator, dtype=torch.float64)
    words = functional.pad(words, (0, 0, 0, padding), value=9.0)
    mask = torch.arange(words.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    return regions.to(dtype).requires_grad_(), words.to(dtype).requires_grad_(), mask


def similarity_and_gradients(
    regions: Tensor, words: Tensor, mask: Tensor, block_size: int = 4096, aggregation: str = "sum"
) -> list[Tensor]:
    """The similarities, and the gradients of a fixed random weighting of them."""
    similarity = local_similarity(
        regions,
        words,
        mask,
        **TEMPERATURES,
        aggregation=aggregation,  # type: ignore[arg-type]
        block_size=block_size,
    )
    return [similarity, *weighted_gradients(similarity, regions, words)]


def weighted_gradients(similarity: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(similarity.shape, generator=generator, dtype=torch.float64)
    return torch.autograd.grad(similarity, inputs, weights.to(similarity))


@pytest.mark.parametrize("aggregation", ["sum", "max"])
@pytest.mark.parametrize("images", [7, 4])
def test_local_similarity_equals_the_reference(images: int, aggregation: str) -> None:
    regions, words, mask = features(images)
    expected = reference.local_similarity(
        regions.flatten(2), words, mask, **TEMPERATURES, aggregation=aggregation
    )
    wanted = [expected, *weighted_gradients(expected, regions, words)]
    for block_size in (1, 3, 5, 16, 4096):
        got = similarity_and_gradients(regions, words, mask, block_size, aggregation)
        for value, slow in zip(got, wanted, strict=True):
            torch.testing.assert_close(value, slow, rtol=0, atol=1e-10)


@pytest.mark.parametrize("aggregation", ["sum", "max"])
def test_masked_regions_have_no_effect(aggregation: Any) -> None:
    regions, words, mask = features()
    counted = torch.rand(7, 12, generator=torch.Generator().manual_seed(2)) < 0.5
    counted[:, 0] = True
    rows = [
        reference.local_similarity(
            regions.flatten(2)[row : row + 1, :, counted[row]],
            words,
            mask,
            **TEMPERATURES,
            aggregation=aggregation,
        )
        for row in range(7)
    ]
    expected = torch.cat(rows)
    wanted = [expected, *weighted_gradients(expected, regions, words)]
    for block_size in (1, 5, 4096):
        found = local_similarity(
            regions,
            words,
            mask,
            **TEMPERATURES,
            aggregation=aggregation,
            block_size=block_size,
            region_mask=counted,
        )
        got = [found, *weighted_gradients(found, regions, words)]
        for value, slow in zip(got, wanted, strict=True):
            torch.testing.assert_close(value, slow, rtol=0, atol=1e-10)
    assert not got[1].flatten(2).transpose(1, 2)[~counted].any()


def test_an_image_mask_masks_its_regions() -> None:
    regions, words, mask = features()
    images = regions.detach().unflatten(3, (2, 2)).permute(0, 1, 3, 2, 4)  # two of 3 x 2 regions
    shown = torch.tensor([[True, row % 2 == 0] for row in range(7)])
    each = shown.repeat_interleave(6, dim=1)
    found = local_similarity(images, words, mask, **TEMPERATURES, region_mask=shown)
    flat = local_similarity(images.flatten(2), words, mask, **TEMPERATURES, region_mask=each)
    assert torch.equal(found, flat)


@pytest.mark.parametrize("temp0", [0.1, 3.0])
def test_temp0_controls_the_softmax_over_words(temp0: float) -> None:
    regions, words, mask = features()
    expected = reference.local_similarity(
        regions.flatten(2), words, mask, **TEMPERATURES, temp0=temp0
    )
    got = local_similarity(regions, words, mask, **TEMPERATURES, temp0=temp0)
    wanted = [expected, *weighted_gradients(expected, regions, words)]
    for value, slow in zip([got, *weighted_gradients(got, regions, words)], wanted, strict=True):
        torch.testing.assert_close(value, slow, rtol=0, atol=1e-10)


def test_blocks_of_several_images_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block size of an accelerator."""
    regions, words, mask = features()
    wanted = similarity_and_gradients(regions, words, mask)
    monkeypatch.setattr("vilmedic.losses.gloria_local.block_shape", lambda *_: (2, 3))
    for block_size in (6, 4096):
        got = similarity_and_gradients(regions, words, mask, block_size)
        for value, single in zip(got, wanted, strict=True):
            torch.testing.assert_close(value, single, rtol=0, atol=1e-12)


def test_gradient_equals_finite_differences() -> None:
    regions, words, mask = features(images=2, lengths=(3, 1))

    def compute(regions: Tensor, words: Tensor) -> Tensor:
        return local_similarity(regions, words, mask, **TEMPERATURES, block_size=2)

    assert torch.autograd.gradcheck(compute, (regions, words))


def test_mask_may_have_holes() -> None:
    regions, words, _ = features()
    mask = torch.rand(words.shape[:2], generator=torch.Generator().manual_seed(2)) < 0.6
    mask[:, 2] = True
    got = local_similarity(regions, words, mask, **TEMPERATURES)
    slow = reference.local_similarity(regions.flatten(2), words, mask, **TEMPERATURES)
    torch.testing.assert_close(got, slow, rtol=0, atol=1e-10)


def test_float32_equals_the_published_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    regions = torch.randn(6, 96, 19, 19, generator=generator, requires_grad=True)
    words = torch.randn(6, 12, 96, generator=generator, requires_grad=True)
    lengths = [12, 7, 1, 12, 9, 4]
    mask = torch.arange(12) < torch.tensor(lengths).unsqueeze(1)
    terms = gloria_local_loss(regions, words, mask, **TEMPERATURES, temp3=10.0)
    peer = reference.local_loss_report_by_report(regions, words, lengths)
    exact = [tensor.detach().double().requires_grad_() for tensor in (regions, words)]
    expected = reference.local_loss_report_by_report(*exact, lengths)
    assert sum(terms).item() == pytest.approx(expected.item(), rel=1e-6)
    got = torch.autograd.grad(sum(terms), (regions, words))
    loop = torch.autograd.grad(peer, (regions, words))
    for gradient, other, wanted in zip(
        got, loop, torch.autograd.grad(expected, exact), strict=True
    ):
        assert (gradient - wanted).norm() < 2e-6 * wanted.norm()
        assert (gradient - other).norm() < 4e-6 * wanted.norm()


def as_tf32(values: Tensor) -> Tensor:
    """Round to the 10-bit mantissa that a GPU uses for float32 factors in TF32."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("size", [0.2, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_accurate_with_gpu_products(
    size: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores from split factors, TF32, and the Gram matrix of regions in its own precision."""
    generator = torch.Generator().manual_seed(0)
    words = size * torch.randn(8, 12, 256, generator=generator)
    regions = (size * torch.randn(8, 256, 49, generator=generator)).to(dtype).float()
    mask = torch.ones(8, 12, dtype=torch.bool)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        given = [one.to(dtype).requires_grad_() for one in (regions, words)]
        terms = gloria_local_loss(*given, mask, **TEMPERATURES, temp3=10.0)  # type: ignore[misc]
        return torch.autograd.grad(sum(terms), given)

    def worst() -> float:
        pairs = zip(gradients(torch.float32), wanted, strict=True)
        return max(float((one - exact).norm() / exact.norm()) for one, exact in pairs)

    def multiply(left: Tensor, right: Tensor, narrow: bool = False) -> Tensor:
        return plain(left, right, True) if narrow else plain(as_tf32(left), as_tf32(right))

    wanted = gradients(torch.float64)
    plain = gloria_local.multiply
    monkeypatch.setattr(gloria_local, "multiply", multiply)
    bits = ProductBits(narrow=dtype == torch.bfloat16, split=True)
    monkeypatch.setattr(gloria_local, "product_bits", lambda *_: bits)
    assert 1e-5 < worst() < 1e-3
    if size == 1.0:  # the case that needs the split
        bits = bits._replace(split=False)
        assert worst() > 1e-3


@pytest.mark.parametrize(("dtype", "parts"), [(torch.bfloat16, 2), (torch.float32, 3)])
def test_gpu_uses_larger_blocks_and_16_bit_products(dtype: torch.dtype, parts: int) -> None:
    """On a fake GPU: products of 16-bit factors are summed in float32."""
    seen: list[tuple[torch.dtype, int]] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func in (torch.ops.aten.bmm.dtype, torch.ops.aten.bmm.default):
                seen.append((args[0].dtype, args[0].shape[2]))
            return func(*args, **kwargs or {})

    with FakeTensorMode(allow_non_fake_inputs=True), Products():
        regions = torch.randn(64, 8, 361, device="cuda", dtype=dtype)
        words = torch.randn(32, 30, 8, device="cuda")
        mask = torch.ones(32, 30, dtype=torch.bool, device="cuda")
        settings = SimilaritySettings(1.0, 4.0, 5.0, "sum", 4096, [30] * 32, [30] * 32)
        upstream = torch.ones(64, 32, device="cuda")
        with float32_products(regions.device, tf32=True):
            bits = gloria_local.product_bits(regions, torch.float32)
        gradients = gloria_local._gradients(upstream, settings, bits, regions, words, mask)
        with float32_products(regions.device, tf32=False):
            assert gloria_local.product_bits(regions, torch.float32) == (False, False)
    assert [one.dtype for one in gradients] == [dtype, torch.float32]
    # Two groups of 16 reports, each with all images at once.
    assert seen.count((torch.bfloat16, parts * 8)) == 2
    narrow = sum(one == torch.bfloat16 for one, _ in seen) - 2
    assert narrow == (1 + 2 + 1 if dtype == torch.bfloat16 else 0)
    assert block_shape(settings, torch.empty(64, 8, 361)) == (16, 1)
    assert block_shape(settings, torch.empty(64, 8, 361, device="meta")) == (16, 256)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_computed_in_float32(autocast: bool) -> None:
    regions, words, mask = features(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = similarity_and_gradients(regions, words, mask)
    exact = [tensor.detach().double().requires_grad_() for tensor in (regions, words)]
    wanted = similarity_and_gradients(*exact, mask)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=0, atol=1e-5)
    for gradient, expected in zip(got[1:], wanted[1:], strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - expected).norm() < 0.005 * expected.norm()


def test_autocast_does_not_lower_the_precision() -> None:
    regions, words, mask = features(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = similarity_and_gradients(regions, words, mask, block_size=3)
    wanted = similarity_and_gradients(regions, words, mask, block_size=3)
    for value, expected in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_padding_has_no_effect() -> None:
    for value, padded in zip(
        similarity_and_gradients(*features()),
        similarity_and_gradients(*features(padding=5)),
        strict=True,
    ):
        length = value.shape[1]
        torch.testing.assert_close(padded[:, :length], value, rtol=0, atol=1e-12)
        assert not padded[:, length:].any()


def test_zero_vectors_give_no_similarity_and_no_gradient() -> None:
    regions, words, mask = (tensor.detach().clone() for tensor in features())
    regions[0], words[1, 0] = 0, 0
    regions, words = regions.requires_grad_(), words.requires_grad_()
    similarity, *gradients = similarity_and_gradients(regions, words, mask)
    torch.testing.assert_close(similarity[0], torch.tensor(LENGTHS).double().log())
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][0].any()


def test_block_size_bounds_memory_kept_for_backward() -> None:
    regions, words, mask = features(images=16, lengths=(4,) * 16, dtype=torch.float32)
    inputs = {tensor.data_ptr() for tensor in (regions, words, mask)}

    def kept_bytes(block_size: int) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            local_similarity(regions, words, mask, **TEMPERATURES, block_size=block_size)
        return sum(size for place, size in kept.items() if place not in inputs)

    pair = 2 * 4 * 4 * 12  # scores and projections, four bytes, words, regions
    assert kept_bytes(4096) == 256 * pair
    assert kept_bytes(100) == 96 * pair
    assert kept_bytes(1) == pair
    with torch.no_grad():
        assert kept_bytes(4096) == 0


def test_second_derivatives_are_refused() -> None:
    regions, words, mask = features()
    similarity = local_similarity(regions, words, mask, **TEMPERATURES)
    (gradient,) = torch.autograd.grad(similarity.square().sum(), regions, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("temp0", [1.0, 0.1])
def test_attention_maps_are_of_matched_pairs(temp0: float) -> None:
    regions, words, mask = features()
    maps = attention_maps(regions, words, mask, temp0=temp0, temp1=4.0)
    assert maps.shape == (7, 6, 12)
    for weights, image, report, valid in zip(maps, regions.flatten(2), words, mask, strict=True):
        over_words = torch.softmax(temp0 * report[valid] @ image, dim=0)
        expected = torch.softmax(4.0 * over_words, dim=1)
        torch.testing.assert_close(weights[valid], expected, rtol=0, atol=1e-12)
        assert not weights[~valid].any()


def test_global_loss_is_cross_entropy_both_ways() -> None:
    generator = torch.Generator().manual_seed(0)
    visual, linguistic = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    cosine = torch.stack(
        [functional.cosine_similarity(image, linguistic, dim=1) for image in visual]
    )
    got = gloria_global_loss(visual, linguistic, 10.0)
    expected = reference.cross_entropy_both_ways(10.0 * cosine)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    with torch.autocast("cpu", torch.bfloat16):
        assert gloria_global_loss(visual.bfloat16(), linguistic.bfloat16(), 10.0)[0].dtype == (
            torch.float32
        )


def test_loss_is_the_weighted_sum_of_its_terms() -> None:
    regions, words, mask = features()
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(2, 7, 8, generator=generator, dtype=torch.float64)
    loss = GLoRIALoss(local_loss_weight=0.3, global_loss_weight=2.0, temp0=0.5, block_size=9)
    terms = loss(regions, words, mask, *whole)
    similarity = reference.local_similarity(
        regions.flatten(2), words, mask, **TEMPERATURES, temp0=0.5
    )
    local = reference.cross_entropy_both_ways(10.0 * similarity)
    torch.testing.assert_close(
        (terms["local_image_to_text"], terms["local_text_to_image"]), local, rtol=0, atol=1e-10
    )
    expected = 0.3 * sum(local) + 2.0 * (
        terms["global_image_to_text"] + terms["global_text_to_image"]
    )
    torch.testing.assert_close(terms["loss"], expected, rtol=0, atol=1e-10)
    assert terms["loss"].requires_grad
    assert not terms["local_image_to_text"].requires_grad
    assert "block_size=9" in repr(loss)


def test_zero_weights_of_all_terms_are_refused() -> None:
    with pytest.raises(ConfigError, match="local_loss_weight and global_loss_weight are both 0"):
        GLoRIALoss(local_loss_weight=0.0, global_loss_weight=0.0)


def test_bad_input() -> None:
    regions, words, mask = features()
    call = {**TEMPERATURES, "temp3": 10.0}
    with pytest.raises(ValueError, match="Report 2 of the batch has no word"):
        gloria_local_loss(regions, words, mask & (torch.arange(7) != 2).unsqueeze(1), **call)
    with pytest.raises(ValueError, match=r"regions \[7, 8, 3, 4\], words \[7, 6, 7\].*same width"):
        gloria_local_loss(regions, words[..., 1:], mask, **call)
    with pytest.raises(ValueError, match=r"mask must be bool"):
        gloria_local_loss(regions, words, mask.long(), **call)
    with pytest.raises(ValueError, match=r"mask must be bool"):
        gloria_local_loss(regions, words, mask[:, 1:], **call)
    with pytest.raises(ValueError, match="3 images and 7 reports"):
        gloria_local_loss(regions[:3], words, mask, **call)
    with pytest.raises(ValueError, match="batch of 1"):
        gloria_local_loss(regions[:1], words[:1], mask[:1], **call)
    with pytest.raises(ValueError, match="matched"):
        attention_maps(regions[:3], words, mask, temp1=4.0)
    with pytest.raises(ValueError, match="'sum' and 'max'"):
        local_similarity(regions, words, mask, **TEMPERATURES, aggregation="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_size is 0"):
        local_similarity(regions, words, mask, **TEMPERATURES, block_size=0)
    with pytest.raises(ValueError, match=r"same shape, not \[4, 8\] and \[5, 8\]"):
        gloria_global_loss(torch.zeros(4, 8), torch.zeros(5, 8), 10.0)
    with pytest.raises(ValueError, match="batch of 1"):
        gloria_global_loss(torch.zeros(1, 8), torch.zeros(1, 8), 10.0)


def test_tiny_regions_and_empty_words_give_finite_gradients() -> None:
    """Masked scores divided by the norm of an empty or short context must be finite."""
    regions, words, mask = features(dtype=torch.float32)
    small = (regions.detach() * 0.01).requires_grad_()
    empty = (words.detach() * mask.unsqueeze(2)).requires_grad_()
    given = similarity_and_gradients(small, empty, mask)

    slow = reference.local_similarity(
        small.double().flatten(2), empty.double(), mask, **TEMPERATURES
    )
    expected = [slow, *weighted_gradients(slow, small, empty)]
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("targets", [HASHES, vectors()], ids=["same_text", "soft"])
def test_several_positives_apply_to_the_global_terms(targets: Tensor) -> None:
    inputs = pairs()
    given = gloria_global_loss(*inputs, 3.0, targets=targets)
    expected = slow_both_ways(3.0 * cosines(*inputs), agreements(targets))
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert_same_gradients(given[0] + 2 * given[1], expected[0] + 2 * expected[1], inputs)


def test_local_terms_use_only_the_matched_image() -> None:
    random = torch.Generator().manual_seed(0)
    regions = torch.randn(6, 5, 2, 2, generator=random, dtype=torch.float64)
    words = torch.randn(6, 4, 5, generator=random, dtype=torch.float64)
    given = [regions, words, torch.ones(6, 4, dtype=torch.bool), *pairs()]
    alone, several = GLoRIALoss()(*given), GLoRIALoss()(*given, targets=HASHES)
    for name in ("local_image_to_text", "local_text_to_image"):
        assert torch.equal(alone[name], several[name])
    assert alone["global_image_to_text"] != several["global_image_to_text"]
    assert several["several_positives"].item() == pytest.approx(5 / 6)
