"""The commands and snippets in the documentation are valid."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.crash.systems import CONVIRT
from tests.finished_runs import Runs
from vilmedic import cli
from vilmedic.config.load import load
from vilmedic.phantom.write import Plan, build
from vilmedic.preparation.command import Next

ROOT = Path(__file__).parents[1]
LOGGERS = re.compile(r"^ +(trainor\.loggers=\S.*)$", re.MULTILINE)
COMMAND = re.compile(r"^ +(?:\.venv/bin/)?python +bin/(train|ensemble|sweep)\.py +(config/.*)$")


def commands() -> list[tuple[str, str, str]]:
    """Page with line, script and arguments of each command, continued lines joined."""
    found = []
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        lines = page.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            if not (match := COMMAND.match(line)):
                continue
            script, words = match.groups()
            rest = number
            while words.endswith("\\"):
                rest += 1
                words = f"{words[:-1]} {lines[rest].strip()}"
            if "..." in words:  # to be filled in by the reader
                continue
            found.append((f"{page.name}:{number + 1}", script, words))
    return found


@pytest.mark.parametrize(("place", "script", "words"), commands())
def test_command_is_accepted(
    place: str,
    script: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    status = getattr(cli, script)([*shlex.split(words, comments=True), "--check"])
    assert status == 0, f"{place}: {capsys.readouterr().err}"


WHOLE = "ensemblor.metrics={"


@pytest.mark.parametrize(
    ("place", "words"), [(place, words) for place, _, words in commands() if WHOLE in words]
)
def test_overriding_all_protocols_replaces_those_of_the_file(
    place: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    path, *overrides = shlex.split(words, comments=True)
    [whole] = [word for word in overrides if word.startswith(WHOLE)]
    named = re.findall(r"[{,] *(\w+):(?= *\{| null)", whole.removeprefix(WHOLE[:-1]))
    assert list(load(path, overrides).ensemblor.metrics) == named, place


def test_overriding_one_protocol_adds_to_those_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    [words] = [words for _, _, words in commands() if "ensemblor.metrics.knn=null" in words]
    path, *overrides = shlex.split(words)
    assert list(load(path, overrides).ensemblor.metrics) == ["zero_shot", "linear_probe", "knn"]


@pytest.mark.parametrize("line", LOGGERS.findall((ROOT / "docs/watching.md").read_text()))
def test_logger_overrides_give_the_named_loggers(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    [word] = shlex.split(line, comments=True)
    found = [next(iter(one)) if isinstance(one, dict) else one for one in named_loggers(word)]
    assert found == re.findall(r"tensorboard|wandb|mlflow", word)


SNIPPET = re.compile(r"^```python\n(.*?)^```$|^    (python bin/embed\.py [^\n]*)$", re.M | re.S)


@pytest.fixture
def demo(trained: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a clone after `make demo`, with a smaller model."""
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "ckpt" / "demo-convirt").symlink_to(trained(CONVIRT))
    plan = Plan(train=64, validate=40, test=40, size=48)
    build(tmp_path / "data" / "phantom", plan, force=False, workers=1)
    (tmp_path / "config").symlink_to(ROOT / "config")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", ["README.md", "docs/after-training.md"])
