"""GLoRIA's attention similarity between every image and every report, block by block.

The local part of Huang et al. 2021, "GLoRIA: A Multimodal Global-Local Representation Learning
Framework for Label-efficient Medical Image Recognition" (ICCV). With regions c_n and words w_l:

    s_nl = c_n . w_l        b_nl = softmax of temp0 * s_nl over the words of the report
    a_nl = softmax of temp1 * b_nl over the regions
    v_l = sum_n a_nl c_n    r_l = cos(w_l, v_l)

    similarity = log sum_l exp(temp2 r_l)

No v_l is ever formed. Its product with w_l is sum_n a_nl s_nl, and its squared norm is a_l^T G a_l
with G the Gram matrix of the image's regions. The published form has no temp0, which is 1.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vilmedic.blocks.linear import linear, product_in_float32
from vilmedic.device import block_numbers

Aggregation = Literal["sum", "max"]
EPS = 1e-8
MASKED = -1e30  # finite, so that zero attention times a masked score is zero and not nan
_REPORTS_PER_BLOCK = 16  # few enough that reports of similar length share a block


def local_similarity(
    regions: Tensor,
    words: Tensor,
    mask: Tensor,
    *,
    temp0: float = 1.0,
    temp1: float,
    temp2: float,
    aggregation: Aggregation = "sum",
    block_size: int = 4096,
    word_counts: list[int] | None = None,
    region_mask: Tensor | None = None,
) -> Tensor:
    """Similarity of every image to every report by attention of words over regions.

    Half-precision input is computed, and returned, in float32. Memory does not grow with the
    number of pairs: the attention of at most `block_size` of them is kept for backward, that of
    the others is computed again. A word or an attended context of zero norm has a cosine of zero
    and passes no gradient.

    Args:
        regions: local image features, [I, D, H, W] or [I, D, N]; of K images per sample together
            [I, D, K, H, W].
        words: word features, [J, L, D].
        mask: True where a word counts, bool [J, L], at least one in every report.
        temp0: sharpness of the choice that a region makes among the words.
        temp1: sharpness of the attention over the regions.
        temp2: sharpness of the aggregation over the words.
        aggregation: `sum` over the words, as in training, or `max`, as in published evaluation,
            where `mask` leaves out the opening special token as well.
        block_size: number of image-report pairs whose attention may be held in memory.
        word_counts: number of words of each report where these are its first ones; None reads the
            mask, for which a GPU has to be waited for.
        region_mask: True where a region counts, bool [I, N], or where an image does, [I, K]; at
            least one in every sample. None counts all.

    Returns:
        Similarities, [I, J].

    Raises:
        ValueError: on shapes that do not fit, a report without a word, or a bad option.
    """
    _check_features(regions, words, mask)
    if aggregation not in ("sum", "max"):
        raise ValueError(f"aggregation is {aggregation!r}; allowed are 'sum' and 'max'.")
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be 1 or more.")
    lengths = counts = word_counts
    if torch.compiler.is_compiling():
        # A traced graph cannot depend on contents: assume full length and gaps.
        lengths, counts = ([size] * len(mask) for size in (mask.shape[1], mask.shape[1] - 1))
    elif lengths is None or counts is None:
        lengths, counts = torch.stack([_lengths(mask), mask.sum(1)]).tolist()
    if 0 in counts and not torch.compiler.is_compiling():
        raise ValueError(
            f"Report {counts.index(0)} of the batch has no word: its mask is False everywhere. "
            "Every report needs at least one; keep its opening token."
        )
    settings = SimilaritySettings(temp0, temp1, temp2, aggregation, block_size, lengths, counts)
    with torch.autocast(regions.device.type, enabled=False):
        counted = None if region_mask is None else _each_region(region_mask, regions)
        return _LocalSimilarity.apply(regions.flatten(2), words, mask, counted, settings)


def _each_region(mask: Tensor, regions: Tensor) -> Tensor:
    """Return whether each region counts, bool [I, N], of a mask of regions or of images."""
    each = regions.flatten(2).shape[2] // mask.shape[1]
    return mask.repeat_interleave(each, dim=1)


def attention_maps(
    regions: Tensor, words: Tensor, mask: Tensor, *, temp0: float = 1.0, temp1: float
) -> Tensor:
    """Attention of every word over the regions of its own image: a_nl of matched pairs.

    Args:
        regions: local image features of one image per sample, [B, D, H, W] or [B, D, N].
        words: word features, [B, L, D].
        mask: True where a word counts, bool [B, L].
        temp0: sharpness of the choice that a region makes among the words.
        temp1: sharpness of the attention over the regions.

    Returns:
        Weights that sum to one over the regions, [B, L, N]; zero for words that do not count.

    Raises:
        ValueError: on shapes that do not fit.
    """
    _check_features(regions, words, mask)
    if len(regions) != len(words):
        raise ValueError(
            f"Given {len(regions)} images and {len(words)} reports; attention maps are of matched "
            "pairs, so give as many reports as images."
        )
    dtype = compute_dtype(regions, words)
    with torch.autocast(regions.device.type, enabled=False):
        scores = torch.bmm(words.to(dtype) * temp0, regions.flatten(2).to(dtype))
        scores = scores.masked_fill(~mask.unsqueeze(2), MASKED)
        _, attention = attend(scores, temp1)
    return attention * mask.unsqueeze(2)


class _LocalSimilarity(torch.autograd.Function):
    """Similarities with a hand-written backward pass; all large tensors are [I, J, L, N]."""

    @staticmethod
    def forward(
        ctx: Any,
        regions: Tensor,
        words: Tensor,
        mask: Tensor,
        region_mask: Tensor | None,
        settings: SimilaritySettings,
    ) -> Tensor:
        dtype = compute_dtype(regions, words)
        similarity = torch.empty(len(regions), len(words), dtype=dtype, device=words.device)
        reports_size, images_size = block_shape(settings, regions)
        ctx.bits = bits = product_bits(regions, dtype)
        groups = group_reports(words.to(dtype), mask, settings, reports_size)
        pairs_left = settings.block_size if any(ctx.needs_input_grad) else 0
        kept: list[Tensor] = []
        for start in range(0, len(regions), images_size):
            images = regions[start : start + images_size].to(dtype)
            gram = multiply(images.mT, images, bits.narrow)
            factor = region_factor(images, bits)
            counted = _some(region_mask, start, images_size)
            for reports in groups:
                scores, projected, _, attention = compute_block(
                    factor, gram, reports, settings.temp1, counted
                )
                cosine, _ = cosine_of(attention, scores, projected, reports.norms)
                logits = logits_of(cosine, reports, settings.temp2)
                similarity[start : start + images_size, reports.places] = (
                    logits.logsumexp(2) if settings.aggregation == "sum" else logits.amax(2)
                )
                # Backward needs scores and projected of every block. The first blocks are kept, up
                # to `block_size` pairs, and the others are recomputed, so that memory is bounded.
                pairs_left -= len(images) * len(reports.places)
                if pairs_left >= 0:
                    kept += [scores, projected]
        ctx.settings = settings
        ctx.save_for_backward(regions, words, mask, region_mask, *kept)
        return similarity

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return (*_gradients(grad, ctx.settings, ctx.bits, *ctx.saved_tensors), None, None, None)


def _gradients(
    grad: Tensor,
    settings: SimilaritySettings,
    bits: ProductBits,
    regions: Tensor,
    words: Tensor,
    mask: Tensor,
    region_mask: Tensor | None = None,
    *kept: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients for the regions and the words.

    The cosine does not depend on the scale of the attention, so the mean that the backward of the
    softmax over the regions subtracts is zero and is left out. Regions that do not count have no
    attention, by which all of their terms are multiplied: their gradients are zero.
    """
    dtype = grad.dtype
    reports_size, images_size = block_shape(settings, regions)
    groups = group_reports(words.to(dtype), mask, settings, reports_size)
    transposed = [reports.words.T.contiguous() for reports in groups]
    saved = iter(kept)
    grad_regions = torch.empty_like(regions)
    grad_words = [torch.zeros_like(reports.words.T).T for reports in groups]
    radial = [torch.zeros_like(reports.norms) for reports in groups]
    for start in range(0, len(regions), images_size):
        images = regions[start : start + images_size].to(dtype)
        flat = images.transpose(0, 1).flatten(1)
        counted = _some(region_mask, start, images_size)
        gram: Tensor | None = None
        factor: Tensor | None = None
        grad_images = torch.zeros_like(images)
        grad_gram = images.new_zeros(len(images), images.shape[2], images.shape[2])
        for place, reports in enumerate(groups):
            scores = next(saved, None)
            if scores is not None:
                projected = next(saved)
                over_words, attention = attend(scores, settings.temp1, counted)
            else:
                gram = multiply(images.mT, images, bits.narrow) if gram is None else gram
                factor = region_factor(images, bits) if factor is None else factor
                scores, projected, over_words, attention = compute_block(
                    factor, gram, reports, settings.temp1, counted
                )
            cosine, context = cosine_of(attention, scores, projected, reports.norms)
            logits = logits_of(cosine, reports, settings.temp2)
            share = (
                torch.softmax(logits, 2)
                if settings.aggregation == "sum"
                else functional.one_hot(logits.argmax(2), logits.shape[2]).to(dtype)
            )
            upstream = grad[start : start + images_size, reports.places].unsqueeze(2)
            # Where forward clamped a norm, the clamp is constant: no gradient passes.
            alive = (context > EPS) & (reports.norms > EPS)
            grad_cosine = share * upstream * settings.temp2 * alive
            # With the dot product p = a . s and the squared norm q = a' G a of the context,
            # r = p / (|w| sqrt(q)): dr/dp = 1 / (|w| sqrt(q)), and dr/dq = -r / (2 q). The 2 is
            # left out because a occurs twice in q: dq/da = 2 G a, and `projected` is G a. The
            # derivative with respect to |w| is collected over all images in `radial`.
            radial[place] -= (grad_cosine * cosine).sum(0)
            grad_dot = (grad_cosine / (reports.norms * context)).unsqueeze(3)
            grad_square = (-grad_cosine * cosine / context.square()).unsqueeze(3)

            # From the attention a back to the scores s, in place: dr/da, then the softmax over the
            # regions (without its mean, which is zero here), then the softmax over the words.
            # The last line adds the direct path from s to p.
            grad_scores = projected * (grad_square * settings.temp1)
            grad_scores.addcmul_(scores, grad_dot * settings.temp1)
            grad_scores.mul_(attention).mul_(over_words)
            grad_scores.addcmul_(over_words, grad_scores.sum(2, keepdim=True), value=-1)
            grad_scores.addcmul_(attention, grad_dot)

            # G = C' C is symmetric, so a gradient D of r with respect to G reaches the regions C
            # as C (D + D'). D is -r / (2 q) times the outer product of a with itself, summed over
            # words: symmetric, so 2 C D, and the 2 cancels again. It is summed over all reports
            # first and multiplied once per block of images.
            weights = attention.flatten(1, 2)
            grad_gram += multiply(weights.mT, (attention * grad_square).flatten(1, 2), bits.narrow)
            rows = grad_scores.flatten(1, 2)
            grad_images += multiply(transposed[place].expand(len(images), -1, -1), rows)
            rows = rows.transpose(0, 1).flatten(1)
            grad_words[place] += multiply(rows.unsqueeze(0), flat.T.unsqueeze(0))[0]
        grad_images += multiply(images, grad_gram, bits.narrow)
        grad_regions[start : start + images_size] = grad_images

    # The norm of a word is outside of the blocks: its gradient, along the word itself, is added
    # once. Words were multiplied by temp0 before, so their gradient is multiplied too.
    gathered = torch.zeros_like(words)
    for reports, part, along in zip(groups, grad_words, radial, strict=True):
        part += reports.words * (along / reports.norms.square()).view(-1, 1)
        part *= settings.temp0
        count, longest = reports.mask.shape
        gathered[reports.places, :longest] = part.reshape(count, longest, -1).to(words.dtype)
    return grad_regions, gathered


