"""Shared parts of the commands: argument sorting, help, messages and exit statuses."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vilmedic.config.load import Config, Draft, load, read
from vilmedic.distributed.launch import (
    first_to_fail,
    is_lost_connection,
    is_main_process,
    process_count,
)
from vilmedic.errors import (
    INTERRUPTED,
    ConfigError,
    Interrupted,
    VilmedicError,
    escaped,
    nearest,
)
from vilmedic.files import FULL
from vilmedic.log import counted

FAILED = 2
BROKEN = 1
MOST_PRINTED = 200  # problems
REFUSED_BY_SYSTEM = (
    *(*FULL, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EMFILE),
)
"""Errors of a full, read-only or failing disk."""
HELP = "--help"
_OPTIONS = (HELP, "--print-config", "--check")


@dataclass(frozen=True)
class CommandLine:
    """The words of a command, sorted.

    Args:
        config: the configuration file; None when there is none.
        overrides: `key=value` and `~key`, in their order.
        option: `--help`, `--print-config`, `--check` or None.
        topics: the keys that help is asked on.
    """

    config: str | None
    overrides: tuple[str, ...]
    option: str | None
    topics: tuple[str, ...] = field(default=())


def parse(argv: Sequence[str], prog: str) -> CommandLine:
    """Sort the words of a command line.

    Args:
        argv: the words after the command.
        prog: the command, for messages.

    Raises:
        ConfigError: an option that does not exist, or no configuration file.
    """
    config: str | None = None
    overrides: list[str] = []
    topics: list[str] = []
    option: str | None = None
    unknown: list[str] = []
    words = list(argv)
    helps = any(word.partition("=")[0] in (HELP, "-h") for word in words)
    while words:
        word = words.pop(0)
        name, _, value = word.partition("=")
        if name in (HELP, "-h") and value:
            topics.append(value)
        word = HELP if name in (HELP, "-h") else word
        if word in _OPTIONS:
            # of several options the most harmless one counts
            option = min((one for one in (word, option) if one), key=_OPTIONS.index)
        elif word.startswith("-"):
            if "=" not in word and words and _is_value(words[0]):
                word = f"{word}={words.pop(0)}"  # --epochs 3
            unknown.append(word)
        elif "=" in word or word.startswith("~"):
            overrides.append(word)
        elif helps and not _is_file(word):
            topics.append(word)
        elif config is None:
            config = word
        else:
            overrides.append(word)
    problems = [_unknown(word, config, overrides) for word in unknown]
    if config is None and option != HELP:
        problems.insert(
            0, f"no configuration file is given. Use: {prog} config.yml [key=value ...]"
        )
    if problems:
        raise ConfigError(problems)
    return CommandLine(config, tuple(overrides), option, tuple(topics))


def _is_file(word: str) -> bool:
    """Return whether a word is a configuration file rather than a key."""
    return word.endswith((".yml", ".yaml")) or "/" in word or os.path.isfile(word)


def _is_value(word: str) -> bool:
    """Return whether a word can be the value of an option before it."""
    return not (word.startswith(("-", "~")) or "=" in word or _is_file(word))


def _unknown(word: str, config: str | None, overrides: Sequence[str]) -> str:
    """Suggestion for an option that does not exist: usually a key."""
    from vilmedic.config.show import keys_named

    option, equals, value = word.partition("=")
    name = option.lstrip("-")
    try:
        draft = read(config, overrides) if config is not None else None
    except ConfigError:
        draft = None
    keys = keys_named(name, draft, near=False)
    found = "" if keys else nearest(option, _OPTIONS)
    if not (keys or found):
        keys = keys_named(name, draft)
    if keys:
        # Options of nested classes, such as trainor.lr_decay_params.epochs, are rarely meant.
        depth = min(key.count(".") for key in keys)
        keys = [key for key in keys if key.count(".") == depth]
        written = [f"{key}={value}" if equals else f"{key}=..." for key in keys[:3]]
        return f"'{word}': keys are written without dashes: {' or '.join(written)}."
    if equals and "." in name and not found:
        return f"'{word}': keys are written without dashes: {name}={value}"
    return f"'{word}': unknown. Allowed: {', '.join(_OPTIONS)}, and keys as key=value.{found}"


def take(words: list[str], option: str, example: str) -> str | None:
    """Take an option with a value, `--option VALUE` or `--option=VALUE`, out of the words.

    Raises:
        ConfigError: it is given twice, or without a value.
    """
    places = [n for n, word in enumerate(words) if word.partition("=")[0] == option]
    if not places:
        return None
    if len(places) > 1:
        raise ConfigError(f"{option}: given {len(places)} times; allowed: once.")
    word = words.pop(places[0])
    value = word.partition("=")[2]
    if "=" not in word and places[0] < len(words):
        value = words.pop(places[0])
    if not value or value.startswith("-"):
        raise ConfigError(f"{option}: nothing is given. Use: {option} {example}")
    return value


def command(
    argv: Sequence[str] | None,
    prog: str,
    purpose: str,
    run: Callable[[Config], object],
    *,
    own: Sequence[tuple[str, str]] = (),
    training: bool = False,
) -> int:
    """Run a command and turn user errors into messages.

    Args:
        argv: the words after the command; None takes those of the process.
        prog: the command's name.
        purpose: its description in `--help`.
        run: runs it with the checked configuration.
        own: options of this command alone, each with its description.
        training: whether it trains, which needs more of a configuration.

    Returns:
        The exit status: 0, 2 after an error message, 130 after Ctrl-C, or 143 after SIGTERM. In a
        run of several processes also 1, after an internal error or the end of another process.
    """
    if process_count() > 1:
        # Before torch is loaded: every process would give the same warnings.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    def call() -> None:
        line = parse(sys.argv[1:] if argv is None else argv, prog)
        if line.option == HELP:
            print_text(_help(line, prog, purpose, own))
            return
        config = load(line.config or "", line.overrides, training=training)
        if line.option == "--print-config":
            from vilmedic.config.show import print_config

            print_text(print_config(config))
        elif line.option == "--check":
            notes = [f"note: {note}" for note in (*config.notes, *config.file_notes)]
            keys, given = len(config.origins), len(config.overrides)
            counts = f"{counted(keys, 'key')}, {counted(given, 'override')}"
            print_text("\n".join([*notes, f"ok: {config.path}: {counts}, run '{config.name}'"]))
        else:
            run(config)

    return guarded(call)


def _help(line: CommandLine, prog: str, purpose: str, own: Sequence[tuple[str, str]]) -> str:
    from vilmedic.config.show import help_on, help_page

    draft: Draft | None = read(line.config, line.overrides) if line.config else None
    if line.topics:
        return help_on(line.topics, draft)
    return help_page(prog, purpose, own, draft)


def guarded(call: Callable[[], object]) -> int:
    """Run the command; user errors become a message and an exit status."""
    try:
        call()
    except VilmedicError as error:
        print_error(error)
        return FAILED
    except Interrupted as stop:
        if is_main_process():
            print(escaped(f"interrupted: {stop}"), file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.errno not in REFUSED_BY_SYSTEM:
            raise
        print_error(
            VilmedicError(f"{error.filename2 or error.filename or 'a file'}: {error.strerror}.")
        )
        return FAILED
    except Exception as error:
        if process_count() == 1:
            raise
        _print_internal_error(error)
        return BROKEN
    return 0


def program(fallback: str) -> str:
    """The name under which the process was started."""
    return os.path.basename(sys.argv[0]) or fallback


def print_text(text: str) -> None:
    """Print to standard output; a reader such as `head` may have closed it."""
    try:
        print(escaped(text), flush=True)
    except BrokenPipeError:
        # the reader, such as `head`, has closed it; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_error(error: VilmedicError) -> None:
    """Print a user error, from the first process that fails."""
    if not first_to_fail():
        return
    sys.stdout.flush()
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    if len(problems) > 1:
        print(f"{len(problems)} problems:", file=sys.stderr)
    for problem in map(escaped, problems[:MOST_PRINTED]):
        print(f"- {problem}" if len(problems) > 1 else f"error: {problem}", file=sys.stderr)


def _print_internal_error(error: Exception) -> None:
    """Report an internal error, unless another process has reported the reason."""
    if not first_to_fail():
        return
    sys.stdout.flush()
    if is_lost_connection(error):
        rank = os.environ.get("RANK", "0")
        print(
            f"error: another process of this run has ended without a message, as process {rank} "
            "found when it waited for it; the launcher says below how. Killed without a reason "
            "often means out of memory.",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error)
