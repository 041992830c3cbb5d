from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from vilmedic.errors import ConfigError
from vilmedic.registry import REGISTRIES, Registry, import_plugins, own_packages


class First:
    pass


class Second:
    pass


FIRST = f"{First.__module__}:First"


def make(group: str | None = None) -> Registry:
    return Registry(
        "thing",
        {"Path": "pathlib:Path", "Lost": "no_such_package.module:Lost"},
        {"Old": "Path"},
        group,
    )


def test_names_are_looked_up_and_imported_when_used() -> None:
    registry = make()
    assert registry.get("Path") is Path
    assert registry.get("Old") is Path
    assert registry.location("Old") == "pathlib:Path"
    assert registry.aliases() == {"Old": "Path"}


def test_listing_with_wildcards() -> None:
    registry = make()
    registry.register("Pathology")(First)
    assert registry.names() == ["Lost", "Path", "Pathology"]
    assert registry.names("Path*") == ["Path", "Pathology"]
    assert registry.names("L?st") == ["Lost"]


def test_an_unknown_name_lists_the_allowed_and_nearest_names() -> None:
    with pytest.raises(ConfigError) as caught:
        make().get("path_")
    assert str(caught.value) == (
        "there is no thing named 'path_'. Allowed: Lost, Path. Did you mean 'Path'?"
    )


def test_registering_a_name_twice_names_both_places() -> None:
    registry = make()
    registry.register("One")(First)
    registry.register("One")(First)
    with pytest.raises(ConfigError) as caught:
        registry.register("One")(Second)
    assert str(caught.value) == (
        f"the thing 'One' is registered twice: by {FIRST} and by {Second.__module__}:Second."
    )


@pytest.mark.parametrize("name", ["Path", "Old"])
def test_built_in_names_and_aliases_cannot_be_registered_again(name: str) -> None:
    with pytest.raises(ConfigError, match="pathlib:Path"):
        make().register(name)(First)


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(ConfigError, match="Lost"):
        make().get("Lost")


def test_a_missing_dependency_affects_only_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import surely_not_installed.part\nclass A: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("thing", {"A": "needs_more:A", "Path": "pathlib:Path"})
    with pytest.raises(ConfigError) as caught:
        registry.get("A")
    assert str(caught.value) == (
        "the thing 'A' needs the package 'surely_not_installed', which is not installed."
    )
    assert registry.get("Path") is Path


def entry_points(monkeypatch: pytest.MonkeyPatch, *found: tuple[str, str]) -> list[str]:
    asked = []

    def fake(*, group: str) -> list[importlib.metadata.EntryPoint]:
        asked.append(group)
        return [importlib.metadata.EntryPoint(name, value, group) for name, value in found]

    monkeypatch.setattr(importlib.metadata, "entry_points", fake)
    return asked


def test_entry_points_are_read_only_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = entry_points(monkeypatch, ("One", FIRST))
    registry = make("vilmedic.things")
    assert registry.get("Path") is Path
    assert asked == []
    assert registry.get("One") is First
    assert registry.names() == ["Lost", "One", "Path"]
    assert asked == ["vilmedic.things"]


def test_an_entry_point_with_a_taken_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, ("Path", FIRST))
    with pytest.raises(ConfigError, match="registered twice: by pathlib:Path and by"):
        make("vilmedic.things").names()


def test_plugins_of_the_working_directory_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "local_plugin.py").write_text("LOADED = True\n")
    (tmp_path / "bad_plugin.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert import_plugins(["local_plugin"]) == []
    assert sys.modules["local_plugin"].LOADED
    assert import_plugins(["bad_plugin"]) == [
        "cannot import 'bad_plugin': ZeroDivisionError: division by zero"
    ]
    del sys.modules["local_plugin"]


def test_the_project_registers_its_own_classes() -> None:
    assert "vilmedic" in own_packages()
    assert REGISTRIES["block"].location("VisualEncoder") == REGISTRIES["block"].location("CNN")
    for registry in REGISTRIES.values():
        assert registry.group is not None
        assert registry.group.startswith("vilmedic.")


@pytest.mark.parametrize("kind", sorted(REGISTRIES))
def test_every_built_in_class_exists(kind: str) -> None:
    registry = REGISTRIES[kind]
    for name in registry.names():
        assert isinstance(registry.get(name), type)
