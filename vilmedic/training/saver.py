"""Saving of the training state, including full disks, Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from vilmedic.checkpoints import checkpoint
from vilmedic.checkpoints.run_directory import remove, set_aside
from vilmedic.config.sections import TrainorSection
from vilmedic.distributed import processes
from vilmedic.distributed.launch import process_count
from vilmedic.errors import CheckpointError, Interrupted
from vilmedic.files import identity
from vilmedic.log import LOGGER
from vilmedic.training.resume import Progress

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Saver:
    """Writes `last_<seed>.pth`, the best `keep` checkpoints and earlier states of a run.

    The state that `last_<seed>.pth` replaces is kept as `previous_<seed>.pth`: if the newest one is
    damaged, only the training between two saves is lost. States after epochs and evaluations are
    kept as `state_<step>_<seed>.pth`, the newest `keep_states` of them, without writing any twice.
    Best checkpoints hold the weights without training state. Of several processes the main one
    writes, and all get the result.

    Args:
        run_dir: the directory of the run.
        seed: the run's seed.
        section: `save_every`, `keep`, `keep_states` and the metric that ranks.
        better: `higher` or `lower`: which value of that metric is better.
        before: flushes data that a checkpoint depends on to the disk.
        clock: returns a time in seconds.
        started_from: the checkpoint that the run resumes, which becomes the previous state at the
            first save.

    Attributes:
        last: the file of the newest state.
        saved: the optimizer step of the newest state that this process wrote; None before.
        problem: why the newest state could not be written; None if it was.
    """

    def __init__(
        self,
        run_dir: Path,
        seed: int,
        section: TrainorSection,
        better: str,
        before: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        started_from: Path | None = None,
    ) -> None:
        self.last = run_dir / checkpoint.last_name(seed)
        self.saved: int | None = None
        self.problem: str | None = None
        self._previous = run_dir / checkpoint.previous_name(seed)
        self._newest = started_from
        # Without hard links: the name for the newest state when it is replaced.
        self._later: Path | None = None
        self._run_dir, self._seed, self._section = run_dir, seed, section
        self._ranking = (section.early_stop_metric, better)
        # By path and identity of the file: reading a checkpoint verifies all of it.
        self._read: dict[tuple[Path, tuple[int, ...] | None], checkpoint.BestCheckpoint | None] = {}
        self._before, self._clock = before, clock
        self._saved_at = clock()
        amount = section.save_every or ""
        minutes = amount.endswith("min")
        self._steps = int(amount) if amount and not minutes else None
        self._seconds = 60 * int(amount.removesuffix("min")) if minutes else None

    def due(self, step: int) -> bool:
        """Return whether the state has to be saved after a step without an evaluation."""
        if self._steps is not None:
            return step % self._steps == 0
        return self._seconds is not None and self._clock() - self._saved_at >= self._seconds

    def save_last(self, state: dict[str, Any]) -> bool:
        """Write the newest state; returns whether that worked."""

        def save() -> bool:
            name = self._later or self._previous
            kept = None if self._newest is None else (self._newest, name)
            if not self._write(state, self.last, kept):
                return False
            if self._later is not None:
                self._previous.unlink(missing_ok=True)  # older than the state that is kept now
            self._newest = self.last
            self._keep_state(**{key: progress.get(key) for key in ("step", "batch", "evaluated")})
            return True

        progress = state.get("progress", {})
        if done := processes.on_main(save):
            self.saved = progress.get("step")
        return done

    def save_best(self, state: dict[str, Any], score: float, epoch: int) -> bool:
        """Write a checkpoint that carries its score, and remove the worst beyond `keep`."""

        def save() -> bool:
            written = self._run_dir / checkpoint.best_name(score, epoch, self._seed)
            if not self._write(checkpoint.weights_of(state), written):
                return False
            # What was just written need not be read.
            self._read[written, identity(written)] = checkpoint.score_data(written, state)
            others = [one.path for one in self.best() if one.path != written]
            for extra in others[self._section.keep - 1 :]:
                extra.unlink()
            return True

        return processes.on_main(save)

    def set_aside(self, progress: Progress) -> None:
        """Move files that the run will replace into the folder `set_aside`, which is not ranked.

        These are the files of its seed from epochs that are trained again, if the run resumes from
        an older checkpoint, and all best checkpoints if there is no best score yet. The resumed
        state is kept under its step if due: its run may have been killed before that.
        """
        first = 0 if progress.best is None else progress.epoch

        def move() -> None:
            for left in self._run_dir.glob(f".*_{self._seed}.pth.tmp"):  # of a save that was killed
                remove(left)
            for path in checkpoint.scored(self._run_dir, self._seed):
                if checkpoint.epoch_of(path) >= first and not _led_here(path, progress):
                    set_aside(path)
            for path in checkpoint.kept_states(self._run_dir, self._seed):
                if checkpoint.step_of(path) > progress.step:
                    set_aside(path)
            here = self._run_dir.resolve()
            if self._newest is not None and self._newest.parent.resolve() == here:
                self._keep_state(progress.step, progress.batch, progress.evaluated)

        processes.on_main(move)

    def best_score(self) -> float | None:
        """Return the best score on the disk, read by the main process."""
        return processes.on_main(lambda: next((one.score for one in self.best()), None))

    def best(self) -> list[checkpoint.BestCheckpoint]:
        """Return the checkpoints of this run with a score of its metric, best first.

        They are ranked by content, not by name. Unreadable ones are ignored. Each is read once, and
        again only if the file has changed.
        """
        before, self._read = self._read, {}
        for path in checkpoint.scored(self._run_dir, self._seed):
            key = (path, identity(path))
            if key not in before:
                try:
                    before[key] = checkpoint.read_best(path)
                except CheckpointError as error:
                    LOGGER.warning("Not ranked: %s", error)
                    before[key] = None
            self._read[key] = before[key]
        found = [one for one in self._read.values() if one is not None]
        return checkpoint.best_first(
            [one for one in found if (one.metric, one.better) == self._ranking]
        )

    def _keep_state(self, step: int | None, batch: int | None, evaluated: int | None) -> None:
        """Keep the newest state under its step, if due.

        That is after an epoch, or after an evaluation within one.

        Args:
            step: the optimizer step after which it was written.
            batch: batches of the epoch that had been trained on; 0 at its end.
            evaluated: the step of the last evaluation.
        """
        self._later = None
        stays = batch == 0 or evaluated == step
        if not self._section.keep_states or not step or not stays or self._newest is None:
            return
        name = self._run_dir / checkpoint.state_name(step, self._seed)
        if not checkpoint.link(self._newest, name) and self._newest == self.last:
            self._later = name
        there = checkpoint.kept_states(self._run_dir, self._seed)
        for extra in there[self._section.keep_states :]:
            remove(extra)

    def _write(
        self, state: dict[str, Any], path: Path, kept: tuple[Path, Path] | None = None
    ) -> bool:
        self._saved_at = self._clock()
        try:
            self._before()
            checkpoint.save_checkpoint(state, path, kept)
        except (OSError, RuntimeError) as error:  # torch has its own words for a full disk
            self.problem = reason = " ".join(str(error).split())
            LOGGER.warning(
                "%s could not be written (%s). The earlier file stays, training continues, the "
                "next save tries again.",
                path,
                reason,
            )
            return False
        self.problem = None
        return True


def _led_here(path: Path, progress: Progress) -> bool:
    """Return whether a best checkpoint is of an evaluation before the state that is resumed."""
    if progress.best is None:
        return False
    try:
        saved = checkpoint.read_header(path).get("progress") or {}
    except CheckpointError:
        return False
    step = saved.get("step")
    return isinstance(step, int) and step <= progress.evaluated


class Interruption:
    """Context that catches the first signal; the second has its default effect.

    A launcher of several processes forwards and repeats signals: its processes catch all of them,
    and the launcher kills a process that takes too long.

    Outside the main thread, where Python handles no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at_once = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    @contextmanager
    def may_come_at_once(self) -> Iterator[None]:
        """Context without side effects, such as an evaluation, that a signal may end early.

        With several processes it is not ended early, since the others would wait.

        Raises:
            Interrupted: a signal came.
        """
        if process_count() > 1:
            yield
            return
        self._at_once = True
        try:
            if self.received is not None:
                raise self.stop("")
            yield
        finally:
            self._at_once = False

    def stop(self, message: str) -> Interrupted:
        """Return the error that ends the run, with the exit status of the signal."""
        # Another process may have received the signal.
        return Interrupted(message, 128 + (self.received or signal.SIGTERM))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if process_count() == 1:
            self._let_go()
        if self._at_once:
            raise self.stop("")

    def _let_go(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
