"""Compare two commits bit by bit: train and evaluate every system at both.

    python -m tests.same_numbers dd2cdab main
    python -m tests.same_numbers dd2cdab HEAD --processes 2 --folder /tmp/numbers

For refactorings that must not change a number. Each commit is checked out in a temporary worktree,
where every system is trained for a few steps on the same phantom data set and evaluated, with the
commands of that commit, a fixed seed, one thread, and one process per command. Then everything in
`last_3.pth` except the configuration, every line of `metrics.jsonl` and every number of
`results_test.json` is compared: numbers and texts by equality, tensors bit by bit. A table lists
the number of differences; the exit status is 1 if there are any.

With `--folder` runs are kept, and commits that have runs there are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.crash.systems import CONVIRT, DALLE, SIMCLR, SYSTEMS, System

ROOT = Path(__file__).parents[1]
ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}
TRAINING = ("trainor.num_workers=0", "trainor.save_every=null")
EVALUATION = (
    "ensemblor.batch_size=8",
    "ensemblor.num_workers=0",
    "ensemblor.precision=fp32",
    "ensemblor.device=cpu",
    "ensemblor.splits=[test]",
    "ensemblor.baselines=[]",
    "ensemblor.report=False",
)
UNCOMPARED = ("config", "checkpoints", "tf32")
"""Values that describe where a run was made rather than what was computed."""


@dataclass(frozen=True)
class Comparison:
    """A run to compare between the commits.

    Args:
        name: name of the run.
        system: the system to train.
        words: overrides for training and evaluation.
        evaluation: configuration of the evaluation, if it differs.
        evaluation_words: overrides for the evaluation only.
    """

    name: str
    system: System
    words: tuple[str, ...] = ()
    evaluation: str | None = None
    evaluation_words: tuple[str, ...] = ("~ensemblor.post_processing",)


PROMPTS = (
    "~ensemblor.metrics.prompted_findings.prompts",
    "ensemblor.metrics.prompted_findings.prompts.clear={prompt: Clear lungs.}",
    "ensemblor.metrics.prompted_findings.prompts.large={prompt: Severe cardiomegaly.}",
    "ensemblor.metrics.prompted_findings.num_images=2",
)
COMPARISONS = (
    *(Comparison(one.name, one) for one in SYSTEMS if one not in (SIMCLR, DALLE)),
    Comparison("DALLE", DALLE, evaluation_words=PROMPTS),
    Comparison("SimCLR", SIMCLR, evaluation="config/phantom/simclr-eval.yml"),
    Comparison(
        "ConVIRT-whole",
        CONVIRT,
        ("model.forward_batch_size=null", "trainor.precision=bf16", "trainor.batch_size=8"),
    ),
)


def main() -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commits", nargs=2, metavar="COMMIT")
    parser.add_argument("--folder", type=Path, help="keep the runs here and use them again")
    parser.add_argument("--processes", type=int, default=1, help="processes that train together")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).absolute()
        commits = [_git("rev-parse", "--short=12", name) for name in given.commits]
        found = [_runs(commit, folder, given.processes) for commit in commits]
    rows = [("", "values", "differ", "missing", "first difference")]
    for name in found[0]:
        rows.append((name, *_compare(found[0][name], found[1][name])))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    print(f"{' against '.join(commits)}, {given.processes} process(es)")
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:4], widths[1:]), row[4]]))
    return int(any(row[2:4] != ("0", "0") for row in rows[1:]))


def _runs(commit: str, folder: Path, processes: int) -> dict[str, dict[str, Any]]:
    """All values that a commit's runs compute, by run name."""
    data = folder / "data"
    runs = folder / f"{commit}-{processes}"
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary) / "tree"
        try:
            for one in COMPARISONS:
                if (runs / one.name / "done").exists():
                    continue
                if not tree.exists():
                    _git("worktree", "add", "--detach", str(tree), commit)
                if not data.exists():
                    sizes = ("--train=44", "--validate=16", "--test=24", "--size=48", "--seed=0")
                    _command(tree, "data/make_phantom.py", f"--root={data}", *sizes)
                shutil.rmtree(runs / one.name, ignore_errors=True)  # left by an interrupted run
                _run(tree, one, data, runs, processes)
                (runs / one.name / "done").touch()
        finally:
            if tree.exists():
                _git("worktree", "remove", "--force", str(tree))
    return {one.name: dict(_numbers(runs / one.name)) for one in COMPARISONS}


def _run(tree: Path, one: Comparison, data: Path, runs: Path, processes: int) -> None:
    """Train a system and evaluate it."""
    print(f"{runs.name}: {one.name}", file=sys.stderr, flush=True)
    config, *words = one.system.arguments(data)
    place = (f"ckpt_dir={runs}", f"name={one.name}")
    _command(tree, "bin/train.py", config, *words, *TRAINING, *one.words, *place, many=processes)
    words = [word for word in words if not word.startswith(("trainor.", "~validator", "validator"))]
    if one.evaluation is not None:
        config = one.evaluation
        sizes = [f"dataset.image.{side}=32" for side in ("resize", "crop")]
        roots = [f"dataset.{part}.root={data}" for part in ("image", "label")]
        words = [word for word in words if not word.startswith("dataset.")] + sizes + roots
    words += [word for word in one.words if not word.startswith("trainor.")]
    _command(tree, "bin/ensemble.py", config, *words, *EVALUATION, *one.evaluation_words, *place)


def _command(tree: Path, *words: str, many: int = 1) -> None:
    """Run a command of a worktree; its output is shown only if it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={many}"]
    command = [sys.executable, *(launcher if many > 1 else []), *words]
    environment = os.environ | ONE_THREAD
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def _git(*words: str) -> str:
    command = ["git", *words]
    return subprocess.run(
        command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


def _numbers(run: Path) -> Iterator[tuple[str, Any]]:
    """Every value in the files of a run, with its location."""
    state = torch.load(run / "last_3.pth", map_location="cpu", weights_only=True)
    yield from _leaves("last_3.pth", state)
    for number, line in enumerate((run / "metrics.jsonl").read_text().splitlines()):
        yield from _leaves(f"metrics.jsonl:{number}", json.loads(line))
    for path in sorted(run.rglob("results_*.json")):
        yield from _leaves(path.name, json.loads(path.read_text()))


def _leaves(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in UNCOMPARED:
                yield from _leaves(f"{place} {key}", inner)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _leaves(f"{place} {number}", inner)
    else:
        yield place, value


def _compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, str, str, str]:
    """Count all, different and missing values; also return the first difference."""
    missing = sorted(before.keys() ^ after.keys())
    differ = [
        name for name in before.keys() & after.keys() if not _equal(before[name], after[name])
    ]
    first = next(iter(sorted(differ) or missing), "")
    return str(len(before)), str(len(differ)), str(len(missing)), first


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are equal, tensors bit by bit."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other) and (one == other or (one != one and other != other))
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(value.contiguous().view(-1).view(torch.uint8) for value in (one, other)))


if __name__ == "__main__":
    sys.exit(main())
