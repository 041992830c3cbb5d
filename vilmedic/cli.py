"""Command-line entry points; torch is loaded only after the command line has been checked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vilmedic.command_line import (
    BROKEN,
    FAILED,
    CommandLine,
    command,
    guarded,
    parse,
    print_error,
    print_text,
    program,
    take,
)
from vilmedic.config.load import Config
from vilmedic.errors import ConfigError, VilmedicError, before_training, escaped
from vilmedic.log import counted

EMBEDDINGS = "--embeddings"
PLAN, CARD, SAMPLES = "--plan", "--card", "--samples"


def train(argv: Sequence[str] | None = None) -> int:
    """Train a model: `bin/train.py`, `vilmedic-train`.

    With `--plan`, estimate its memory and time instead.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        plan = _take_plan(words)
    except ConfigError as error:
        print_error(error)
        return FAILED

    def run(config: Config) -> None:
        if plan is not None:
            from vilmedic.run import plan_training

            print_text(plan_training(config, card=plan.card, samples=plan.samples))
            return
        with before_training():
            from vilmedic.run import run_training

        run_training(config)

    own = [
        (PLAN, "estimate parameters, memory, largest batch and time instead of training"),
        (f"  {CARD} NAME", "the GPU to estimate for (default: h100)"),
        (f"  {SAMPLES} N", "samples of the training split (default: the lines of its file)"),
    ]
    purpose = "Trains a model."
    return command(words, program("train.py"), purpose, run, own=own, training=True)


@dataclass(frozen=True)
class PlanOptions:
    """Options of `--plan`.

    Args:
        card: the GPU.
        samples: of the training split; None takes the lines of its file, where it is there.
    """

    card: str
    samples: int | None


def _take_plan(words: list[str]) -> PlanOptions | None:
    """Take `--plan` and its options out of the words.

    Raises:
        ConfigError: a value is missing or wrong, or belongs to a plan that is not asked for.
    """
    wanted = PLAN in words
    while PLAN in words:
        words.remove(PLAN)
    card = take(words, CARD, "h100")
    samples = take(words, SAMPLES, "368960")
    if not wanted:
        if given := [name for name, one in ((CARD, card), (SAMPLES, samples)) if one is not None]:
            raise ConfigError(f"{given[0]}: belongs to {PLAN}, which is not given.")
        return None
    if samples is not None and not (samples.isdecimal() and 0 < len(samples) < 13 and int(samples)):
        raise ConfigError(f"{SAMPLES}: given '{samples}', allowed: integer >= 1.")
    return PlanOptions(card or "h100", None if samples is None else int(samples))


