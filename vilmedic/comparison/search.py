"""Hyperparameter search: optuna chooses trials by earlier scores, each one an ordinary run.

The study is the file `study.journal` in the folder of the search, which optuna and its dashboard
read. Each trial depends only on the seed, its number and the earlier trials, so that a killed and
restarted search (with one run at a time) ends with the same trials as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from filelock import FileLock, Timeout
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from vilmedic.checkpoints.left_out import read_entries
from vilmedic.comparison.grid import Planned, Range, Space
from vilmedic.comparison.runs import is_number
from vilmedic.comparison.sweep import Refused, digest
from vilmedic.config.declared import read_scores
from vilmedic.config.namespaces import entries
from vilmedic.errors import ConfigError
from vilmedic.files import no_file

STUDY = "study.journal"
NAME = "search"  # of the study in its file
RUN = "run"  # attribute of a trial: the name of its run
SOUGHT = "sought"  # attribute of the study: its settings
METRICS = "metrics.jsonl"
_DIRECTIONS = {"higher": StudyDirection.MAXIMIZE, "lower": StudyDirection.MINIMIZE}


class Search:
    """The trials of a search, as a `Sweep` asks for them.

    A failed trial is repeated by the next search, as a new trial of the study with the same values
    and the same run.

    Args:
        space: the search space.
        trials: total number of runs.
        metric: the score of a run: the best of its evaluations during training.
        better: `higher` or `lower`.
        study: the optuna study.
    """

    def __init__(
        self, space: Space, *, trials: int, metric: str, better: str, study: optuna.Study
    ) -> None:
        self._space, self._trials = space, trials
        self._metric, self._better = metric, better
        self._study = study
        self._seed = space.corner.config.trainor.seed or 0
        self._distributions = {key: _distribution(one) for key, one in space.axes.items()}
        self._refused: list[Refused] = []

    def begun(self) -> list[Planned]:
        """Return the runs of the study to resume; failed ones start again."""
        found = []
        for name, trial in list(self._last().items())[: self._trials]:
            if trial.state == TrialState.FAIL:
                self._add(name, trial.params)
            run = self._run(name, trial.params)
            if isinstance(run, Planned):
                found.append(run)
            else:
                self._refused.append(run)
        return found

    def another(self) -> Planned | Refused | None:
        """Return another run; None if there are enough."""
        if self._refused:
            return self._refused.pop()
        number = len(self._last())
        if number >= self._trials:
            return None
        params = self._suggest(number)
        name = self._space.run_name(number, self._texts(params))
        self._add(name, params)
        return self._run(name, params)

    def ended(self, run: Planned, reason: str | None) -> str | None:
        """Record the score of a finished run; returns why it failed if it has none."""
        value: float | None = None
        if reason is None:
            value = self._score(run.run_dir)
            if value is None:
                reason = f"its evaluations gave no finite {self._metric}"
        self._record(run.name, value)
        return reason

    def best(self) -> str:
        """A sentence that names the best run; empty without one."""
        done = [one for one in self._last().values() if one.state == TrialState.COMPLETE]
        if not done:
            return ""
        sign = 1 if self._better == "higher" else -1
        trial = max(done, key=lambda one: sign * float(one.value or 0))
        values = zip(self._space.axes, self._texts(trial.params), strict=True)
        text = " ".join(f"{key}={value}" for key, value in values)
        return (
            f"Best of {len(done)}: {self._metric} {trial.value:.6g} ({self._better} is better), "
            f"{trial.user_attrs[RUN]}: {text}"
        )

    def _run(self, name: str, params: dict[str, Any]) -> Planned | Refused:
        """The run of a trial; a failed one when its values do not go together."""
        try:
            return self._space.run(name, self._texts(params))
        except ConfigError as error:
            self._record(name, None)
            return Refused(name, " ".join(error.problems))

    def _last(self) -> dict[str, FrozenTrial]:
        """The last trial of each run, in the order in which the runs were begun."""
        trials = self._study.get_trials(deepcopy=False)
        return {one.user_attrs[RUN]: one for one in trials if RUN in one.user_attrs}

    def _suggest(self, number: int) -> dict[str, Any]:
        """The values of a trial, which follow from its number and the trials before."""
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        study = optuna.create_study(
            direction=_DIRECTIONS[self._better],
            sampler=optuna.samplers.TPESampler(seed=seed),
        )
        study.add_trials(self._last().values())
        found = study.ask(self._distributions).params
        return {
            key: type(found[key])(axis.text(found[key])) if isinstance(axis, Range) else found[key]
            for key, axis in self._space.axes.items()
        }

    def _texts(self, params: dict[str, Any]) -> list[str]:
        """Return the values of a trial as text for its run."""
        return [
            axis.text(params[key]) if isinstance(axis, Range) else str(params[key])
            for key, axis in self._space.axes.items()
        ]

    def _add(self, name: str, params: dict[str, Any]) -> None:
        """Add a trial to the study: one line of its file, which is complete or absent."""
        trial = create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions=self._distributions,
            user_attrs={RUN: name},
        )
        self._study.add_trial(trial)

    def _record(self, name: str, value: float | None) -> None:
        trial = self._last()[name]
        if trial.state == TrialState.RUNNING:
            state = TrialState.FAIL if value is None else TrialState.COMPLETE
            self._study.tell(trial.number, value, state)

    def _score(self, run_dir: Path) -> float | None:
        """The best score that the evaluations of a run gave; None without a finite one."""
        try:
            entries = [one for _, one in read_entries(run_dir / METRICS) if one is not None]
        except OSError:
            return None
        scores = [float(one[self._metric]) for one in entries if is_number(one.get(self._metric))]
        pick = max if self._better == "higher" else min
        return pick(scores, default=None)


def direction(space: Space, metric: str) -> str:
    """Return whether a higher or a lower value of a score is better.

    Raises:
        ConfigError: the evaluations during training do not give that score.
    """
    config = space.corner.config
    metrics = [name for name, _ in entries(config.validator.metrics)]
    ema = config.trainor.ema is not None
    try:
        better = read_scores(config.validator.splits, metrics, ema=ema).better(metric)
    except ConfigError as error:
        raise ConfigError(f"--metric: {error}") from None
    if better is None:
        raise ConfigError(f"--metric: given '{metric}', of which no direction is known.")
    return better


@contextmanager
def opened(space: Space, *, trials: int, metric: str) -> Iterator[Search]:
    """Start or resume the search of a folder, with a lock against other processes.

    Args:
        space: the search space.
        trials: total number of runs.
        metric: the score to optimise.

    Raises:
        ConfigError: the folder holds another search, or another process is at it; or its file
            cannot be read.
    """
    better = direction(space, metric)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = space.corner.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".search.lock", fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{folder}: another process is at this search.") from None
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    try:
        study = _study(folder / STUDY, better)
        _check_same(study, folder, _sought(space, metric))
        yield Search(space, trials=trials, metric=metric, better=better, study=study)
    finally:
        lock.release()


def _study(path: Path, better: str) -> optuna.Study:
    """The study in a file.

    Raises:
        ConfigError: the file is damaged.
    """
    _mend(path)
    try:
        return optuna.create_study(
            study_name=NAME,
            storage=JournalStorage(JournalFileBackend(str(path))),
            direction=_DIRECTIONS[better],
            load_if_exists=True,
        )
    except OSError:
        raise
    except Exception as error:  # the file can hold anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{path}: cannot be read ({reason}). Remove it: the same command makes it again from "
            "the runs that are finished."
        ) from None


def _mend(path: Path) -> None:
    """Remove a half-written last line and a stale lock after a kill or a full disk.

    Raises:
        ConfigError: the path is not a file.
    """
    for left in path.parent.glob(f"{path.name}.lock*"):
        left.unlink(missing_ok=True)
    if (kind := no_file(path)) is not None:
        raise ConfigError(f"{path}: is {kind}, where the study should be.")
    if path.exists():
        with open(path, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _check_same(study: optuna.Study, folder: Path, sought: dict[str, Any]) -> None:
    """Refuse to resume a study with other settings.

    Raises:
        ConfigError: lists the differences.
    """
    before = study.user_attrs.get(SOUGHT)
    if before is None:
        study.set_user_attr(SOUGHT, sought)
        return
    differs = [
        f"{key}: there {before.get(key)}, given {sought.get(key)}"
        for key in dict.fromkeys([*before, *sought])
        if before.get(key) != sought.get(key)
    ]
    if differs:
        raise ConfigError(
            f"{folder}: holds another search ({'; '.join(differs)}). Give this one another name, "
            "or remove that folder."
        )


def _sought(space: Space, metric: str) -> dict[str, Any]:
    """The settings that identify a search."""
    varied = {
        key: f"{axis.kind}({axis.low:g},{axis.high:g})" if isinstance(axis, Range) else axis
        for key, axis in space.axes.items()
    }
    return {"metric": metric, **varied, "configuration": digest(space.corner)}


def _distribution(axis: list[str] | Range) -> BaseDistribution:
    if not isinstance(axis, Range):
        return CategoricalDistribution(axis)
    if axis.kind == "int":
        return IntDistribution(int(axis.low), int(axis.high))
    return FloatDistribution(axis.low, axis.high, log=axis.kind == "log")
