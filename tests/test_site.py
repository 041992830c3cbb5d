"""The documentation site: Markdown links, generated pages, the reference."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import markdown
import pytest
from markdown_it import MarkdownIt
from mkdocs.config import load_config
from pymdownx.slugs import slugify

from docs.generate import diagrams, pages, reference
from vilmedic.config.load import root_signature
from vilmedic.config.signature import read_signature
from vilmedic.config.types import instance_of
from vilmedic.config.wording import describe
from vilmedic.registry import REGISTRIES

ROOT = Path(__file__).parents[1]
SOURCES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
SOURCES += sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))


def anchors(path: Path) -> set[str]:
    """The anchors of a Markdown file as a repository host generates them."""
    slug = slugify(case="lower")
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    heads = re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE)
    return {slug(re.sub(r"`|\[([^]]*)\]\([^)]*\)", r"\1", head), "-") for head in heads}


@pytest.mark.parametrize("source", SOURCES)
def test_markdown_links_also_work_on_a_repository_host(source: str) -> None:
    text = (ROOT / source).read_text()
    assert pages.wrong_external_links(text) == []
    for target, match in pages.repository_links(text, source):
        assert (ROOT / target).exists(), match["target"]
    for _, target in pages.links(text):
        file, _, anchor = target.partition("#")
        if anchor and "://" not in target:
            path = (ROOT / source).parent / file if file else ROOT / source
            assert anchor in anchors(path), target


@pytest.mark.parametrize("source", SOURCES)
def test_site_and_repository_host_parse_markdown_alike(source: str) -> None:
    """Python-Markdown and CommonMark find the same lists, tables and code blocks."""
    text = (ROOT / source).read_text()
    host = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    extensions = ["tables", "pymdownx.superfences", "attr_list", "def_list", "toc"]
    site = markdown.markdown(text, extensions=extensions)
    for tag in ("li", "ul", "ol", "pre", "table", "tr", "h2", "h3", "p", "a", "code", "img"):
        found = [len(re.findall(f"<{tag}[ >/]", html)) for html in (host, site)]
        assert found[0] == found[1], tag


def test_links_are_rewritten_to_site_pages() -> None:
    text = "See [docs/vae.md](docs/vae.md#memory), [a file](config/CLIP/vae.yml), `[x](y)`, [e](https://a.b/c)."
    assert pages.turned(text, "README.md", "index.md") == (
        "See [VAE](vae.md#memory), [a file](files/config/CLIP/vae.yml.md), `[x](y)`, "
        "[e](https://a.b/c)."
    )
    assert pages.turned("[a](../README.md)", "docs/vae.md", "vae.md") == "[a](index.md)"
    assert pages.turned("[a](vae.md)", "docs/notebooks/n.ipynb", "notebooks/n.md") == "[a](vae.md)"
    text = "[a](../x.md)\n\n    [code](x.md)\n\n```\n[code](x.md)\n```\n"
    assert pages.turned(text, "docs/notebooks/n.ipynb", "notebooks/n.md") == text


def test_external_links_are_validated_by_form() -> None:
    good = "[a](https://arxiv.org/abs/1) [b](http://x.org) [c](mailto:a@b.org) [d](data.md)"
    assert pages.wrong_external_links(good) == []
    assert pages.wrong_external_links("[a](https://localhost/x)") == [
        "link without a host: https://localhost/x"
    ]
    assert pages.wrong_external_links("[a](https:/arxiv.org)") != []
    assert pages.wrong_external_links("[a](htps://arxiv.org)") != []


def test_a_notebook_is_a_page_with_its_outputs() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {
            "cell_type": "code",
            "source": ["print(1)"],
            "outputs": [
                {"name": "stderr", "text": ["a warning"]},
                {"name": "stdout", "text": ["1\n"]},
                {"data": {"image/png": "aGVsbG8=", "text/plain": ["<Image>"]}},
            ],
        },
    ]
    text, pictures = pages.notebook({"cells": cells}, "first")
    assert text == (
        "# Title\ntext\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n"
        "![What the cell shows](first-1.png)\n"
    )
    assert pictures == {"first-1.png": b"hello"}


def test_the_reference_has_every_key_with_its_meaning() -> None:
    text = reference.configuration()
    for name, param in root_signature().settable.items():
        assert f"`{name}`{{ #{name} }}" in text or f"## {name}" in text
        instance = instance_of(param.type)
        read = read_signature(instance.path) if instance else None
        for key in read.settable if read else ():
            entry = f"`{name}.{key}`{{ #{name}.{key} }}\n:   *"
            assert entry in text
            assert read.docs()[key]  # type: ignore[union-attr]
    entry = text.partition("#trainor.batch_size")[2].partition("\n\n")[0]
    given = read_signature("vilmedic.config.sections.TrainorSection")
    assert given is not None
    kind = describe(given.params["batch_size"].type)
    assert entry == f" }}\n:   *{kind}; default `32`*"


@pytest.mark.parametrize("kind", REGISTRIES)
def test_the_reference_has_every_name_of_a_registry(kind: str) -> None:
    text = reference.registered(kind, REGISTRIES[kind])
    for name in REGISTRIES[kind].names():
        read = read_signature(REGISTRIES[kind].location(name))
        assert f"\n## {name}\n" in text
        for key in read.settable if read else ():
            assert f"`{key}`{{ #{name.lower()}.{key.lower()} }}" in text


def test_every_public_name_is_in_the_python_reference() -> None:
    import vilmedic

    listed = {path.rpartition(".")[2] for paths in reference.PUBLIC.values() for path in paths}
    assert set(vilmedic.__all__) <= listed
    text = reference.python()
    assert "def" not in re.findall(r"```python\n(.*?)\(", text)
    for name in listed:
        assert f"\n### {name}\n" in text
    assert "#### TrainedModel.zero_shot" in text
    assert "- `CheckpointError`: there is no checkpoint" in text


def test_docstring_prose_is_escaped() -> None:
    assert reference.prose("a <b> *c* [D] `<x>[*]`") == r"a &lt;b> \*c\* \[D\] `<x>[*]`"


def test_broken_links_anchors_and_unlisted_pages_fail_the_build(tmp_path: Path) -> None:
    """Build three small pages with the settings of the site; exactly the broken parts fail."""
    settings = (ROOT / "mkdocs.yml").read_text()
    validation = settings[settings.index("validation:") : settings.index("not_in_nav:")]
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text(
        f"site_name: x\ntheme: mkdocs\nplugins: []\n{validation}nav: [index.md]\n"
    )
    (tmp_path / "docs/index.md").write_text("# A\n\n[a](no.md) [b](#nowhere)\n")
    (tmp_path / "docs/forgotten.md").write_text("# B\n")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert all(word in done.stderr for word in ("no.md", "#nowhere", "forgotten.md"))


def test_diagrams_match_their_sources() -> None:
    made = diagrams.pictures()
    assert {path.name for path in made} == {path.name for path in ROOT.glob("docs/images/*.svg")}
    for path, svg in made.items():
        assert path.read_text() == svg, "run python -m docs.generate.diagrams"
        assert "prefers-color-scheme: dark" in svg
        ElementTree.fromstring(svg)
    shown = "".join((ROOT / source).read_text() for source in SOURCES)
    assert all(f"images/{path.name})" in shown for path in made)


def test_boxes_and_arrows_of_a_diagram() -> None:
    text = "title T <x>\nrow a data A | b model B / more\nrow c loss C\n"
    text += "arrow a -> c: why\narrow a -> b"
    diagram = diagrams.read(text)
    a, b, c = diagram.boxes.values()
    assert (a.row, b.row, c.row) == (0, 0, 1)
    assert a.x + a.width < b.x
    assert c.width == diagrams.WIDTH - 2 * diagrams.MARGIN
    assert diagram.arrows == [("a", "c", "why"), ("a", "b", "")]
    svg = diagrams.draw(diagram)
    assert "<title>T &lt;x&gt;</title>" in svg
    assert svg.count('class="head"') == 2
    assert 'class="second"' in svg


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("box a", "line 1: title, row or arrow"),
        ("row a data A\n\narrow a -> b", "line 3: no arrow between boxes"),
        ("row a thing A", "line 1: a new name, a kind"),
        ("row a data A | a data B", "line 1: a new name"),
        ("row a data " + "A" * 80, "line 1: more text than the box of a holds"),
        ("row a data A / B / C", "line 1: more text"),
    ],
)
def test_invalid_diagrams_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diagrams.read(text)


def test_search_works_offline_from_a_folder() -> None:
    config = load_config(str(ROOT / "mkdocs.yml"))
    config.plugins["material/offline"].on_config(config)
    assert config.extra["polyfills"] == ["assets/iframe-worker.js"]  # and none from another host
    assert (ROOT / "docs/assets/iframe-worker.js").exists()
