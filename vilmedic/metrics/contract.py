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
    """Every number that it gives, `*` standing for any text in a name, and what of it is better:
    `higher`, `lower` or `neither` (a count, say). A literal, as it is read without importing the
    metric; only what is declared can be `trainor.early_stop_metric`."""

    def options(self) -> dict[str, Any]:
        """Every option and its value, defaults included, for the results file."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def check(self, evaluation: Evaluation) -> None:  # noqa: B027, most have nothing to refuse
        """Refuse what can be known to fail, before the split is run.

        Args:
            evaluation: the first batch of the split.

        Raises:
            ArgumentError: an option does not fit the model or the data; the key in front of it and
                where it is set are added.
            DataError: a file that an option names is not as it must be.
        """

    @abstractmethod
    def __call__(self, evaluation: Evaluation) -> dict[str, Any]:
        """The numbers of a split, as values that JSON can hold; None where one is undefined."""
