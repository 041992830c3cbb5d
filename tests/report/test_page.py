from __future__ import annotations

import base64
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from tests.report.runs import EVIL, results, write_curves, write_explorer, write_run
from vilmedic import cli
from vilmedic.errors import ConfigError
from vilmedic.evaluation.evaluations import EvaluationFolder
from vilmedic.report.page import write_report
from vilmedic.report.settings import read_settings


class Outline(HTMLParser):
    """Tags and attributes of a page, without scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def outline(path: Path) -> Outline:
    read = Outline()
    read.feed(path.read_text())
    return read


def test_the_page_has_every_part_and_loads_nothing_from_the_network(tmp_path: Path) -> None:
    page = outline(write_report(write_run(tmp_path / "demo")))

    sections = {attrs.get("id") for tag, attrs in page.tags if tag == "section"}
    parts = {"answer", "results", "retrievals", "explorer", "kind-1", "curves", "configuration"}
    assert parts <= sections
    for tag, attrs in page.tags:
        for name in ("src", "href", "action", "poster", "srcset"):
            value = attrs.get(name)
            assert not value or value.startswith(("data:", "#")), (tag, name, value[:80])
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert "default-src 'none'" in policy  # type: ignore[operator]
    for expected in ("ConVIRT", "0.100", "validation_loss, step 30, seed 1", "0.900 to 0.950"):
        assert expected in page.text


def test_the_page_shows_the_explorer_of_the_latest_evaluation(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "demo")
    about = {"system": "ConVIRT", "checkpoints": results()["checkpoints"], "generated": False}
    one = EvaluationFolder(run_dir, "best-1", ema=False, settings={}, about=about)
    one.write(results())
    write_explorer(one.path, 7)
    page = outline(write_report(run_dir))
    assert one.name in page.text
    packed = base64.b64encode((one.path / "test_explorer.json.gz").read_bytes()).decode()
    assert packed in page.text
    assert "data-explorer-1" not in (run_dir / "report.html").read_text()


@pytest.mark.parametrize(("better", "best"), [("lower", "0.250"), ("higher", "4.000")])
def test_the_best_plugin_score_uses_the_stored_direction(
    tmp_path: Path, better: str, best: str
) -> None:
    (tmp_path / "config_1.yml").write_text("trainor: {early_stop_metric: validation_fid}")
    scores = [{"seed": 1, "step": n, "validation_fid": v} for n, v in enumerate((4, 0.25, 2))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in scores))
    assert "best score" not in outline(write_report(tmp_path)).text
    state = {"model": {"w": torch.ones(1)}, "metric": "validation_fid", "better": better}
    torch.save(state, tmp_path / "last_1.pth")
    page = outline(write_report(tmp_path)).text
    assert "best score" in page
    assert best in page[page.index("best score") :][:60]


def test_external_text_is_escaped(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path))
    text = path.read_text()
    assert "onerror" in text
    assert EVIL not in text
    assert "<img src=x" not in text
    assert "alert(1)</script>" not in text
    assert not [a for t, a in outline(path).tags if "onerror" in a]


def test_control_characters_are_escaped(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    for path in run_dir.glob("results_*.json"):
        path.write_text(path.read_text().replace('"Mass"', '"Mass\\u001b[2J\\u009b"'))
    text = write_report(run_dir).read_text()
    assert "Mass\\x1b[2J\\x9b" in text
    assert not {"\x1b", "\x9b"} & set(text)


def test_parts_without_content_are_omitted(tmp_path: Path) -> None:
    write_curves(tmp_path, seed=1)
    page = outline(write_report(tmp_path))
    sections = [a["id"] for t, a in page.tags if t == "section" and "id" in a]
    assert sections == ["answer", "curves"]


def test_a_rebuilt_page_is_the_same(tmp_path: Path) -> None:
    write_run(tmp_path)
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such run directory"):
        write_report(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"it has no config_<seed>\.yml"):
        write_report(tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a")
    assert cli.report([str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.split() == [
        "Written:",
        f"{tmp_path}/a/curves.png",
        "Written:",
        f"{tmp_path}/a/report.html",
    ]
    assert cli.report([str(tmp_path / "b")]) == 2
    assert re.match(r"error: .*/b: there is no such run directory", capsys.readouterr().err)
    for words, status in ([], 2), (["--help"], 0):
        with pytest.raises(SystemExit) as ended:
            cli.report(words)
        assert ended.value.code == status
    out, err = capsys.readouterr()
    assert "are required: ckpt/<name>" in err
    assert "Draws curves.png" in out


def test_lines_set_on_the_command_line_are_marked(tmp_path: Path) -> None:
    [settings] = read_settings(write_run(tmp_path))

    marked = [line.strip() for line, is_marked in settings.lines if is_marked]
    assert marked == ["name: demo", "batch_size: 8", "optim_params:", "lr: 0.001"]
    assert settings.data["model"] == {"proto": "ConVIRT"}
    assert dict(settings.environment)["packages"] == "torch 2"
    assert "git commit" not in dict(settings.environment)


def test_the_latest_seed_comes_first(tmp_path: Path) -> None:
    write_run(tmp_path, seeds=(1, 2))
    os.utime(tmp_path / "config_2.yml", (1, 1))
    assert [one.seed for one in read_settings(tmp_path)] == [1, 2]


def test_a_run_without_environment_file_is_shown(tmp_path: Path) -> None:
    (tmp_path / "config_7.yml").write_text("name: x\n")
    (tmp_path / "config_evil.yml").write_text("a: [")
    [settings] = read_settings(tmp_path)
    assert settings.lines == [("name: x", False)]
    assert settings.environment == []