def _some(mask: Tensor | None, start: int, count: int) -> Tensor | None:
    return None if mask is None else mask[start : start + count, None, None]


def _lengths(mask: Tensor) -> Tensor:
    """Position of the last word of each report, from one, int64 [J]."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)


def _check_features(regions: Tensor, words: Tensor, mask: Tensor) -> None:
    shapes = f"regions {list(regions.shape)}, words {list(words.shape)}, mask {list(mask.shape)}"
    if regions.dim() not in (3, 4, 5) or words.dim() != 3 or regions.shape[1] != words.shape[2]:
        raise ValueError(
            f"Given {shapes}; regions must be [I, D, H, W] or [I, D, N] and words [J, L, D] with "
            "the same width D. Project both to one width."
        )
    if mask.shape != words.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"Given {shapes} of {mask.dtype}; mask must be bool [J, L], True where a word counts."
        )


class SimilaritySettings(NamedTuple):
    """Settings of a similarity, without its tensors."""

    temp0: float
    temp1: float
    temp2: float
    aggregation: Aggregation
    block_size: int
    lengths: list[int]  # place of the last word of each report, counted from one
    counts: list[int]  # number of words of each report


class Reports(NamedTuple):
    """Reports of similar length, cut to the longest of them."""

    places: Tensor  # [J], their places in the batch
    words: Tensor  # [J * L, D], times temp0: the cosines do not depend on their lengths
    norms: Tensor  # [J, L], of the words, at least EPS; 1 where none counts
    mask: Tensor  # [J, L]
    padded: bool  # whether any of the mask is False


def group_reports(
    words: Tensor, mask: Tensor, settings: SimilaritySettings, size: int
) -> list[Reports]:
    """Group reports by length, so that blocks have little padding."""
    lengths, counts = settings.lengths, settings.counts
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    places = _lengths(mask).argsort(stable=True)  # the same, where the words are
    groups = []
    for start in range(0, len(order), size):
        members = order[start : start + size]
        longest = lengths[members[-1]]
        index = places[start : start + size]
        rows = words[index, :longest] * settings.temp0
        norms = torch.linalg.vector_norm(rows, dim=2).clamp(min=EPS)
        # Their scores are MASKED: divided by the norm of an empty vector they would be infinite.
        norms = norms.masked_fill(~mask[index, :longest], 1.0)
        padded = any(counts[member] < longest for member in members)
        groups.append(Reports(index, rows.flatten(0, 1), norms, mask[index, :longest], padded))
    return groups


def block_shape(settings: SimilaritySettings, regions: Tensor) -> tuple[int, int]:
    """Numbers of reports and of images that are computed at once; regions are [I, D, N]."""
    reports = min(settings.block_size, _REPORTS_PER_BLOCK)
    pair = max(settings.lengths) * regions.shape[2]  # numbers of a word for each region
    # On a CPU the data of one image at a time stays in the cache.
    pairs = min(settings.block_size, block_numbers(regions.device, reports * pair) // pair)
    return reports, max(1, pairs // reports)


class ProductBits(NamedTuple):
    """Precision of float32 products on a GPU with TF32."""

    narrow: bool = False  # regions with regions, and their gradients, in bfloat16
    split: bool = False  # scores in bfloat16, of two parts each


def product_bits(regions: Tensor, dtype: torch.dtype) -> ProductBits:
    """Choose product precisions that keep the gradient error below 1e-3 for features of any size.

    Products of regions with regions are exact if those are bfloat16, and their gradients are then
    within a few 1e-5. TF32 adds an error of 6e-4 to the other products together, but up to 1e-2
    through the scores: inputs of a softmax are too large to lose any bits.

    Args:
        regions: the given regions.
        dtype: dtype of the computation.
    """
    cheaper = regions.is_cuda and torch.backends.cuda.matmul.allow_tf32 and dtype == torch.float32
    return ProductBits(cheaper and regions.dtype == torch.bfloat16, cheaper)


def region_factor(images: Tensor, bits: ProductBits) -> Tensor:
    """Return the factor of words for the scores, [I, D, N] or [I, 2 D or 3 D, N]."""
    if not bits.split:
        return images
    high = images.bfloat16()
    if bits.narrow:
        return torch.cat((high, high), dim=1)
    return torch.cat((high, high, (images - high).bfloat16()), dim=1)


def scores_of(words: Tensor, factor: Tensor) -> Tensor:
    """Products of words [M, D] with the regions of each image, float32 [I, M, N].

    If `region_factor` has split the regions, words are split into the same parts: bfloat16 and the
    remainder, which together have 16 bits. Products of two remainders are left out.
    """
    parts = factor.shape[1] // words.shape[1]
    if parts == 1:
        return multiply(words.expand(len(factor), -1, -1), factor)
    high = words.bfloat16()
    left = torch.cat((high, (words - high).bfloat16(), high)[:parts], dim=1)
    return product_in_float32(left.expand(len(factor), -1, -1), factor)


def compute_block(
    factor: Tensor, gram: Tensor, reports: Reports, temp1: float, counted: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, attention times Gram matrix, softmax over the words and attention."""
    scores = scores_of(reports.words, factor).view(len(factor), *reports.mask.shape, -1)
    if reports.padded:
        scores.masked_fill_(~reports.mask.unsqueeze(2), MASKED)
    over_words, attention = attend(scores, temp1, counted)
    projected = multiply(attention.flatten(1, 2), gram).view_as(scores)
    return scores, projected, over_words, attention


