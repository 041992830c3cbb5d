"""Warnings that name the cause when contrastive training does not get anywhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from vilmedic.log import LOGGER

CHANCE = 0.97  # of the loss of features that tell nothing
COLLAPSED = 0.03  # of the spread of features that fill the sphere
DUPLICATES = 0.25
PATIENCE = 200  # steps
FEWEST = 5  # logged steps


class StuckWarning:
    """Looks at the diagnostics of logged steps and warns when a run is stuck.

    A run is stuck when over `patience` steps in a row its mean loss was that of features which
    tell nothing. While it stays so the warning is repeated after twice as many steps each time.

    Args:
        patience: steps before the first warning.
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        self.patience = patience
        self._wait = patience
        self._seen: deque[tuple[int, Mapping[str, float]]] = deque()

    def look(self, step: int, numbers: Mapping[str, float]) -> str | None:
        """Take in the diagnostics of a step.

        Args:
            step: the optimizer step.
            numbers: what `contrastive_diagnostics` gave; nothing for other models.

        Returns:
            The warning, which is also logged, or None.
        """
        if "loss_over_ln_batch" not in numbers:
            return None
        self._seen.append((step, numbers))
        while len(self._seen) > FEWEST and step - self._seen[1][0] >= self._wait:
            self._seen.popleft()
        if len(self._seen) < FEWEST or step - self._seen[0][0] < self._wait:
            return None
        if self._mean("loss_over_ln_batch") < CHANCE:
            self._wait = self.patience
            return None
        steps = step - self._seen[0][0]
        text = (
            f"Nothing was learned in the last {steps} steps: the loss is "
            f"{self._mean('loss_over_ln_batch'):.3f} times that of guessing. {self._cause()}"
        )
        LOGGER.warning(text)
        self._wait *= 2
        return text

    def _mean(self, name: str) -> float:
        values = [numbers[name] for _, numbers in self._seen if name in numbers]
        return sum(values) / len(values) if values else 0.0

    def _cause(self) -> str:
        """The likeliest reason, the most certain ones first."""
        names = [name for name in self._seen[-1][1] if name.startswith("feature_std_")]
        for name in names:
            if (spread := self._mean(name)) < COLLAPSED:
                what = name.removeprefix("feature_std_")
                return (
                    f"The '{what}' features have collapsed: all samples are embedded alike "
                    f"(standard deviation {spread:.3f}, 1 is an even spread). Try a smaller "
                    "learning rate, a warm-up, trainor.clip_grad_norm, or another seed; frozen or "
                    "missing pretrained weights have the same effect."
                )
        if (share := self._mean("duplicate_reports")) > DUPLICATES:
            return (
                f"{share:.0%} of the reports of a batch repeat another one word for word, so that "
                "their pairs cannot be told apart. Try data without template reports, sampled "
                "sentences (dataset.seq.sample_sentence) or a smaller batch."
            )
        return (
            "Features are spread out, and still no pair is found. Check that line n of the image "
            "file and line n of the report file are one sample, and try another learning rate or "
            "temperature."
        )
