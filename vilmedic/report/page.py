"""`report.html`: everything about a run on one page that needs no network."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vilmedic.checkpoints.checkpoint import improves
from vilmedic.checkpoints.left_out import MOST_TOLD, LeftOut, check_run, read_bytes, read_json
from vilmedic.config.declared import known_better
from vilmedic.config.yaml_source import parse_override, read_file_text, read_yaml
from vilmedic.errors import ConfigError, escaped
from vilmedic.evaluation.evaluations import shown_folders
from vilmedic.files import replace_text
from vilmedic.report.curves import Line, Panel, arrange, read_curves, shorter
from vilmedic.report.gallery import read_gallery
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
        templates()
        .get_template("report.html")
        .render(
            name=run_dir.resolve().name,
            tiles=tiles,
            panels=packed_panels(arrange(lines)),
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


@dataclass
class RunSettings:
    """Configuration and environment of the run with one seed.

    Args:
        seed: its seed.
        lines: each line of the resolved configuration, and whether the command line set it.
        overrides: the words of the command line.
        environment: name and text of what it was run with.
        data: the configuration itself.
    """

    seed: int
    lines: list[tuple[str, bool]]
    overrides: list[str] = field(default_factory=list)
    environment: list[tuple[str, str]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


def read_settings(run_dir: Path, left_out: LeftOut | None = None) -> list[RunSettings]:
    """The settings of every seed of a run directory, the newest first.

    Args:
        run_dir: the directory.
        left_out: takes the files that cannot be read.
    """
    left_out = left_out or LeftOut(run_dir)
    paths = sorted(run_dir.glob("config_*.yml"), key=lambda p: (-p.lstat().st_mtime, p.name))
    found = []
    for path in paths:
        seed = path.stem.removeprefix("config_")
        if not re.fullmatch("[0-9]{1,20}", seed):
            continue
        settings = RunSettings(int(seed), [])
        recorded = run_dir / f"environment_{seed}.json"
        if recorded.exists():  # runs of earlier versions have none
            with left_out.damaged(recorded):
                _read_environment(recorded, settings)
        with left_out.damaged(path):
            _read_configuration(path, settings)
            found.append(settings)
    return found


@cache
def plotly() -> str:
    """The plotting library that the installed package carries, packed."""
    source = resources.files("plotly") / "package_data" / "plotly.min.js"
    return _encoded(gzip.compress(source.read_bytes(), 6, mtime=0))


@cache
def templates() -> Environment:
    """The templates of pages."""
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


def packed_panels(panels: Sequence[Panel]) -> str:
    """The curves for the page's script, packed like everything that holds data."""
    made: list[dict[str, Any]] = []
    for panel in panels:
        names = list(dict.fromkeys(line.name for line in panel.lines))
        short = dict(zip(names, shorter(names), strict=True))
        drawn = [{**asdict(line.thinned()), "short": short[line.name]} for line in panel.lines]
        made.append({**asdict(panel), "lines": drawn})
    return _encoded(gzip.compress(json.dumps(made).encode(), 9, mtime=0)) if made else ""


def _better(
    run_dir: Path, settings: list[RunSettings], metric: str | None, left_out: LeftOut
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
    run_dir: Path, settings: list[RunSettings], lines: list[Line], left_out: LeftOut
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


def _section(settings: list[RunSettings], name: str) -> dict[str, Any]:
    section = settings[0].data.get(name) if settings else None
    return section if isinstance(section, dict) else {}


def _epochs(trainor: dict[str, Any]) -> str:
    length = "steps" if trainor.get("steps") else "epochs"
    known = {length: f"{{}} {length}", "batch_size": "batch size {}"}
    return ", ".join(text.format(trainor[key]) for key, text in known.items() if key in trainor)


def _read_configuration(path: Path, settings: RunSettings) -> None:
    text = read_file_text(str(path))
    try:
        data, marks = read_yaml(text, lambda line: f"line {line}")
    except ConfigError as error:
        raise ConfigError(f"it is no configuration: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError("it is no configuration, which is a mapping of keys to values")
    given = {path for word in settings.overrides for path in _path_of(word)}
    marked = {
        int(mark.origin.removeprefix("line "))
        for key, mark in marks.items()
        if any(tuple(map(str, key[:depth])) in given for depth in range(1, len(key) + 1))
    }
    lines = enumerate(text.splitlines(), start=1)
    settings.lines = [(line, number in marked) for number, line in lines]
    settings.data = data


def _path_of(word: str) -> list[tuple[str, ...]]:
    """The key that a word of the command line sets; none for a word that sets none."""
    try:
        return [parse_override(word).path]
    except ConfigError:
        return []


def _read_environment(path: Path, settings: RunSettings) -> None:
    content = read_json(path)
    overrides = content.get("overrides") or []
    if not isinstance(overrides, list):
        raise ValueError("its overrides are no list")
    settings.environment = _environment_rows(content)
    settings.overrides = [str(word) for word in overrides]


def _environment_rows(content: dict[str, Any]) -> list[tuple[str, str]]:
    command = content.get("command")
    rows = {"command": " ".join(map(str, command)) if isinstance(command, list) else None}
    rows |= {key: content.get(key) for key in ("git_commit", "device", "python", "platform")}
    versions = content.get("versions")
    if isinstance(versions, dict):
        rows["packages"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [(key.replace("_", " "), str(value)) for key, value in rows.items() if value]
