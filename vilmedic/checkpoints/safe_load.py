"""Safe loading of checkpoint files of this and older projects, without running their code.

Before a file is loaded, its checksums are verified and its pickle is followed without building
anything (`pickle_scan`). `torch.load(weights_only=True)` then builds tensors, plain values and what
is allowed by name. Files of the original vilmedic and of dalle-pytorch hold a pickled OmegaConf
configuration: its classes are replaced by records without behavior, so that OmegaConf resolves no
interpolation of a file; those of PyTorch Lightning name their callbacks. All of this is converted
to plain values before it is returned.
"""

from __future__ import annotations

import io
import operator
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from vilmedic.checkpoints.pickle_scan import DEEPEST, Refused, scan
from vilmedic.errors import CheckpointError
from vilmedic.files import no_file
from vilmedic.log import LOGGER

MOST_VALUES = 2_000_000
"""Most plain values in a file; shared values count each time."""
FOLDER = 0x10
"""Suffix of folders in an archive, whose content torch does not define."""
LONGEST_TEXT = 10_000
"""Characters of a text in which references are replaced."""


class _Record:
    """Attributes of a pickled instance whose class is ignored."""

    def __new__(cls, *_: Any) -> _Record:
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class _Container(_Record):
    """A DictConfig or ListConfig; `_content` holds its members."""


class _Value(_Record):
    """A node of OmegaConf; `_val` holds its value."""


class _Name:
    """A class that a file mentions, such as the type of a field; it cannot be called."""


def _mapping(*_: Any) -> dict[Any, Any]:
    """A defaultdict without its default, which would be a callable out of the file."""
    return {}


_NAME = _Name()
_SCALARS = frozenset((str, int, float, bool, type(None)))
_SCALAR = np.float64(0).__reduce__()[0]
ALLOWED: dict[str, Any] = {
    "omegaconf.dictconfig.DictConfig": _Container,
    "omegaconf.listconfig.ListConfig": _Container,
    "omegaconf.base.ContainerMetadata": _Record,
    "omegaconf.base.Metadata": _Record,
    **{
        f"omegaconf.nodes.{kind}Node": _Value
        for kind in ("Any", "String", "Integer", "Float", "Boolean")
    },
    "collections.defaultdict": _mapping,
    **{
        f"builtins.{kind}": _NAME
        for kind in ("dict", "list", "tuple", "int", "float", "str", "bool")
    },
    "typing.Any": _NAME,
    "numpy.dtype": np.dtype,
    **{
        f"numpy.dtypes.{type(np.dtype(kind)).__name__}": type(np.dtype(kind))
        for kind in ("f8", "f4", "i8", "i4", "?")
    },
    "numpy.core.multiarray.scalar": _SCALAR,
    "numpy._core.multiarray.scalar": _SCALAR,
    # Lightning before version 1.5 files the state of callbacks under their classes
    **{
        f"pytorch_lightning.callbacks.{name}": _Name()
        for name in (
            "model_checkpoint.ModelCheckpoint",
            "early_stopping.EarlyStopping",
            "lr_monitor.LearningRateMonitor",
        )
    },
    # the direction of the score that a schedule of the original vilmedic follows
    **{f"_operator.{name}": getattr(operator, name) for name in ("lt", "gt")},
}
"""Allowed classes besides tensors and plain values, by their names in files."""

_CALLED = {name for name, made in ALLOWED.items() if not isinstance(made, _Name)}
_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)|but got <class '([\w.]+)'>")
"""Pattern of the class name in torch's error message."""
_REFERENCE = re.compile(r"\$\{(\.*[\w.\[\]-]+)\}")
"""An interpolation that names a key; one that calls a function has a colon."""