def test_python_snippets_run(
    page: str, demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SNIPPET.findall((ROOT / page).read_text())
    names: dict[str, object] = {}
    for code, command in found:
        if command:
            assert cli.embed(shlex.split(command)[2:]) == 0, capsys.readouterr().err
        else:
            exec(compile(code, page, "exec"), names)
    assert sum(bool(code) for code, _ in found) >= 1
    assert "Traceback" not in capsys.readouterr().out
    if page == "README.md":
        assert len(found[0][0].splitlines()) == 10
    else:
        assert (demo / "features.npz").is_file()
        assert names["results"]["test"]["samples"] == 40  # type: ignore[index]


def named_loggers(word: str) -> list[object]:
    return load("config/phantom/convirt.yml", [word]).trainor.loggers


def test_no_page_installs_the_other_vilmedic_from_pypi() -> None:
    places = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]
    for folder, kind in (("docs", "md"), ("vilmedic", "py"), ("data", "py"), ("benchmarks", "py")):
        places += ROOT.glob(f"{folder}/**/*.{kind}")
    told = {str(path): re.findall(r"install [^`\n]*vilmedic", path.read_text()) for path in places}
    assert {path: found for path, found in told.items() if found} == {}


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_the_demo_runs_the_three_commands_of_the_readme_and_resumes() -> None:
    readme = (ROOT / "README.md").read_text()
    quick = readme[readme.index("## Quick start") : readme.index("## Five systems")]
    shown = re.findall(r"^    (python (?:data|bin)/.*)$", quick, re.MULTILINE)
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", "demo"], cwd=ROOT, capture_output=True, text=True
    )
    run = re.findall(r"^\.venv/bin/(python (?:data|bin)/.*)$", done.stdout, re.MULTILINE)
    assert len(shown) == 3
    assert shown == run
    recipes = (ROOT / "Makefile").read_text().splitlines()
    trained = [line for line in recipes if "bin/train.py" in line]
    assert len(trained) == 6
    assert all(line.endswith(" trainor.seed=0 ckpt=auto") for line in trained)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_the_label_efficiency_sweep_has_18_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    done = subprocess.run(["make", "--dry-run", "demo-finetune"], capture_output=True, text=True)
    recipe = done.stdout.replace("\\\n", " ").splitlines()
    (swept,) = [shlex.split(line) for line in recipe if "bin/sweep.py" in line]
    assert cli.sweep([*swept[2:], "--check"]) == 0
    assert "18 runs" in capsys.readouterr().out
    (compared,) = [shlex.split(line) for line in recipe if "bin/compare.py" in line]
    assert compared[2:] == ["ckpt/finetune/*", "--plot", "dataset.fraction"]
    page = (ROOT / "docs/fine-tuning.md").read_text().replace("\\\n", " ")
    assert shlex.join(swept[1:]) in {
        shlex.join(shlex.split(line)[1:])
        for line in page.splitlines()
        if line.startswith("    python bin/sweep.py")
    }


def test_files_named_in_pyproject_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"\b(?:vilmedic|distributed|training|evaluation)/[\w/]+\.py\b", text)
    assert len(named) > 10
    for name in named:
        path = name if name.startswith("vilmedic/") else f"vilmedic/{name}"
        assert (ROOT / path).is_file(), name
    for dotted in re.findall(r"\b(?:datasets|training|evaluation)\.(?!py\b)[a-z_]+\b", text):
        assert (ROOT / "vilmedic" / f"{dotted.replace('.', '/')}.py").is_file(), dotted


def test_the_dockerfile_copies_existing_files_and_no_data() -> None:
    text = (ROOT / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for word in line.split()]
    assert {"pyproject.toml", "constraints.txt", "vilmedic", "bin", "config"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if re.fullmatch(r"![\w.]+", line)} == set(copied)
    assert ignored.index("!data") < ignored.index("data/*") < ignored.index("!data/*.py")
    pinned = (ROOT / "constraints.txt").read_text()
    assert len(re.findall(r"^torch(?:vision)?==\S+$", pinned, re.MULTILINE)) == 2


def test_own_data_section_shows_the_builder_and_its_printed_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (ROOT / "README.md").read_text()
    own = readme[readme.index("## Train on your own data") :]
    built = re.search(r"make_folder\.py --root (\S+) --images (\S+) .*--report", own, re.S)
    assert built is not None
    monkeypatch.chdir(tmp_path)
    root = Path(built[1])
    root.mkdir(parents=True)
    (root / "train.report.tok").touch()
    printed = Next(images=Path(built[2])).command(root, "report.tok")
    assert f"\n    {printed}\n" in own


@pytest.mark.parametrize("page", ["convirt", "dalle", "gloria", "simclr", "vae"])
def test_system_pages_say_how_to_resume(page: str) -> None:
    text = (ROOT / f"docs/{page}.md").read_text()
    assert "`ckpt=auto`" in text
    assert "ckpt=last_<seed>" not in text


def test_the_readme_starts_with_data_without_credentials() -> None:
    readme = (ROOT / "README.md").read_text()
    start = readme[: readme.index("## Five systems")]
    assert "mimic" not in start.lower()
    assert start.index("explorer.png") < start.index("## Quick start")
