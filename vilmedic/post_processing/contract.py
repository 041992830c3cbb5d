"""Base class of post-processing steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from vilmedic.evaluation.evaluation import Evaluation


class PostProcessing(ABC):
    """A step that makes files from the features of a split, after all numbers are written.

    The keyword-only constructor of a step is the schema of its options.
    """

    def check(self, evaluation: Evaluation) -> None:  # noqa: B027, some have nothing to refuse
        """Check the options before the split is run.

        Args:
            evaluation: the first batch of the split.

        Raises:
            ArgumentError: an option does not fit the model or the data; its key and origin are
                added.
        """

    @abstractmethod
    def __call__(self, evaluation: Evaluation) -> list[Path]:
        """Write into the run directory; returns the files written."""
