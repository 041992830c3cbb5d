"""Sweeps: the runs of a grid or search, trained and evaluated one process per device.

Each run has the directory `<ckpt_dir>/<sweep>/<what varies>`. Its `sweep.json` holds the digest of
its configuration and its progress, and `sweep.log` the output of its processes. The same command
again resumes the sweep: finished runs are skipped, others resume with `ckpt=auto`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vilmedic.checkpoints.left_out import read_json
from vilmedic.comparison.grid import Planned
from vilmedic.errors import ConfigError, Interrupted, VilmedicError, escaped
from vilmedic.files import core_count, replace_text
from vilmedic.log import counted
from vilmedic.script import CLONE

RECORD = "sweep.json"
LOG = "sweep.log"
STEPS = ("train", "ensemble")
SAID = {"train": "trained", "ensemble": "evaluated"}
POLL = 0.05  # seconds
GRACE = 120.0  # seconds for a run that is asked to stop to save its state
LISTED = 20  # failures named in the last message
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


@dataclass
class _Job:
    """A run and its remaining steps."""

    run: Planned
    left: list[str]
    process: subprocess.Popen[bytes] | None = None
    slot: int = 0


@dataclass(frozen=True)
class Refused:
    """A run that cannot start.

    Args:
        name: of the run.
        reason: what is wrong with it.
    """

    name: str
    reason: str


@dataclass
class Sweep:
    """Trains and evaluates planned runs.

    Args:
        path: the configuration file.
        runs: the checked runs.
        jobs: processes at a time; None takes one for each GPU, or one.
        evaluate: whether each run is evaluated after its training.
        report: gets a line for each event.
        command: the command of a step, `train` or `ensemble`.
        another: returns a further run when a device is free, for a search; None at the end.
        ended: gets each finished run and the reason if it failed; may return a reason why it
            counts as failed.

    Attributes:
        failures: the name of each failed run, and why.
        count: number of runs so far.
    """

    path: str
    runs: Sequence[Planned]
    jobs: int | None = None
    evaluate: bool = True
    report: Callable[[str], object] = print
    command: Callable[[str], list[str]] = field(default_factory=lambda: command_of)
    another: Callable[[], Planned | Refused | None] = lambda: None
    ended: Callable[[Planned, str | None], str | None] = lambda run, reason: reason
    failures: dict[str, str] = field(default_factory=dict)
    count: int = 0

    def start(self) -> None:
        """Run all remaining steps.

        Raises:
            ConfigError: a directory holds a run of another configuration.
            VilmedicError: some runs failed; all others are done.
            Interrupted: a signal ended the sweep; running runs were asked to save their state.
        """
        steps = STEPS if self.evaluate else STEPS[:1]
        planned = [_Job(run, self._left(run, steps)) for run in self.runs]
        waiting = [job for job in planned if job.left]
        self.count = len(planned)
        if done := self.count - len(waiting):
            self.report(f"finished already: {done} of {counted(self.count, 'run')}")
        for job in planned:
            if not job.left:
                self._end(job.run, None)
        waiting = waiting or self._more(steps)
        given = any(job.run.config.trainor.device is not None for job in [*planned, *waiting])
        gpus = [] if given else visible_gpus()
        jobs = self.jobs or max(1, len(gpus))
        running: list[_Job] = []
        try:
            with _signals():
                while True:
                    while len(running) < jobs and (waiting := waiting or self._more(steps)):
                        job = waiting.pop(0)
                        job.slot = min(set(range(jobs)) - {one.slot for one in running})
                        running.append(job)
                        with self._written(job):
                            self._launch(job, gpus, jobs)
                    if not running:
                        break
                    time.sleep(POLL)
                    running = [job for job in running if self._goes_on(job, gpus, jobs)]
        except BaseException:
            _stop(running)
            raise
        if self.failures:
            raise VilmedicError(self._told())

    def _left(self, run: Planned, steps: Sequence[str]) -> list[str]:
        """Return the remaining steps of a run.

        Raises:
            ConfigError: its directory holds a run of another configuration.
        """
        record = _read(run.run_dir)
        if record and record.get("configuration") != digest(run):
            raise ConfigError(
                f"{run.run_dir}: holds a run of another configuration, of an earlier sweep. Give "
                "this sweep another name, or remove that directory."
            )
        return [step for step in steps if step not in _done(record)]

    def _more(self, steps: Sequence[str]) -> list[_Job]:
        """Return another run with remaining steps; None at the end."""
        while (run := self.another()) is not None:
            self.count += 1
            if isinstance(run, Refused):
                self.failures[run.name] = run.reason
                self.report(f"{run.name}: failed, {run.reason}")
                continue
            try:
                left = self._left(run, steps)
            except ConfigError as error:
                self._end(run, str(error))
                continue
            if left:
                return [_Job(run, left)]
            self._end(run, None)
        return []

    def _end(self, run: Planned, reason: str | None) -> None:
        """Record the end of a run."""
        if (failed := self.ended(run, reason)) is not None:
            self.failures[run.name] = failed
            self.report(f"{run.name}: failed, {failed}")

    def _launch(self, job: _Job, gpus: Sequence[str], jobs: int) -> None:
        """Start the next step of a run."""
        step, run_dir = job.left[0], job.run.run_dir
        environment = dict(os.environ)
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[job.slot % len(gpus)]
        elif jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, core_count() // jobs)))
        run_dir.mkdir(parents=True, exist_ok=True)
        if not _read(run_dir):
            _write(job.run, [])
        self.report(f"{job.run.name}: {step}")
        with open(run_dir / LOG, "ab") as log:
            job.process = subprocess.Popen(
                [*self.command(step), self.path, *job.run.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=_die_with_parent() if sys.platform == "linux" else None,
            )

    def _goes_on(self, job: _Job, gpus: Sequence[str], jobs: int) -> bool:
        """Return whether a run has steps left after its process ended."""
        if job.process is None:  # it could not start
            return False
        status = job.process.poll()
        if status is None:
            return True
        step = job.left[0]
        if status != 0:
            self._end(job.run, f"{step}: {_reason(job.run.run_dir / LOG, status)}")
            return False
        with self._written(job):
            _write(job.run, [*_done(_read(job.run.run_dir)), step])
            job.left = job.left[1:]
            if job.left:
                self._launch(job, gpus, jobs)
                return True
            self.report(f"{job.run.name}: {SAID[step]}")
            self._end(job.run, None)
        return False

    @contextmanager
    def _written(self, job: _Job) -> Iterator[None]:
        """Context in which an unwritable folder fails only its own run."""
        try:
            yield
        except OSError as error:
            where = error.filename or job.run.run_dir
            self._end(job.run, f"{job.left[0]}: {where}: {error.strerror or error}")

    def _told(self) -> str:
        """Return the final message about failed runs."""
        done = self.count - len(self.failures)
        named = [f"  {name}: {reason}" for name, reason in list(self.failures.items())[:LISTED]]
        more = len(self.failures) - len(named)
        rest = [f"  and {more} more"] if more else []
        return "\n".join(
            [
                f"{len(self.failures)} of {counted(self.count, 'run')} failed, {done} finished. "
                f"Each {LOG} says more; the same command tries them again.",
                *named,
                *rest,
            ]
        )


def slurm_script(path: str, runs: Sequence[Planned], *, jobs: int | None, evaluate: bool) -> str:
    """An array job with a task for each run.

    Args:
        path: the configuration file.
        runs: of the sweep.
        jobs: tasks at a time; None leaves that to the cluster.
        evaluate: whether each run is evaluated after its training.
    """
    steps = STEPS if evaluate else STEPS[:1]
    limit = f"%{jobs}" if jobs else ""
    name = runs[0].name.partition("/")[0]
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={shlex.quote(name)}",
        f"#SBATCH --array=0-{len(runs) - 1}{limit}",
        "#SBATCH --ntasks=1",
        "#SBATCH --gpus=1",
        "#SBATCH --requeue",
        "#SBATCH --signal=TERM@120",
        "# Each task is a run; a task that starts again resumes with ckpt=auto. Give time, memory",
        "# and partition of your cluster: sbatch --time=... --partition=... this file.",
        "set -e",
        f"cd {shlex.quote(os.getcwd())}",
        'case "$SLURM_ARRAY_TASK_ID" in',
    ]
    for number, run in enumerate(runs):
        calls = [shlex.join([*command_of(step), path, *run.words]) for step in steps]
        lines += [f"{number})", *(f"  srun {call}" for call in calls), "  ;;"]
    return "\n".join([*lines, "esac", ""])


def command_of(step: str) -> list[str]:
    """The command that trains or evaluates, with this Python."""
    script = CLONE / "bin" / f"{step}.py"
    if script.is_file():
        return [sys.executable, str(script)]
    return [str(Path(sys.executable).with_name(f"vilmedic-{step}"))]


def digest(run: Planned) -> str:
    """Digest that identifies its configuration."""
    return hashlib.sha256(run.config.to_yaml().encode()).hexdigest()[:16]


def visible_gpus() -> list[str]:
    """Return the usable GPUs, as `CUDA_VISIBLE_DEVICES` names them, without loading torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [one.strip() for one in given.split(",") if one.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return [str(number) for number in range(sum(line.startswith("GPU ") for line in lines))]


def _die_with_parent() -> Callable[[], None]:
    """Return a function that makes a process end with the sweep, even if that is killed."""
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)

    return ask


