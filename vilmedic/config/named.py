"""Judges values that name classes: names with their options, and options of a named class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vilmedic.config import types
from vilmedic.config.marks import KeyPath, dotted
from vilmedic.config.namespaces import names, signature
from vilmedic.config.resolve import BROKEN
from vilmedic.config.signature import Signature
from vilmedic.config.wording import shown
from vilmedic.errors import ConfigError

if TYPE_CHECKING:
    from vilmedic.config.check import Checker


def check_calls(checker: Checker, mark: types.Calls, given: Any, path: KeyPath) -> Any:
    """Judge a mapping, or a list, of names with options.

    Args:
        checker: collects the problems.
        mark: where the names are looked up.
        given: `{name: options}`, or a list of such mappings with one entry and of names.
        path: where it stands.

    Returns:
        The same with judged options.
    """
    if isinstance(given, dict):
        return {
            name: _check_call(checker, mark, name, one, (*path, name))
            for name, one in given.items()
        }
    result: list[Any] = []
    for index, entry in enumerate(given):
        where = (*path, index)
        if isinstance(entry, str):
            _check_call(checker, mark, entry, None, where)
            result.append(entry)
        elif isinstance(entry, dict) and len(entry) == 1:
            ((name, one),) = entry.items()
            result.append({name: _check_call(checker, mark, name, one, (*where, name))})
        elif entry is not BROKEN:
            checker.report(
                where,
                f"given {shown(entry)}; allowed: a name, or one name with its options, of: "
                f"{', '.join(names(mark.namespace))}.",
            )
    return result


def _check_call(
    checker: Checker, mark: types.Calls, name: str, given: Any, path: KeyPath
) -> dict[str, Any] | None:
    if given is BROKEN or checker.full:
        return None
    try:
        read = signature(mark.namespace, name)
    except ConfigError as error:
        checker.report(path, str(error))
        return None
    given = {} if given is None else given
    if not isinstance(given, dict):
        options = ", ".join(read.settable) if read and read.settable else "its options"
        checker.report(path, f"given {shown(given)}; allowed: a mapping with {options}.")
        return None
    return given if read is None else checker.section(read, given, path)


def check_options(
    checker: Checker,
    mark: types.OptionsOf,
    given: dict[str, Any],
    path: KeyPath,
    read: Signature | None,
    siblings: dict[str, Any],
) -> dict[str, Any]:
    """Judge the options of the class that a sibling key names.

    Args:
        checker: collects the problems.
        mark: which sibling, and where its name is looked up.
        given: the options.
        path: where they stand.
        read: the signature that both keys belong to, for the sibling's default.
        siblings: the mapping that both keys stand in.

    Returns:
        The judged options.
    """
    default = read.params[mark.key].default if read and mark.key in read.params else None
    name = siblings.get(mark.key, default)
    if name is BROKEN:
        return given
    if name is None:
        for key, value in given.items():
            sibling = dotted((*path[:-1], mark.key))
            checker.report(
                (*path, key),
                f"given {shown(value)}; no option is allowed while '{sibling}' is null.",
            )
        return given
    try:
        of = signature(mark.namespace, str(name))
    except ConfigError:
        # the name is reported where it stands
        return given
    return given if of is None else checker.section(of, given, path, filled=mark.filled)
