"""Randomly changed configurations are checked within two seconds, without a traceback."""

from __future__ import annotations

import contextlib
import io
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hostile.table import Table
from vilmedic import cli

CONFIGURATIONS = 500
CHUNKS = 20
CONFIG = Path(__file__).parents[2] / "config"
NUMBERS = (float("nan"), float("inf"), -1, 0, 2**31, 2**70, 10**30, 1e308, -0.0, 3.5)
TEXTS = (
    "",
    " ",
    "²",
    "Infinity",
    "1e999",
    "~",
    "no",
    "${",
    "${x",
    "${name}",
    "${..}",
    "${model.model}",
    "${oc.env:HOME}",
    "${oc.env:NO_SUCH_VARIABLE}",
    "${oc.decode:'[1'}",
    "${" * 40,
    "???",
    "../..",
    "/dev/zero",
    "/proc/self/mem",
    "\\x00",
    "a\\nb",
    "x" * 5000,
    "%s%n{0}",
    "__class__",
    "$(touch executed)",
    "`touch executed`",
)
RAW = (
    "\0",
    "\x1b[31m",
    "\ud800",
    "\ufffe",
    "\t",
    "\r",
    "\u2028",
    "[",
    "{",
    "}",
    "- ",
    ": ",
    "&a ",
    "*a",
    "!!python/object/apply:os.system ['touch executed']",
    "!!binary aGk=",
    "<<: *a\n",
    "? ",
    "|\n",
    "%YAML 9.9\n---\n",
    "...\n---\n",
    "9" * 5000,
    "[" * 3000,
    "{a: " * 3000,
)
WORDS = (
    "trainor.loggers.²=x",
    "ensemblor.splits.²=test",
    "ensemblor.splits.99999999999999999999=test",
    "trainor.device=cuda:²",
    "name=\0",
    "name=\udcff",
    "name=\x1b[31m",
    "name=../../x",
    "model={}",
    "model=[]",
    "model.proto=",
    "trainor.optim_params=[[[[]]]]",
    "dataset.image=" + "[" * 500,
    "model.loss.tau=" + "9" * 6000,
    ".".join("a" * 500) + "=1",
    "~" + ".".join("b" * 500),
    "~model",
    "~",
    "=",
    "a..b=1",
    "includes=[x.yml]",
    "plugins=[no.such.module]",
    "plugins=[..]",
    "plugins=[\\x00]",
    "ckpt_dir=/dev/null",
    "dataset.proto=${model.proto}",
    "trainor=${trainor}",
    "--check=1",
    "-x",
)


