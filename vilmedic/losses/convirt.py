"""The bidirectional contrastive loss of ConVIRT (Zhang et al. 2020, arXiv 2010.00747)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilmedic.config.types import Share, Temperature
from vilmedic.device import block_numbers
from vilmedic.distributed.gather import WHOLE, Part

BLOCK = 2**22
"""Numbers per block of a loss on a CPU: 16 MiB in float32."""


def convirt_loss(
    visual: Tensor,
    linguistic: Tensor,
    tau: float | Tensor,
    lambda_: float,
    part: Part = WHOLE,
    targets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contrast every image with every report of the batch, and every report with every image.

    With s_ij the cosine similarity of image i and report j, the image-to-text term (equation 2) is
    the cross-entropy of s_i. / tau with target i, the text-to-image term (equation 3) that of
    s_.i / tau, both averaged over the batch; the loss (equation 4) weighs them with lambda_ and
    1 - lambda_. Half precision is widened to float32, under autocast as well: at tau = 0.1 the
    rounding of bfloat16 would be as large as the differences that are learned.

    With `targets` a pair may have further positives: the cross-entropies are then those of
    `soft_cross_entropy_both_ways`.

    Args:
        visual: embeddings of the images, [B, D], of any length.
        linguistic: embeddings of their reports, [B, D], in the same order.
        tau: temperature, above 0; a scalar tensor if it is learned.
        lambda_: weight of the image-to-text term, from 0 to 1.
        part: which pairs of a batch that is spread over processes these are; the others are
            gathered, and the averages of the results over the processes are those of the batch.
        targets: what `agreement` compares of each pair, [B] or [B, K]; None makes each report the
            positive of its own image alone.

    Returns:
        The loss, the image-to-text term and the text-to-image term, three scalars.

    Raises:
        ValueError: if the shapes differ, or the batch holds fewer than two pairs.
    """
    check_pairs("convirt_loss", visual, linguistic, part)
    wide = torch.promote_types(visual.dtype, torch.float32)
    with torch.autocast(visual.device.type, enabled=False):
        images = functional.normalize(visual.to(wide), dim=1)
        reports = functional.normalize(linguistic.to(wide), dim=1)
        logits = images @ part.gather(reports).T / tau
        image_to_text, text_to_image = cross_entropy_both_ways(logits, part, targets)
        loss = lambda_ * image_to_text + (1 - lambda_) * text_to_image
    return loss, image_to_text, text_to_image


