"""Reconstruction error and codebook use of a discrete VAE."""

from __future__ import annotations

import logging
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from vilmedic.config.types import Share
from vilmedic.errors import ArgumentError
from vilmedic.evaluation.evaluation import Evaluation
from vilmedic.metrics.contract import Metric

logger = logging.getLogger(__name__)


class Reconstruction(Metric):
    """Reconstruction losses and the use of the codebook, with a warning when it collapses.

    `loss` is the mean error of a pixel with codes drawn as in training, `hard_loss` that with the
    likeliest code at each position, which is what a transformer learns to write.
    `codebook_perplexity` is the exponential of the entropy of how often each of these codes
    is used in the split: between 1 and the size of the codebook, which it reaches in even use.
    `codes_used` is the share of the codebook that is used at all.

    Args:
        collapse_share: a perplexity below this share of the codebook (or of the positions of the
            split, where these are fewer) is reported as a collapse.
    """

    numbers: ClassVar = {
        "loss": "lower",
        "hard_loss": "lower",
        "codebook_perplexity": "higher",
        "codes_used": "higher",
    }

    def __init__(self, *, collapse_share: Share = 0.02) -> None:
        self.collapse_share = collapse_share

    def check(self, evaluation: Evaluation) -> None:
        """Refuse models without codes, and several models at once."""
        check_single_vae(evaluation)

    def __call__(self, evaluation: Evaluation) -> dict[str, Any]:
        """`loss`, `hard_loss`, `codebook_perplexity` and `codes_used`; None without codes."""
        codes = evaluation.feature("codes")
        soft, hard = (evaluation.feature(f"{name}reconstruction_loss") for name in ("", "hard_"))
        model = evaluation.networks.members[0]()
        if codes is None or soft is None or hard is None:
            names = ("loss", "hard_loss", "codebook_perplexity", "codes_used")
            return dict.fromkeys(names)
        size = model.num_tokens
        perplexity, used = codebook_use(codes, size)
        collapsed = is_collapsed(perplexity, size, codes.numel(), self.collapse_share)
        if collapsed and not evaluation.baseline:
            logger.warning(
                "%s, split %s: the codebook has collapsed: %d of %d codes are used, with a "
                "perplexity of %.1f. model.kl_div_loss_weight above 0, a higher "
                "model.temperature or a lower learning rate may spread them.",
                evaluation.name,
                evaluation.split,
                used,
                size,
                perplexity,
            )
        return {
            "loss": soft.double().mean().item(),
            "hard_loss": hard.double().mean().item(),
            "codebook_perplexity": perplexity,
            "codes_used": used / size,
        }


def codebook_use(codes: Tensor, size: int) -> tuple[float, int]:
    """Perplexity of the use of codes, and how many are used.

    Args:
        codes: int64 of any shape, each below `size`.
        size: number of codes in the codebook.
    """
    counts = torch.bincount(codes.flatten(), minlength=size).double()
    entropy = torch.special.entr(counts / counts.sum()).sum().item()
    return math.exp(entropy), int((counts > 0).sum())


def is_collapsed(perplexity: float, size: int, positions: int, share: float = 0.02) -> bool:
    """Return whether a codebook is used far less than it could be.

    Args:
        perplexity: of the use of its codes.
        size: number of codes in it.
        positions: number of codes that the perplexity is of.
        share: of the smaller of the two, which a perplexity below means a collapse.
    """
    return perplexity < share * min(size, positions)


def check_single_vae(evaluation: Evaluation) -> None:
    """Refuse what has no codes, and several VAEs at once.

    Args:
        evaluation: the first batch of a split.

    Raises:
        ArgumentError: the model makes no codes of images, or there is more than one.
    """
    model = evaluation.networks.members[0]()
    if not hasattr(model, "get_codebook_indices"):
        raise ArgumentError({"": f"{type(model).__name__} makes no codes of images, as VAE does."})
    if len(evaluation.networks.members) > 1:
        raise ArgumentError(
            {
                "": f"{len(evaluation.networks.members)} checkpoints have codebooks that are "
                "unrelated. Evaluate one: ensemblor.mode=best-1."
            }
        )