def ensemble(argv: Sequence[str] | None = None) -> int:
    """Evaluate trained checkpoints: `bin/ensemble.py`, `vilmedic-ensemble`.

    With `--embeddings FILE`, embeddings of another program instead.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        file = take(words, EMBEDDINGS, "FILE.npz")
    except ConfigError as error:
        print_error(error)
        return FAILED

    embeddings = None if file is None else Path(file)

    def run(config: Config) -> None:
        from vilmedic.run import run_ensemble

        if embeddings is not None and not embeddings.is_file():
            raise ConfigError(f"{EMBEDDINGS}: there is no file '{embeddings}'.")
        run_ensemble(config, embeddings)

    own = [
        (
            f"{EMBEDDINGS} FILE",
            "evaluate embeddings of another program instead: an .npz with visual [N, D] and "
            "path [N], linguistic [M, D] and text [M]",
        )
    ]
    purpose = "Evaluates trained checkpoints, or makes images of reports with them."
    return command(words, program("ensemble.py"), purpose, run, own=own)


def report(argv: Sequence[str] | None = None) -> int:
    """Rebuild the pages of runs: `bin/report.py`, `vilmedic-report`.

    Returns:
        The exit status: 0; 1 if files were left out, which the page and the standard error stream
        name; 2 after a message, if there is no run or the page cannot be written.
    """
    given = _report_parser(program("report.py")).parse_args(argv)
    try:
        run_dirs = list(dict.fromkeys(_folders(given.runs)))
        status = max(map(_report, run_dirs))
        if len(run_dirs) > 1 and status != FAILED:
            from vilmedic.report.side_by_side import write_comparison

            print_text(f"Written: {write_comparison(run_dirs)}")
        return status
    except VilmedicError as error:
        print_error(error)
    except OSError as error:
        print_error(ConfigError(f"{error.filename}: the page cannot be written: {error.strerror}."))
    return FAILED


def _report_parser(prog: str) -> argparse.ArgumentParser:
    from vilmedic.script import argument_parser

    parser = argument_parser(
        "Draws curves.png and makes report.html from what is in run directories; of several, also "
        "comparison.html in the folder above: their curves over each other, and one table.",
        prog=prog,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="ckpt/<name>", help="run directories")
    return parser


def _report(run_dir: Path) -> int:
    """Write the report pages of a run; return the exit status."""
    from vilmedic.checkpoints.left_out import MOST_LISTED, LeftOut, check_run

    left_out = LeftOut(run_dir, report=lambda text: print(escaped(text), file=sys.stderr))
    try:
        check_run(run_dir)
        # imported here: it takes seconds, and a missing run is reported before
        from vilmedic.report.curves import write_curves
        from vilmedic.report.page import write_report

        for write in (write_curves, write_report):
            path = write(run_dir, left_out)
            if path is not None:
                print_text(f"Written: {path}")
    except VilmedicError as error:
        print_error(error)
        return FAILED
    except (OSError, ValueError) as error:  # a name with NUL is a ValueError
        reason = getattr(error, "strerror", None) or error
        print_error(ConfigError(f"{run_dir}: no page can be written there: {reason}."))
        return FAILED
    if (more := len(left_out.reasons) - MOST_LISTED) > 0:
        print(f"and {more} more, which {run_dir / 'report.html'} counts", file=sys.stderr)
    return BROKEN if left_out.reasons else 0


def embed(argv: Sequence[str] | None = None) -> int:
    """Embed images and texts with a run: `bin/embed.py`, `vilmedic-embed`."""
    given = _embed_parser(program("embed.py")).parse_args(argv)

    def call() -> None:
        from vilmedic.embed import embed_files

        done = embed_files(given)
        print_text(f"Written: {given.out}" if done else f"{given.out} is complete: nothing to do.")

    return guarded(call)


def _embed_parser(prog: str) -> argparse.ArgumentParser:
    from vilmedic.script import argument_parser, positive

    parser = argument_parser(
        "Embeds images and texts with a finished run: a row for each, with its path or "
        "text. After an interruption, the same command resumes.",
        prog=prog,
    )
    add = parser.add_argument
    add("run", type=Path, help="a run directory, whose best checkpoint is taken, or a checkpoint")
    add("--images", type=Path, help="a folder, a list with one path per line, or a CSV")
    add("--image-column", metavar="NAME", help="the column of the CSV that holds the paths")
    add("--texts", type=Path, metavar="FILE", help="texts, one per line")
    add("--out", type=Path, required=True, metavar="FILE", help=".npz, or .parquet (one of both)")
    add("--ckpt", metavar="NAME", help="a checkpoint of the run directory instead of the best")
    add("--ema", action="store_true", help="take the averaged weights that trainor.ema kept")
    features = ("visual", "visual_backbone")
    add("--features", choices=features, default=features[0], help="of images")
    add("--no-normalize", dest="normalize", action="store_false", help="keep the lengths of rows")
    add("--batch-size", type=positive, default=32, metavar="N", help="inputs at once")
    add("--device", help="cpu, cuda, cuda:N or mps (default: cuda when there is one)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="arithmetic")
    add(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="skip: an input that cannot be read gets a row of nan and its reason",
    )
    add("--workers", type=positive, metavar="N", help="threads that read images (default: cores)")
    add("--force", action="store_true", help="replace a file made from something else")
    return parser


def export(argv: Sequence[str] | None = None) -> int:
    """Export a run as a folder to share: `bin/export.py`, `vilmedic-export`."""
    given = _export_parser(program("export.py")).parse_args(argv)

    def call() -> None:
        if given.public and given.push is None:
            raise ConfigError("--public: belongs to --push, which is not given.")
        from vilmedic.export.push import check_name
        from vilmedic.log import start_console
        from vilmedic.run import load

        if given.push is not None:
            check_name(given.push)
        start_console()
        model = load(given.run, ckpt=given.ckpt, ema=given.ema, device="cpu")
        model.export(
            given.out, onnx=given.onnx, push=given.push, public=given.public, force=given.force
        )

    return guarded(call)


def _export_parser(prog: str) -> argparse.ArgumentParser:
    from vilmedic.script import argument_parser

    parser = argument_parser(
        "Writes a finished run as a folder that others can use without this project: "
        "weights in the layouts of timm, torchvision, transformers and safetensors, and a model "
        "card. Existing files of the same weights are kept.",
        prog=prog,
    )
    add = parser.add_argument
    add("run", help="a run directory, whose best checkpoint is taken, or a checkpoint")
    add("out", type=Path, help="the folder to write")
    add("--ckpt", metavar="NAME", help="a checkpoint of the run directory instead of the best")
    add("--ema", action="store_true", help="take the averaged weights that trainor.ema kept")
    add(
        "--onnx",
        action="store_true",
        help="write ONNX files as well, compared with PyTorch (needs the extra [onnx])",
    )
    add("--push", metavar="USER/NAME", help="upload to this repository of the Hugging Face hub")
    add("--public", action="store_true", help="let everybody see the repository")
    add("--force", action="store_true", help="replace an export of other weights")
    return parser


def compare(argv: Sequence[str] | None = None) -> int:
    """Compare evaluated runs: `bin/compare.py`, `vilmedic-compare`."""
    given = _compare_parser(program("compare.py")).parse_args(argv)

    def call() -> None:
        from vilmedic.comparison.table import compare, text_of
        from vilmedic.log import Progress

        by = [key for word in given.by for key in word.split(",") if key]
        with Progress("Comparing"):
            found = compare(
                _folders(given.runs),
                split=given.split,
                by=by,
                anyway=given.anyway,
                number=given.bootstrap,
            )
        print_text(text_of(found, given.format))
        if given.plot is not None:
            from vilmedic.comparison.plot import write_plot

            print(f"Written: {escaped(str(write_plot(found, given.plot, by)))}", file=sys.stderr)

    return guarded(call)


def _folders(paths: Sequence[Path]) -> list[Path]:
    """Return paths without the files that sweeps and pages write beside runs (`ckpt/sweep/*`)."""
    return [path for path in paths if not path.is_file()] or list(paths)


def _compare_parser(prog: str) -> argparse.ArgumentParser:
    from vilmedic.script import argument_parser, count

    parser = argument_parser(
        "Compares evaluated runs: one row per setting, one column per number, with intervals "
        "and the differences to the best. Runs equal but for name and seed are one setting.",
        prog=prog,
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="ckpt/<name>", help="run directories")
    add("--split", metavar="NAME", help="(default: test, or another split that all runs have)")
    add(
        "--by",
        action="append",
        default=[],
        metavar="KEY",
        help="a row for each value of a key of the configuration, such as dataset.fraction, "
        "whatever else differs; several with commas",
    )
    forms = ("table", "md", "latex", "csv", "html")
    add("--format", choices=forms, default=forms[0], help="of the table")
    along = "draw the numbers along a key, such as dataset.fraction, as comparison_<key>.png"
    add("--plot", metavar="KEY", help=along)
    add(
        "--anyway",
        action="store_true",
        help="compare incomparable runs, leave out unevaluated ones; the table notes it",
    )
    drawn = "resamples behind intervals and differences (default: 1000; 0 for over 100 runs)"
    add("--bootstrap", type=count, metavar="N", help=drawn)
    return parser


def sweep(argv: Sequence[str] | None = None) -> int:
    """Train a grid of runs, or search for the best: `bin/sweep.py`, `vilmedic-sweep`.

    Returns:
        The exit status: 0; 2 after a message, which lists the runs that failed; see `command`.
    """
    given, words = _sweep_parser(program("sweep.py")).parse_known_args(argv)

    def call() -> None:
        line = parse([given.config, *words], program("sweep.py"))
        if line.option not in (None, "--check"):
            raise ConfigError(f"'{line.option}': is an option of train.py and ensemble.py only.")
        if given.search is None:
            only = [name for name in ("trials", "metric") if getattr(given, name) is not None]
            if only:
                raise ConfigError(
                    f"--{one}: belongs to --search, which is not given." for one in only
                )
        (_grid if given.search is None else _search)(given, line)

    return guarded(call)


def _grid(given: argparse.Namespace, line: CommandLine) -> None:
    """Train all combinations."""
    from vilmedic.comparison.grid import plan
    from vilmedic.comparison.sweep import Sweep, slurm_script
    from vilmedic.files import replace_text

    runs = plan(given.config, line.overrides)
    if line.option == "--check":
        print_text(f"ok: {given.config}: {counted(len(runs), 'run')}")
        return
    if given.slurm:
        text = slurm_script(given.config, runs, jobs=given.jobs, evaluate=given.evaluate)
        folder = runs[0].run_dir.parent
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "sweep.sh"
        replace_text(path, text)
        print_text(f"Written: {path}, {counted(len(runs), 'task')}. Start it with: sbatch {path}")
        return
    print_text(f"{counted(len(runs), 'run')}, all checked")
    Sweep(given.config, runs, jobs=given.jobs, evaluate=given.evaluate, report=print_text).start()
    print_text(f"{counted(len(runs), 'run is', 'runs are')} finished, in {runs[0].run_dir.parent}")


def _search(given: argparse.Namespace, line: CommandLine) -> None:
    """Train runs chosen by the scores of earlier ones."""
    from vilmedic.comparison.grid import MOST_RUNS, plan_search
    from vilmedic.comparison.sweep import Sweep

    problems = []
    if given.trials is None or given.trials > MOST_RUNS:
        problems.append(f"--search: allowed: --trials N, at most {MOST_RUNS:,}.")
    if given.slurm:
        problems.append("--slurm: is for a grid; a search chooses each run by those before.")
    if find_spec("optuna") is None:
        problems.append(
            "--search: needs optuna, which the extra [optuna] brings and which is not installed."
        )
    if problems:
        raise ConfigError(problems)
    from vilmedic.comparison.search import direction, opened

    space = plan_search(given.config, line.overrides)
    metric = given.metric or space.corner.config.trainor.early_stop_metric
    sought = f"{metric} ({direction(space, metric)} is better)"
    if line.option == "--check":
        print_text(
            f"ok: {given.config}: {counted(given.trials, 'trial')} of {', '.join(space.axes)} for "
            f"{sought}"
        )
        return
    with opened(space, trials=given.trials, metric=metric) as search:
        run = Sweep(given.config, search.begun(), jobs=given.jobs, evaluate=given.evaluate)
        run.report, run.another, run.ended = print_text, search.another, search.ended
        print_text(f"{counted(given.trials, 'trial')} for {sought}, all ends and values checked")
        try:
            run.start()
        finally:
            if best := search.best():
                print_text(best)
    print_text(
        f"{counted(run.count, 'trial is', 'trials are')} finished, in {space.corner.run_dir}"
    )


def _sweep_parser(prog: str) -> argparse.ArgumentParser:
    from vilmedic.script import argument_parser, positive

    parser = argument_parser(
        "Trains a grid of runs, or with --search those chosen by a search, "
        "and evaluates each. After an interruption, the same command resumes.",
        prog=prog,
        usage=f"{prog} config.yml 'key=value,value' [key=value ...] [options]",
        epilog="Values that vary are separated by commas, or given as log(1e-5,1e-3,5) or "
        "lin(0,1,3); with --search also as ranges: log(1e-5,1e-3), lin(0,1), int(1,8). Each run "
        "has the directory <ckpt_dir>/<name>/<what varies>. --check checks all of them and ends.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("config", metavar="config.yml", help="the configuration of all runs")
    add("--jobs", type=positive, metavar="N", help="runs at a time (default: one per GPU, or one)")
    add("--no-evaluate", dest="evaluate", action="store_false", help="train only")
    add("--slurm", action="store_true", help="write an array script instead of training")
    add("--search", choices=("optuna",), help="choose each run by the scores of earlier ones")
    add("--trials", type=positive, metavar="N", help="runs of a search")
    score = "the score that a search is for (default: trainor.early_stop_metric)"
    add("--metric", metavar="NAME", help=score)
    return parser