class ConVIRTLoss(nn.Module):
    """`convirt_loss` with its settings.

    Args:
        tau: temperature that divides the cosine similarities.
        lambda_: weight of the image-to-text term; the text-to-image term gets the rest.
    """

    def __init__(self, *, tau: Temperature = 0.1, lambda_: Share = 0.75) -> None:
        super().__init__()
        self.tau = tau
        self.lambda_ = lambda_

    def forward(
        self,
        visual: Tensor,
        linguistic: Tensor,
        part: Part = WHOLE,
        targets: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss and its two terms.

        Args:
            visual: embeddings of the images, [B, D].
            linguistic: embeddings of the reports, [B, D].
            part: see `convirt_loss`.
            targets: see `convirt_loss`.

        Returns:
            Scalars `loss`, and without gradient `image_to_text` and `text_to_image`, and with
            targets what `several_positives` gives.
        """
        loss, image_to_text, text_to_image = convirt_loss(
            visual, linguistic, self.tau, self.lambda_, part, targets
        )
        return {
            "loss": loss,
            "image_to_text": image_to_text.detach(),
            "text_to_image": text_to_image.detach(),
            **several_positives(targets, part),
        }

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return f"tau={self.tau}, lambda_={self.lambda_}"


def check_pairs(name: str, first: Tensor, second: Tensor, part: Part = WHOLE) -> None:
    """Check that the inputs are a batch of pairs.

    Args:
        name: the loss, for messages.
        first: one side of each pair, [B, D].
        second: the other side, [B, D].
        part: which pairs of a batch that is spread over processes these are.

    Raises:
        ValueError: if the shapes differ, or the batch holds fewer than two pairs.
    """
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(
            f"{name} takes two tensors [B, D] of the same shape, "
            f"not {list(first.shape)} and {list(second.shape)}."
        )
    if part.count(first) < 2:
        raise ValueError(
            f"{name} needs at least two pairs in a batch, because the other pairs are what each "
            "one is compared with: raise the batch size or drop a last batch of one."
        )


def cross_entropy_both_ways(
    similarity: Tensor, part: Part, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of matched pairs over the rows and over the columns of similarities.

    A column is spread over the processes: every process sends the others the log-sum-exp of its
    part, one number per sample and process.

    Args:
        similarity: scaled similarities of the own samples of one kind to all of the other kind,
            [own, total]; those of matched pairs are on the diagonal of [total, total].
        part: which samples of the batch the rows are.
        targets: what `agreement` compares of the own samples, for more positives than the diagonal:
            see `soft_cross_entropy_both_ways`.

    Returns:
        The terms of the rows and those of the columns; scalars whose averages over the processes
        are the means over the whole batch.
    """
    if targets is not None:
        return soft_cross_entropy_both_ways(
            similarity, agreement(targets, part.gather(targets), similarity.dtype), part
        )
    target = part.places(similarity)
    if part.alone:
        return (
            functional.cross_entropy(similarity, target),
            functional.cross_entropy(similarity.T, target),
        )
    rows = functional.cross_entropy(similarity, target, reduction="none")
    matched = similarity.gather(1, target.unsqueeze(1)).squeeze(1)
    columns = part.swap(torch.logsumexp(similarity, 0)).logsumexp(0) - matched
    return part.mean(rows), part.mean(columns)


def soft_cross_entropy_both_ways(
    similarity: Tensor, agreed: Tensor, part: Part
) -> tuple[Tensor, Tensor]:
    """`cross_entropy_both_ways` with several positives, or soft ones.

    With p_ij from 0 to 1 the agreement of samples i and j, the target of row i is p_ij divided by
    its sum over j, and that of column j is p_ij divided by its sum over i:

        rows    = mean over i of -sum_j p_ij / n_i * log softmax_j(similarity_ij)
        columns = mean over j of -sum_i p_ij / n_j * log softmax_i(similarity_ij),  n_i = sum_j p_ij

    With p_ij 1 for equal reports and 0 otherwise these are the means over the positives of the log
    softmax of SupCon (Khosla et al. 2020, arXiv 2004.11362, equation 2) and UniCL (Yang et al.
    2022, arXiv 2204.03610, equations 2 and 3).

    Args:
        similarity: as for `cross_entropy_both_ways`, [own, total].
        agreed: p, symmetric in the whole batch and 1 on its diagonal, [own, total].
        part: which samples of the batch the rows are.

    Returns:
        As for `cross_entropy_both_ways`.
    """
    own_sums = agreed.sum(1)
    sums = part.gather(own_sums)
    # Each process sums the contributions of its rows to all columns. So only the averages over
    # the processes are the column terms, which saves exchanging the matched parts.
    in_rows = (agreed * similarity).sum(1) / own_sums
    in_columns = (agreed / sums * similarity).sum(1)
    whole_columns = torch.logsumexp(similarity, 0)
    if not part.alone:
        whole_columns = part.swap(whole_columns).logsumexp(0)
    rows = torch.logsumexp(similarity, 1) - in_rows
    return part.mean(rows), part.mean(whole_columns - in_columns)


def agreement(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """Degree to which samples are positives of each other, from 0 to 1, without gradient.

    Args:
        first: whole numbers [A], such as hashes of reports: equal ones agree, others do not. Or
            vectors t [A, K], which agree by exp(-|t_i - t_j|^2 / 2): of vectors of the length
            1 / sqrt(T) this is exp((cosine - 1) / T), so that rows divided by their sums are the
            softmax of the cosines at the temperature T.
        second: the same of other samples, [B] or [B, K].
        dtype: of the result.

    Returns:
        [A, B]; 1 for equal samples.
    """
    if first.ndim == 1:
        return (first[:, None] == second[None, :]).to(dtype)
    one, other = first.detach().to(dtype), second.detach().to(dtype)
    halves = [side.square().sum(1) / 2 for side in (one, other)]
    distance = one @ other.T - halves[0][:, None] - halves[1][None, :]
    return distance.clamp_(max=0).exp_()


@torch.no_grad()
def several_positives(targets: Tensor | None, part: Part = WHOLE) -> dict[str, Tensor]:
    """Share of the samples with a positive besides their own pair, for the log.

    A positive is a sample with an agreement above one half; see `agreement`.

    Args:
        targets: those of the own samples; None gives nothing.
        part: which samples of the batch these are.

    Returns:
        The scalar `several_positives`; its average over the processes is that of the batch.
    """
    if targets is None:
        return {}
    found = torch.zeros(len(targets), dtype=torch.float32, device=targets.device)
    numbers = block_numbers(targets.device, BLOCK)
    for piece in part.pieces(targets):
        for start, rows in row_blocks(targets, piece, numbers):
            agreed = agreement(rows, piece, torch.float32)
            found[start : start + len(rows)] += (agreed > 0.5).sum(1)
    return {"several_positives": part.mean((found > 1).float())}


def row_blocks(rows: Tensor, columns: Tensor, numbers: int) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of rows with the index of the first, for a limited number of values.

    Args:
        rows: [A, ...].
        columns: the rows to compare with, [B, ...].
        numbers: most values of a block [rows, B].
    """
    if not len(columns):
        return
    size = max(1, numbers // len(columns))
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]