def plain(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all nested values."""
    found = [path] if path else []
    items: Any = enumerate(value) if isinstance(value, list) else ()
    for key, one in value.items() if isinstance(value, dict) else items:
        found += places(one, (*path, key))
    return found


def parent(value: Any, path: tuple[Any, ...]) -> Any:
    for part in path[:-1]:
        value = value[part]
    return value


def odd(draw: random.Random, data: Any) -> Any:
    """A value that hardly any key accepts."""
    kind = draw.randrange(8)
    if kind == 0:
        return draw.choice(NUMBERS)
    if kind == 1:
        return draw.choice((None, True, [], {}, [[]], [{}], {"proto": None}, {"": 1}, [None]))
    if kind == 2:
        deep: Any = draw.choice((1, "x"))
        for _ in range(draw.choice((3, 40, 70))):
            deep = [deep] if draw.random() < 0.5 else {"a": deep}
        return deep
    if kind == 3:
        return {f"key{number}": number for number in range(draw.choice((5, 300)))}
    if kind == 4:
        return [draw.choice(TEXTS)] * draw.choice((1, 500))
    if kind == 5:
        place = draw.choice(places(data))
        return parent(data, place)[place[-1]]
    return draw.choice(TEXTS)


def mutated(draw: random.Random, data: dict[str, Any]) -> str:
    """The data with one to four changed values."""
    for _ in range(draw.randint(1, 4)):
        known = places(data)
        if not known:
            break
        place = draw.choice(known)
        holder, key = parent(data, place), place[-1]
        kind = draw.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            name = draw.choice((*TEXTS, f"{key}s", str(key).upper(), "proto", "includes"))
            holder[name] = holder.pop(key)
        else:
            # from a copy, so that nothing contains itself
            holder[key] = odd(draw, yaml.safe_load(yaml.safe_dump(data)))
    return yaml.safe_dump(data, allow_unicode=True, sort_keys=False)


def damaged(draw: random.Random, text: str) -> bytes:
    """The text with characters removed, doubled, changed or inserted, or in another encoding."""
    for _ in range(draw.choice((1, 1, 3, 20))):
        start = draw.randrange(len(text) + 1)
        end = min(len(text), start + draw.choice((1, 1, 5, 80)))
        text = text[:start] + draw.choice(("", text[start:end] * 2, draw.choice(RAW))) + text[end:]
    encoding = draw.choice(("utf-8",) * 6 + ("utf-16", "latin-1", "utf-8-sig"))
    content = text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")
    return content[: draw.randrange(len(content))] if draw.random() < 0.1 else content


def bomb(draw: random.Random, folder: Path) -> str:
    """References, includes, keys and texts that grow exponentially."""
    kind = draw.randrange(9)
    count = draw.choice((3, 12, 60))
    if kind == 0:
        levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, count)]
        return "\n".join(["a0: &a0 [x, x]", *levels])
    if kind == 1:
        levels = [
            f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(9))}}}"
            for n in range(1, count)
        ]
        return "\n".join(["a0: &a0 {x: 1}", *levels])
    if kind == 2:
        names = [f"n{n}" for n in range(count)]
        pairs = itertools.pairwise(names)
        texts = [f"{one}: '${{{other}}}${{{other}}}'" for one, other in pairs]
        return "\n".join([*texts, f"{names[-1]}: {draw.choice(('x', '${n0}'))}"])
    if kind == 3:
        levels = [f"m{n}: {{a: '${{m{n + 1}}}', b: '${{m{n + 1}}}'}}" for n in range(count)]
        return "\n".join([*levels, f"m{count}: 1"])
    if kind == 4:
        for n in range(count):
            text = f"includes: [d{n + 1}.yml, d{n + 1}.yml]\nx{n}: 1\n"
            (folder / f"d{n}.yml").write_text(text)
        end = draw.choice(("y: 1\n", "includes: [d0.yml]\n", "includes: [/dev/zero]\n"))
        (folder / f"d{count}.yml").write_text(end)
        return "includes: [d0.yml]"
    if kind == 5:
        return "\n".join(f"key{n}: {n}" for n in range(draw.choice((20_000, 400_000))))
    if kind == 6:
        depth = draw.choice((63, 65, 200, 100_000))
        return "a: " + draw.choice(("[" * depth, "[" * depth + "]" * depth, "{a: " * depth))
    if kind == 7:
        return "name: " + draw.choice(("x", "9", "${a}", "'", "a: ", "\\")) * 400_000
    return "includes: " + draw.choice(
        ("[{file}]", "['\\0']", '["\\0"]', "[.]", "[/dev/null]", "[/proc/self/fd/0]", "[[a]]", "7")
    ).format(file="x" * 5000)


def hostile(number: int, folder: Path) -> list[str]:
    """Write a configuration file and return the arguments of a command."""
    draw = random.Random(number)
    shipped = sorted(CONFIG.rglob("*.yml"))
    shipped = [path for path in shipped if not path.name.startswith("prompts")]
    base = draw.choice(shipped)
    text = base.read_text(encoding="utf-8")
    for other in shipped:
        (folder / other.name).write_text(other.read_text(encoding="utf-8"), encoding="utf-8")
    file = folder / "hostile.yml"
    kind = draw.randrange(10)
    words: list[str] = []
    if kind < 5:
        data = plain(base)
        file.write_text(mutated(draw, data), encoding="utf-8")
    elif kind < 7:
        file.write_bytes(damaged(draw, text))
    elif kind == 7:
        file.write_text(bomb(draw, folder), encoding="utf-8")
    else:
        file.write_text(text, encoding="utf-8")
        words = draw.sample(WORDS, draw.randint(1, 3))
    name = "hostile.yml"
    if draw.random() < 0.02:
        name = draw.choice(("\0", "\udcff.yml", "x" * 300, ".", "/dev/zero", "a\nb.yml", ""))
    return [name, *words, *(["trainor.seed=1"] if draw.random() < 0.2 else [])]


def checked(command: Callable[[list[str]], int], words: list[str]) -> str | None:
    """The error message of `--check`; None if the configuration is valid."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = command([*words, "--check"])
    assert status in (0, cli.FAILED)
    assert out.getvalue().strip() or status
    for character in out.getvalue() + err.getvalue():
        assert character.isprintable() or character in "\n\t"
    return err.getvalue() if status else None


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_configuration_is_valid_or_refused(
    chunk: int, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0
    for number in range(chunk, CONFIGURATIONS, CHUNKS):
        folder = tmp_path / str(number)
        folder.mkdir()
        words = hostile(number, folder)
        monkeypatch.chdir(folder)
        command = cli.train if number % 2 else cli.ensemble
        message = table.attempt(
            "configurations",
            f"number {number}: {words!r:.300}",
            lambda command=command, words=words: checked(command, words),  # type: ignore[misc]
            outside=[folder],
            marker=folder / "executed",
        )
        taken += message is None
    # most changes make the configuration invalid, but not all
    assert taken < CONFIGURATIONS / CHUNKS / 2