def attend(scores: Tensor, temp1: float, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax over the words, and from it the attention over the regions.

    Regions that do not count, where `counted` [I, 1, 1, N] is False, get none of it.
    """
    over_words = torch.softmax(scores, dim=-2)
    sharpened = over_words * temp1
    if counted is not None:
        sharpened = sharpened.masked_fill(~counted, -torch.inf)
    return over_words, torch.softmax(sharpened, dim=-1)


def cosine_of(
    attention: Tensor, scores: Tensor, projected: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosine of each word with its attended context, and the norm of the context."""
    dots = torch.linalg.vecdot(attention, scores)
    squares = torch.linalg.vecdot(attention, projected)
    context = squares.clamp(min=0).sqrt().clamp(min=EPS)
    return dots / (norms * context), context


def logits_of(cosine: Tensor, reports: Reports, temp2: float) -> Tensor:
    """Scaled cosines, minus infinity for words that do not count."""
    return (cosine * temp2).masked_fill(~reports.mask, -torch.inf)


def multiply(left: Tensor, right: Tensor, narrow: bool = False) -> Tensor:
    """Batched matrix product, [I, M, K] times [I, K, N]; of bfloat16 factors if `narrow`."""
    if narrow:
        return product_in_float32(left.bfloat16(), right.bfloat16())
    if len(right) > 1:
        return torch.bmm(left, right)
    return linear(left[0], right[0].mT, None)[None]  # faster than `bmm` on a CPU


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the tensors, but float32 where that is a half-precision one."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
