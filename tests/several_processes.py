"""Start groups of distributed processes in tests, as torchrun does."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

# Processes forked from a server that has loaded the libraries start immediately.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "vilmedic.training.trainor",
        "vilmedic.evaluation.ensemblor",
        "torch.utils.tensorboard",
        "torch.distributed.fsdp",
    ]
)
ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def free_port() -> int:
    """An unused port."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """The environment variables that torchrun sets for a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_checks(
    checks: Sequence[Callable[[], Any]], folder: Path, world: int = 2, seconds: float = 280
) -> dict[str, list[Any]]:
    """Run functions one after the other in one process group.

    Args:
        checks: functions of a module, each returning tensors and plain values.
        folder: an empty folder.
        world: number of processes.
        seconds: time limit.

    Returns:
        The results of each function by its name, one per process; the traceback as text where it
        failed.
    """
    port = free_port()
    running = []
    for rank in range(world):
        target = (checks, environment(rank, world, port), folder / f"{rank}.pt")
        process = PROCESSES.Process(target=_work, args=target)
        process.start()
        running.append(process)
    deadline = time.monotonic() + seconds
    for process in running:
        process.join(max(1, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
    assert all(process.exitcode == 0 for process in running), [p.exitcode for p in running]
    results = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
    return {check.__name__: [one[check.__name__] for one in results] for check in checks}


def _work(checks: Sequence[Callable[[], Any]], variables: dict[str, str], path: Path) -> None:
    from vilmedic.distributed import processes

    os.environ.update(variables)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with processes.process_group(CPU):
        for check in checks:
            try:
                results[check.__name__] = check()
            except Exception:
                results[check.__name__] = traceback.format_exc()
            torch.save(results, path)


def start_command(
    arguments: Sequence[str], folder: Path, *, script: str = "train", world: int = 2
) -> list[Any]:
    """Start a command in several processes; each writes its output to a file.

    Args:
        arguments: the arguments of the command.
        folder: gets `output_<rank>.txt`.
        script: `train` or `ensemble`.
        world: number of processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    running = []
    for rank in range(world):
        variables = environment(rank, world, port) if world > 1 else {}
        output = folder / f"output_{rank}.txt"
        process = PROCESSES.Process(
            target=_command, args=(script, list(arguments), variables, output)
        )
        process.start()
        running.append(process)
    return running


def finish(running: Sequence[Any], folder: Path, status: int = 0) -> None:
    """Wait for processes and check their exit status."""
    for rank, process in enumerate(running):
        process.join(200)
        output = (folder / f"output_{rank}.txt").read_text()
        assert process.exitcode == status, f"process {rank}: {process.exitcode}\n{output}"


def _command(script: str, arguments: list[str], variables: dict[str, str], output: Path) -> None:
    import sys

    from vilmedic import cli

    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.update(variables)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.exit(getattr(cli, script)(arguments))
