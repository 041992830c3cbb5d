"""`report.html`: everything about a run on one page that needs no network."""

from __future__ import annotations

import base64
import gzip
import io
import json
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vilmedic.checkpoints.score import improves
from vilmedic.config.scores import known_better
from vilmedic.errors import escaped
from vilmedic.evaluation.evaluations import shown_folders
from vilmedic.files import replace_text
from vilmedic.report.curves import Line, arrange, read_curves
from vilmedic.report.draw_curves import shorter
from vilmedic.report.gallery import read_gallery
from vilmedic.report.left_out import MOST_TOLD, LeftOut, check_run, read_bytes
from vilmedic.report.settings import Settings, read_settings
from vilmedic.report.tables import read_evaluations, read_results, shown

CURVES = "curves.png"
PAGE = "report.html"
EXPLORER = "_explorer.json.gz"
MOST_UNPACKED = 400_000_000  # bytes of an explorer's data


def write_report(run_dir: Path, left_out: LeftOut | None = None) -> Path:
    """Make `report.html` from what a run directory holds.

    Args:
        run_dir: the directory; each part of the page appears when there is something to show.
        left_out: takes the files that cannot be read; the page names them.

    Returns:
        The page.

    Raises:
        ConfigError: it is not the directory of a run.
        OSError: the page cannot be written.
    """
    check_run(run_dir)
    left_out = left_out or LeftOut(run_dir)
    settings = read_settings(run_dir, left_out)
    lines = read_curves(run_dir, left_out)
    results = read_results(run_dir, left_out)
    evaluations = read_evaluations(run_dir, left_out)
    kinds = read_gallery(run_dir, left_out)
    explorers = _explorers(run_dir, left_out)
    tiles = _tiles(run_dir, settings, lines, left_out)
    page = (
        _environment()
        .get_template("report.html")
        .render(
            name=run_dir.resolve().name,
            tiles=tiles,
            panels=_panels(lines),
            results=results,
            evaluations=evaluations,
            kinds=kinds,
            explorers=explorers,
            settings=settings,
            plotly=plotly() if explorers or lines else "",
            left_out=left_out.reasons[:MOST_TOLD],
            more_left_out=max(0, len(left_out.reasons) - MOST_TOLD),
        )
    )
    path = run_dir / PAGE
    replace_text(path, page)
    return path


@cache
def plotly() -> str:
    """The plotting library that the installed package carries, packed."""
    source = resources.files("plotly") / "package_data" / "plotly.min.js"
    return _encoded(gzip.compress(source.read_bytes(), 6, mtime=0))


@cache
def _environment() -> Environment:
    loader = PackageLoader("vilmedic.report", "templates")
    # Every value is escaped, control characters too: reports and names are text from outside.
    return Environment(
        loader=loader,
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: object) -> object:
    return escaped(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _encoded(packed: bytes) -> str:
    return base64.b64encode(packed).decode("ascii")


def _explorers(run_dir: Path, left_out: LeftOut) -> list[dict[str, str]]:
    """The data of the embedding explorer of each split, of its newest results."""
    folders = [run_dir, *shown_folders(run_dir, left_out)]
    newest = {path.name: path for one in folders for path in one.glob(f"*{EXPLORER}")}
    found = []
    for path in sorted(newest.values(), key=_order):
        with left_out.damaged(path):
            packed = read_bytes(path)
            _check_explorer(packed)
            split = path.name.removesuffix(EXPLORER)
            found.append({"split": split, "data": _encoded(packed)})
    return found


def _check_explorer(packed: bytes) -> None:
    """Refuse data that the page's script would stumble over.

    Raises:
        Exception: of any kind; it is damaged.
    """
    with gzip.open(io.BytesIO(packed)) as stream:
        text = stream.read(MOST_UNPACKED + 1)
    if len(text) > MOST_UNPACKED:
        raise ValueError(f"it unpacks to more than {MOST_UNPACKED:,} bytes")
    content = json.loads(text)
    samples = content["samples"]
    lists = [samples[key] for key in ("line", "report", "image", "thumbnail")]
    lists += [samples["labels"]] if samples["labels"] is not None else []
    lists += [one[axis] for one in content["maps"] for axis in ("x", "y")]
    lists += [one[key] for one in content["neighbours"] for key in ("index", "cosine")]
    if not content["maps"] or any(len(one) != len(lists[0]) for one in lists):
        raise ValueError("its lists are not of one length")
    if not all(isinstance(text, str) for text in (*samples["report"], *content["labels"])):
        raise ValueError("its reports and labels are not text")


def _order(path: Path) -> tuple[bool, str]:
    return not path.name.startswith("test"), path.name


def _panels(lines: list[Line]) -> str:
    """The curves for the page's script, packed like everything that holds data."""
    panels: list[dict[str, Any]] = []
    for panel in arrange(lines):
        names = list(dict.fromkeys(line.name for line in panel.lines))
        short = dict(zip(names, shorter(names), strict=True))
        drawn = [{**asdict(line.thinned()), "short": short[line.name]} for line in panel.lines]
        panels.append({**asdict(panel), "lines": drawn})
    return _encoded(gzip.compress(json.dumps(panels).encode(), 9, mtime=0)) if panels else ""


def _better(
    run_dir: Path, settings: list[Settings], metric: str | None, left_out: LeftOut
) -> str | None:
    """Whether a higher or a lower value of a score is better; None when nobody says."""
    better = known_better(str(metric))
    newest = run_dir / f"last_{settings[0].seed}.pth" if settings else None
    if better is None and newest is not None and newest.is_file():
        # A metric of a plugin: the run itself knows. Imported here, as it brings torch.
        from vilmedic.checkpoints.checkpoint import better_of, read_header

        with left_out.damaged(newest):
            state = read_header(newest)
            better = better_of(state) if state.get("metric") == metric else None
    return better


def _tiles(
    run_dir: Path, settings: list[Settings], lines: list[Line], left_out: LeftOut
) -> list[tuple[str, str, str]]:
    """What a reader wants to know first: label, value and small print."""
    tiles = []
    trainor, model = (_section(settings, name) for name in ("trainor", "model"))
    if model.get("proto"):
        tiles.append(("model", str(model["proto"]), ""))
    metric = trainor.get("early_stop_metric")
    best, where = None, ""
    better = _better(run_dir, settings, metric, left_out)
    for line in lines:
        if line.name == metric and better is not None:
            for step, value in zip(line.steps, line.values, strict=True):
                if improves(value, best, better):
                    best, where = value, f"{metric}, step {step:,}, seed {line.seed}"
    if best is not None:
        tiles.append(("best score", shown(best), where))
    if lines:
        steps = max(step for line in lines for step in line.steps)
        tiles.append(("steps", f"{steps:,}", _epochs(trainor)))
    if settings:
        seeds = ", ".join(str(one.seed) for one in settings)
        tiles.append(("seed" if len(settings) == 1 else "seeds", seeds, ""))
    rates = sorted(v for line in lines if line.name == "samples_per_second" for v in line.values)
    if rates:
        device = dict(settings[0].environment).get("device", "") if settings else ""
        tiles.append(("samples a second", shown(rates[len(rates) // 2]), device))
    return tiles


def _section(settings: list[Settings], name: str) -> dict[str, Any]:
    section = settings[0].data.get(name) if settings else None
    return section if isinstance(section, dict) else {}


def _epochs(trainor: dict[str, Any]) -> str:
    known = {"epochs": "{} epochs", "batch_size": "batch size {}"}
    return ", ".join(text.format(trainor[key]) for key, text in known.items() if key in trainor)