@contextmanager
def _signals() -> Any:
    """Context in which SIGTERM ends the sweep as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted(
            "running runs have saved their state; the same command resumes.", 128 + number
        )

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(jobs: Sequence[_Job]) -> None:
    """Ask the running runs to save their state, and wait for them."""
    there = [job.process for job in jobs if job.process is not None]
    for process in there:
        with suppress(OSError):
            process.terminate()
    until = time.monotonic() + GRACE
    for process in there:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _reason(log: Path, status: int) -> str:
    """Why a process ended, from the end of its log."""
    if status < 0:
        return f"ended by the signal {signal.Signals(-status).name}"
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        lines = file.read().decode("utf-8", "replace").splitlines()
    last = next((line for line in reversed(lines) if line.startswith("error: ")), "")
    last = last or next((line for line in reversed(lines) if line.strip()), "")
    return f"status {status}" + (f", {escaped(last.strip()[:300])}" if last else "")


def _read(run_dir: Path) -> dict[str, Any]:
    try:
        content = read_json(run_dir / RECORD)
    except (OSError, ValueError, RecursionError):  # not started, or damaged
        return {}
    return content if isinstance(content, dict) else {}


def _done(record: dict[str, Any]) -> list[Any]:
    """Return the finished steps."""
    done = record.get("done")
    return done if isinstance(done, list) else []


def _write(run: Planned, done: Sequence[str]) -> None:
    record = {"configuration": digest(run), "words": list(run.words), "done": list(done)}
    replace_text(run.run_dir / RECORD, json.dumps(record, indent=2) + "\n")