def load_plain(path: Path, *, mapped: bool = False) -> Any:
    """The contents of a checkpoint file on the CPU: tensors and plain values.

    Args:
        path: a file of `torch.save`.
        mapped: leave tensor data on the disk until it is used, for readers of the metadata. Files
            of torch before 1.6 are read as a whole.

    Raises:
        CheckpointError: the file is missing, cut short, or its checksums do not fit; or it holds
            something that is not allowed, whose type is named, or more than can be held.
    """
    if (kind := no_file(path)) is not None:
        raise CheckpointError(f"{path}: is {kind}, not a checkpoint.")
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            _check_size(path, size)
            archive = _verify(stream, size, path)
            stream.seek(0)
            allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
                (made, name) for name, made in ALLOWED.items()
            ]
            with torch.serialization.safe_globals(allowed):
                source: Any = path if mapped and archive else stream
                contents = torch.load(
                    source, map_location="cpu", weights_only=True, mmap=source is path
                )
        return _Plain(size).of(contents)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint.") from None
    except Refused as error:
        raise CheckpointError(f"{path}: {error}.") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except MemoryError:
        raise CheckpointError(
            f"{path}: there is not enough memory to load it ({size:,} bytes)."
        ) from None
    except Exception as error:
        # torch raises anything from RuntimeError to UnpicklingError for a damaged file.
        message = str(error).strip()
        if found := _FORBIDDEN.search(message):
            raise CheckpointError(
                f"{path}: holds a '{found[1] or found[2]}', which is neither a tensor nor a plain "
                "value. Nothing of such a file is read: it could run any program."
            ) from error
        first = re.split(r"\.\s|\n", f"{type(error).__name__}: {message}".strip(": "))[0]
        raise CheckpointError(
            f"{path}: not a readable checkpoint; it was cut short or is something else ({first})."
        ) from error


def _check_size(path: Path, size: int) -> None:
    """Refuse a file that is larger than the memory, before the system kills the process."""
    if not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise Refused(
            f"is larger than the memory of this machine ({size / 2**30:.1f} and "
            f"{memory / 2**30:.1f} GiB)"
        )


def _verify(stream: BinaryIO, size: int, path: Path) -> bool:
    """Verify the checksums of a file, and that it claims no more data than it holds.

    Files of torch before 1.6 are no archives and have no checksums: only their claims are checked.

    Returns:
        Whether it is an archive.
    """
    if stream.read(4) != b"PK\x03\x04":
        stream.seek(0)
        for _ in range(5):  # number of the format, its version, the machine, the contents, the keys
            scan(stream, _CALLED, lambda key, claimed: claimed <= size)
        return False
    stream.seek(max(0, size - 22))
    if stream.read(4) != b"PK\x05\x06":
        raise ValueError("there is no table of contents at its end")
    with zipfile.ZipFile(stream) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise Refused("is compressed, which torch never does: it could unpack to any size")
        if any(
            record.compress_size != record.file_size or record.external_attr & FOLDER
            for record in records
        ):
            raise Refused("is damaged: its table of contents contradicts itself")
        names = {record.filename.partition("/")[2]: record for record in records}
        if len(names) < len(records) or sum(record.file_size for record in records) > size:
            raise Refused("is damaged: its table of contents lists more than it holds")
        if all(record.CRC == 0 for record in records):
            LOGGER.warning("%s: was saved without checksums, so damage cannot be seen", path)
            for record in records:
                del record.CRC  # then none is compared
        else:
            for record in records:
                _read_all(archive, record)
        held = {name.removeprefix("data/"): record.file_size for name, record in names.items()}
        pickled = io.BytesIO(archive.read(names["data.pkl"]))
        scan(pickled, _CALLED, lambda key, claimed: claimed <= held.get(key, -1))
    return True


