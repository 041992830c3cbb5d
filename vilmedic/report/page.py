"""`report.html`: everything about a run on one page that needs no network."""

from __future__ import annotations

import base64
import gzip
import json
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vilmedic.config.scores import known_better
from vilmedic.errors import CheckpointError, ConfigError, escaped
from vilmedic.executors.evaluations import shown_folders
from vilmedic.executors.score import improves
from vilmedic.files import replace_text
from vilmedic.report.curves import Line, arrange, read_curves
from vilmedic.report.draw_curves import shorter
from vilmedic.report.gallery import read_gallery
from vilmedic.report.settings import Settings, read_settings
from vilmedic.report.tables import read_evaluations, read_results, shown

CURVES = "curves.png"
PAGE = "report.html"
EXPLORER = "_explorer.json.gz"


def write_report(run_dir: Path) -> Path:
    """Make `report.html` from what a run directory holds.

    Args:
        run_dir: the directory; each part of the page appears when there is something to show.

    Returns:
        The page.

    Raises:
        ConfigError: it is not the directory of a run.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: there is no such run directory.")
    settings = read_settings(run_dir)
    lines = read_curves(run_dir)
    results = read_results(run_dir)
    if not (settings or lines or results):
        raise ConfigError(
            f"{run_dir}: not the directory of a run: it has no config_<seed>.yml, metrics.jsonl or "
            "results_<split>.json. Give a folder that bin/train.py wrote, such as ckpt/<name>."
        )
    explorers = [
        {"split": path.name.removesuffix(EXPLORER), "data": _encoded(path.read_bytes())}
        for path in sorted(_explorers(run_dir), key=_order)
    ]
    page = (
        _environment()
        .get_template("report.html")
        .render(
            name=run_dir.resolve().name,
            tiles=_tiles(run_dir, settings, lines),
            panels=_panels(lines),
            results=results,
            evaluations=read_evaluations(run_dir),
            kinds=read_gallery(run_dir),
            explorers=explorers,
            settings=settings,
            plotly=plotly() if explorers or lines else "",
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


def _explorers(run_dir: Path) -> list[Path]:
    """The file of the embedding explorer of each split, of its newest results."""
    folders = [run_dir, *shown_folders(run_dir)]
    return list({path.name: path for one in folders for path in one.glob(f"*{EXPLORER}")}.values())


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


def _better(run_dir: Path, settings: list[Settings], metric: str | None) -> str | None:
    """Whether a higher or a lower value of a score is better; None when nobody says."""
    better = known_better(str(metric))
    newest = run_dir / f"last_{settings[0].seed}.pth" if settings else None
    if better is None and newest is not None and newest.is_file():
        # A metric of a plugin: the run itself knows. Imported here, as it brings torch.
        from vilmedic.executors.checkpoint import better_of, read_header

        with suppress(CheckpointError):
            state = read_header(newest)
            better = better_of(state) if state.get("metric") == metric else None
    return better


def _tiles(
    run_dir: Path, settings: list[Settings], lines: list[Line]
) -> list[tuple[str, str, str]]:
    """What a reader wants to know first: label, value and small print."""
    tiles = []
    trainor = (settings[0].data.get("trainor") or {}) if settings else {}
    model = (settings[0].data.get("model") or {}) if settings else {}
    if model.get("proto"):
        tiles.append(("model", str(model["proto"]), ""))
    metric = trainor.get("early_stop_metric")
    best, where = None, ""
    better = _better(run_dir, settings, metric)
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


def _epochs(trainor: dict[str, Any]) -> str:
    known = {"epochs": "{} epochs", "batch_size": "batch size {}"}
    return ", ".join(text.format(trainor[key]) for key, text in known.items() if key in trainor)
