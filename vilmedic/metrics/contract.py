"""What every metric is."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any

from vilmedic.executors.evaluation import Evaluation


class Metric(ABC):
    """A protocol that turns the features of a split into numbers.

    The keyword-only constructor of a metric is the schema of its options; each is kept as an
    attribute of the same name. `vilmedic.executors.score` tells from the last words of a number's
    name whether it improves by falling.
    """

    def options(self) -> dict[str, Any]:
        """Every option and its value, defaults included, for the results file."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def check(self, evaluation: Evaluation) -> None:  # noqa: B027, most have nothing to refuse
        """Refuse what can be known to fail, before the split is run.

        Args:
            evaluation: the first batch of the split.

        Raises:
            ConfigError: an option does not fit the model or the data.
            DataError: a file that an option names is not as it must be.
        """

    @abstractmethod
    def __call__(self, evaluation: Evaluation) -> dict[str, Any]:
        """The numbers of a split, as values that JSON can hold; None where one is undefined."""