def _read_all(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    """Read a record to its end, where its checksum is compared."""
    try:
        with archive.open(record) as content:
            while content.read(2**20):
                pass
    except Exception as error:  # BadZipFile, but also what a damaged header leads to
        raise Refused(
            f"is damaged: the checksum of '{record.filename}' does not fit what is stored"
        ) from error


class _Plain:
    """Converts loaded objects to tensors and plain values.

    Args:
        size: bytes of the file, the most values that a tensor may have.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._count = 0

    def of(self, value: Any, depth: int = 0) -> Any:
        """A value with configurations as dicts and lists, and NumPy numbers as those of Python.

        Raises:
            Refused: values are shared, nested or claimed without end, or of no plain type.
        """
        if type(value) in _SCALARS:
            return value
        self._bound(value, depth)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, _Container | _Value):
            return self._content(value, value, depth)
        if isinstance(value, _Record | _Name):
            raise Refused("holds a part of a configuration without the configuration")
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, dict):
            return {self._key(key): self.of(inner, depth + 1) for key, inner in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.of(inner, depth + 1) for inner in value)
        return value

    def _bound(self, value: Any, depth: int) -> None:
        """Count a value and its members, and refuse endless ones."""
        self._count += 1 + (len(value) if isinstance(value, dict | list | tuple) else 0)
        if self._count > MOST_VALUES:
            raise Refused(f"holds more than {MOST_VALUES:,} plain values")
        if depth > DEEPEST:
            raise Refused(f"holds values nested deeper than {DEEPEST}, or within themselves")

    def _key(self, key: Any) -> Any:
        return key.item() if isinstance(key, np.generic) else key

    def _tensor(self, value: torch.Tensor) -> torch.Tensor:
        plain = value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.is_quantized:
            raise Refused("holds a tensor that is sparse, quantized or without numbers")
        if value.numel() > self._size:
            raise Refused(f"claims a tensor of {value.numel():,} values, which it does not hold")
        return value

    def _content(self, node: Any, within: _Record, depth: int) -> Any:
        """A part of a configuration.

        Args:
            node: the part.
            within: the node of OmegaConf that it is or stands in, where references start from.
            depth: how deep it is.
        """
        if isinstance(node, _Container):
            node, within = vars(node).get("_content"), node
        elif isinstance(node, _Value):
            node, within = vars(node).get("_val"), node
        if isinstance(node, _Record):
            raise Refused("holds a configuration that is damaged")
        if isinstance(node, dict):
            return {key: self._member(inner, within, depth + 1) for key, inner in node.items()}
        if isinstance(node, list):
            return [self._member(inner, within, depth + 1) for inner in node]
        if isinstance(node, str) and "${" in node:
            return self._followed(node, within, depth)
        return self.of(node, depth)

    def _member(self, node: Any, within: _Record, depth: int) -> Any:
        self._bound(node, depth)
        return self._content(node, within, depth)

    def _followed(self, text: str, within: _Record, depth: int) -> Any:
        """Return a text with its references to other keys replaced; unchanged if one is invalid."""
        whole = _REFERENCE.fullmatch(text)
        parts = []
        end = 0
        for match in _REFERENCE.finditer(text):
            found = self._target(match[1], within, depth)
            if found is None or (whole is None and isinstance(found, dict | list)):
                return text
            parts += [text[end : match.start()], found]
            end = match.end()
        if whole is not None:
            return parts[1]
        joined = "".join(map(str, [*parts, text[end:]]))
        return text if len(joined) > LONGEST_TEXT or "${" in joined else joined

    def _target(self, name: str, within: _Record, depth: int) -> Any:
        """Return the value of a reference: from the top, or relative with leading dots."""
        relative = len(name) - len(name.lstrip("."))
        node: Any = within
        for climbed in range(DEEPEST):
            parent = vars(node).get("_parent")
            if not isinstance(parent, _Container) or (relative and climbed >= relative):
                break
            node = parent
        for part in re.split(r"[.\[\]]+", name.lstrip(".").rstrip("]")):
            content = vars(node).get("_content") if isinstance(node, _Container) else None
            if isinstance(content, dict):
                node = content.get(part)
            elif isinstance(content, list) and part.isdecimal() and int(part) < len(content):
                node = content[int(part)]
            else:
                return None
        if depth >= DEEPEST or not isinstance(node, _Record):
            return None
        found = self._member(node, within, depth + 1)
        return None if isinstance(found, str) and "${" in found else found
