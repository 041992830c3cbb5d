"""Base class of metrics."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from vilmedic.config.declared import Declared
from vilmedic.evaluation.evaluation import Evaluation


class Metric(ABC):
    """A protocol that turns the features of a split into numbers.

    The keyword-only constructor of a metric is the schema of its options; each is kept as an
    attribute of the same name.
    """

    numbers: ClassVar[Declared]
    """Every number of the metric, where `*` stands for any text in a name, with the better
    direction: `higher`, `lower` or `neither` (such as a count). A literal, as it is read without
    importing the metric; only declared numbers can be `trainor.early_stop_metric`."""

    def options(self) -> dict[str, Any]:
        """Every option and its value, defaults included, for the results file."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def check(self, evaluation: Evaluation) -> None:  # noqa: B027, most have nothing to refuse
        """Check the options before the split is run.

        Args:
            evaluation: the first batch of the split.

        Raises:
            ArgumentError: an option does not fit the model or the data; its key and origin are
                added.
            DataError: a file that an option names is invalid.
        """

    @abstractmethod
    def __call__(self, evaluation: Evaluation) -> dict[str, Any]:
        """The numbers of a split, as values that JSON can hold; None where one is undefined."""
