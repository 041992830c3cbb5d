"""Hooks of mkdocs: a site out of the Markdown that a repository host shows as well.

Links are written as a repository host follows them, from file to file. Here those that leave
`docs/` are turned to the pages that the site has for them: README.md is its first page, a notebook
is a page, and any other file that is linked is shown on a page of its own. The reference is made
by `docs/generate/reference.py`.
"""

from __future__ import annotations

import base64
import json
import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.generate import reference

LOG = logging.getLogger("mkdocs.plugins.pages")  # a warning there fails a strict build
ROOT = Path(__file__).parents[2]
MOVED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files of the repository that are pages, each with its path in the site."""
_LINK = re.compile(
    r"(?P<code>`+[^`]*`+)|(?:\[(?P<file>[\w./-]+\.md)\]|\])\((?P<target>[^()\s]+)(?:\s+\"[^\"]*\")?\)"
)
_LANGUAGES = {".yml": "yaml", ".py": "python", ".json": "json"}
_FETCHED = re.compile(
    r"<(?:script|img|iframe|source|link(?=[^>]*rel=\"?(?:stylesheet|preload|icon|preconnect)))"
    r"[^>]*?(?:src|href)=\"?((?:https?:)?//[^\s\">]+)"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made: from files of the repository, and the reference."""
    for name, uri in MOVED.items():
        _add(files, config, uri, (ROOT / name).read_text(encoding="utf-8"))
    for path in sorted(ROOT.glob("docs/notebooks/*.ipynb")):
        _add_notebook(files, config, path)
    for uri, text in reference.pages().items():
        _add(files, config, uri, text)
    linked = {
        target
        for file in files.documentation_pages()
        if not file.src_uri.startswith("reference/")
        for target, _ in repository_links(file.content_string, origin(file.src_uri))
    }
    for target in sorted(linked):
        path = ROOT / target
        if path.is_file() and site_uri(target).startswith("files/"):
            _add(files, config, site_uri(target), _shown(target, path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page to the site, and check the form of those that leave it."""
    uri = page.file.src_uri
    if uri.startswith(("reference/", "files/")):
        return markdown
    for problem in wrong_external_links(markdown):
        LOG.warning("%s: %s", origin(uri), problem)
    return turned(markdown, origin(uri), uri)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse what a browser would fetch from elsewhere: the site is read without a network."""
    for address in _FETCHED.findall(output):
        LOG.warning("%s: is fetched from another host: %s", page.file.src_uri, address)
    return output


def origin(uri: str) -> str:
    """The file of the repository that a page of the site comes from."""
    for name, moved in MOVED.items():
        if uri == moved:
            return name
    if uri.startswith("notebooks/"):
        return f"docs/{posixpath.splitext(uri)[0]}.ipynb"
    return f"docs/{uri}"


def site_uri(path: str) -> str:
    """The page of the site for a file of the repository."""
    if path in MOVED:
        return MOVED[path]
    if path.endswith(".ipynb"):
        return f"{posixpath.relpath(posixpath.splitext(path)[0], 'docs')}.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"files/{path}.md"


def links(markdown: str) -> Iterator[tuple[re.Match[str], str]]:
    """The links of a text and their targets; code, indented or between fences, has none."""
    fenced = False
    position = 0
    for line in markdown.splitlines(keepends=True):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            for match in _LINK.finditer(markdown, position, position + len(line)):
                if match["target"]:
                    yield match, match["target"]
        position += len(line)


def repository_links(markdown: str, path: str) -> Iterator[tuple[str, re.Match[str]]]:
    """The files of the repository that a file links to, each with the link."""
    for match, target in links(markdown):
        file = target.partition("#")[0]
        if file and not urlsplit(target).scheme:
            yield posixpath.normpath(posixpath.join(posixpath.dirname(path), file)), match


def turned(markdown: str, path: str, uri: str) -> str:
    """The text of a file of the repository as its page in the site has it.

    Links lead to pages of the site, and one whose text is the name of a file has the title of that
    page for its text.
    """
    pieces, done = [], 0
    for target, match in repository_links(markdown, path):
        _, hash_, anchor = match["target"].partition("#")
        there = posixpath.relpath(site_uri(target), posixpath.dirname(uri) or ".")
        if match["file"] and (ROOT / target).is_file():
            start, end = match.span("file")
            pieces += [markdown[done:start], title(ROOT / target)]
            done = end
        start, end = match.span("target")
        pieces += [markdown[done:start], f"{there}{hash_}{anchor}"]
        done = end
    return "".join([*pieces, markdown[done:]])


def title(path: Path) -> str:
    """The first heading of a Markdown file, or its name."""
    found = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else path.name


def wrong_external_links(markdown: str) -> list[str]:
    """Return malformed links to other hosts; the hosts are not contacted."""
    problems = []
    for _, target in links(markdown):
        parts = urlsplit(target)
        if parts.scheme in ("http", "https"):
            if not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", parts.hostname or ""):
                problems.append(f"link without a host: {target}")
        elif parts.scheme and parts.scheme != "mailto":
            problems.append(f"link of an unknown kind: {target}")
    return problems


def _add(files: Files, config: MkDocsConfig, uri: str, content: str | bytes) -> None:
    files.append(File.generated(config, uri, content=content))


def _shown(path: str, text: str) -> str:
    """The page of a file of the repository."""
    language = _LANGUAGES.get(posixpath.splitext(path)[1], "text")
    return f"# `{path}`\n\n~~~~ {{ .{language} }}\n{text.rstrip()}\n~~~~\n"


def _add_notebook(files: Files, config: MkDocsConfig, path: Path) -> None:
    uri = site_uri(path.relative_to(ROOT).as_posix())
    stem = posixpath.splitext(uri)[0]
    text, pictures = notebook(json.loads(path.read_text(encoding="utf-8")), path.stem)
    _add(files, config, uri, text)
    for name, picture in pictures.items():
        _add(files, config, f"{posixpath.dirname(stem)}/{name}", picture)


def notebook(content: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name.

    Args:
        content: what the file holds.
        stem: its name, which those of the pictures begin with.
    """
    lines: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in content["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [source, ""]
            continue
        lines += ["```python", source, "```", ""]
        for out in cell.get("outputs", ()):
            data = out.get("data", {})
            if "image/png" in data:
                name = f"{stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                lines += [f"![What the cell shows]({name})", ""]
                continue
            text = "".join(out.get("text") or data.get("text/plain") or ())
            if text.strip() and out.get("name") != "stderr":
                lines += ["```text", text.rstrip(), "```", ""]
    return "\n".join(lines), pictures
