"""The report page `report.html`: a self-contained summary of a run."""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vilmedic.checkpoints.left_out import MOST_LISTED, LeftOut, check_run, read_bytes
from vilmedic.drawing.colours import COLOURS
from vilmedic.errors import escaped
from vilmedic.evaluation.evaluations import shown_folders
from vilmedic.files import replace_text
from vilmedic.report.charts import charts, read_arrays, retrievals
from vilmedic.report.curves import (
    Line,
    Panel,
    arrange,
    best_steps,
    line_labels,
    panel_colours,
    read_curves,
)
from vilmedic.report.gallery import read_gallery
from vilmedic.report.settings import RunSettings, data_of, read_settings, score_of, section
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
    score, better = score_of(run_dir, settings, left_out)
    best = best_steps(lines, score, better)
    panels = arrange(lines, score=score, best=best)
    explorers = _explorers(run_dir, left_out)
    results, drawn, examples = read_results(run_dir, left_out), [], []
    for one in results:
        explorer = next((e["content"] for e in explorers if e["split"] == one.split), None)
        arrays = read_arrays(one, left_out)
        names = explorer["labels"] if explorer else list(map(str, arrays.get("label_names", ())))
        drawn.append(charts(one, arrays, names))
        examples += [found] if (found := retrievals(one, arrays, explorer)) else []
    page = (
        templates()
        .get_template("report.html")
        .render(
            name=run_dir.resolve().name,
            system=section(settings, "model").get("proto") or "",
            data=(results[0].data if results else "") or data_of(settings),
            tiles=_tiles(settings, lines, score, better, best),
            panels=packed_panels(panels),
            folded=sum(panel.folded for panel in panels),
            marked=bool(best),
            results=results,
            charts=_packed(drawn) if any(drawn) else "",
            drawn=[bool(one) for one in drawn],
            examples=examples[:1],
            evaluations=read_evaluations(run_dir, left_out),
            kinds=read_gallery(run_dir, left_out),
            explorers=explorers,
            settings=settings,
            plotly=plotly() if explorers or lines or any(drawn) else "",
            left_out=left_out.reasons[:MOST_LISTED],
            more_left_out=max(0, len(left_out.reasons) - MOST_LISTED),
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
def templates() -> Environment:
    """The templates of pages."""
    loader = PackageLoader("vilmedic.report", "templates")
    # Every value is escaped, control characters too: reports and names are text from outside.
    environment = Environment(
        loader=loader,
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["palette"] = Markup(json.dumps(COLOURS))
    return environment


def _shown(value: object) -> object:
    return escaped(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _encoded(packed: bytes) -> str:
    return base64.b64encode(packed).decode("ascii")


def _packed(value: Any) -> str:
    """A value for the page's script, packed like everything that holds data."""
    return _encoded(gzip.compress(json.dumps(value).encode(), 9, mtime=0))


def _explorers(run_dir: Path, left_out: LeftOut) -> list[dict[str, Any]]:
    """The embedding explorer of each split, of its newest results: packed and as its content."""
    folders = [run_dir, *shown_folders(run_dir, left_out)]
    newest = {path.name: path for one in folders for path in one.glob(f"*{EXPLORER}")}
    found = []
    for path in sorted(newest.values(), key=_order):
        with left_out.damaged(path):
            packed = read_bytes(path)
            content = _read_explorer(packed)
            split = path.name.removesuffix(EXPLORER)
            found.append({"split": split, "data": _encoded(packed), "content": content})
    return found


def _read_explorer(packed: bytes) -> dict[str, Any]:
    """Read the data of an explorer; refuses data that would break the page's script.

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
    lists += [samples["labels"]] if samples.get("labels") is not None else []
    lists += [one[axis] for one in content["maps"] for axis in ("x", "y")]
    lists += [one[key] for one in content["neighbours"] for key in ("index", "cosine")]
    if not content["maps"] or any(len(one) != len(lists[0]) for one in lists):
        raise ValueError("its lists are not of one length")
    if not all(isinstance(text, str) for text in (*samples["report"], *content["labels"])):
        raise ValueError("its reports and labels are not text")
    if any(i not in range(len(lists[0])) for one in content["neighbours"] for i in _flat(one)):
        raise ValueError("it has neighbours that are no samples")
    return dict(content)


def _flat(neighbours: dict[str, Any]) -> Iterator[int]:
    return (i for row in neighbours["index"] for i in row)


def _order(path: Path) -> tuple[bool, str]:
    return not path.name.startswith("test"), path.name


def packed_panels(panels: Sequence[Panel]) -> str:
    """The curves for the page's script."""
    colours = panel_colours(panels)
    made: list[dict[str, Any]] = []
    for panel in panels:
        names = list(dict.fromkeys(line.name for line in panel.lines))
        short = dict(zip(names, line_labels(names), strict=True))
        drawn = [
            {**asdict(line.thinned()), "short": short[line.name], "colour": colours[line.name]}
            for line in panel.lines
        ]
        made.append({**asdict(panel), "lines": drawn})
    return _packed(made) if made else ""


def _tiles(
    settings: Sequence[RunSettings],
    lines: Sequence[Line],
    score: str,
    better: str | None,
    best: dict[int, int],
) -> list[tuple[str, str, str]]:
    """How the run went: label, value and small print."""
    tiles = []
    trainor = section(settings, "trainor")
    values = {
        line.seed: line.values[line.steps.index(best[line.seed])]
        for line in lines
        if line.name == score and line.seed in best
    }
    if values:
        seed = (max if better == "higher" else min)(values, key=values.__getitem__)
        where = f"{score}, step {best[seed]:,}, seed {seed}"
        tiles.append(("best score", shown(values[seed]), where))
    if lines:
        steps = max(step for line in lines for step in line.steps)
        tiles.append(("steps", f"{steps:,}", _epochs(trainor)))
    if settings:
        seeds = ", ".join(str(one.seed) for one in settings)
        tiles.append(("seed" if len(settings) == 1 else "seeds", seeds, ""))
    rates = sorted(v for line in lines if line.name == "samples_per_second" for v in line.values)
    if rates:
        device = dict(settings[0].environment).get("device", "") if settings else ""
        tiles.append(("samples per second", shown(rates[len(rates) // 2]), device))
    return tiles


def _epochs(trainor: dict[str, Any]) -> str:
    length = "steps" if trainor.get("steps") else "epochs"
    known = {length: f"{{}} {length}", "batch_size": "batch size {}"}
    return ", ".join(text.format(trainor[key]) for key, text in known.items() if key in trainor)
