"""Integrity check of compressed JPEG data, stricter than a decoder.

A decoder displays whatever the bits give. After overwritten bytes it usually resynchronises within
a few blocks, so that it reports nothing although rows are shifted or brightness changes. Here the
data are checked themselves (ITU-T T.81, annexes F and G): every code must exist, a block must not
exceed its 64 coefficients or the range of 8-bit pixels, and each interval must end where the file
says. This takes about as long as decoding.

Baseline, extended and progressive files with Huffman codes and 8 bits are checked; others (with
arithmetic codes, lossless ones, JPEG-LS) are not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from vilmedic.compiled import compiled
from vilmedic.log import counted

_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_RESTARTS = range(0xD0, 0xD8)
_BARE = {0x01, *range(0xD0, 0xDA)}  # markers without a length: TEM, RSTn, SOI, EOI
_SOF, _DHT, _DQT, _DRI, _SOS, _EOI = {0xC0, 0xC1, 0xC2}, 0xC4, 0xDB, 0xDD, 0xDA, 0xD9
_OTHER_SOF = {0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xF7}
_LARGEST = 1100  # 8-bit pixels give 1024; rounding by encoders can give slightly more
_BLOCK = 64

# Error codes of the compiled functions, below zero.
_CODE, _RUN, _RANGE, _SHORT = -1, -2, -3, -4
_WORDS = {
    _CODE: "they hold a code that does not exist",
    _RUN: "a block has more than 64 coefficients",
    _RANGE: "a block holds values that no pixels give",
    _SHORT: "they end too early",
}
_TO_THE_END = -1
_EVERY = 16  # bits of a coefficient that no scan has given yet


class DamagedJpeg(Exception):
    """Damaged compressed data.

    Args:
        reason: what is wrong with them.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"its compressed data are damaged: {reason}")


@dataclass
class _Component:
    key: int
    across: int  # sampling factors
    down: int
    quantization: int
    columns: int = 0  # blocks that a scan of this component alone has
    rows: int = 0
    stride: int = 0  # blocks a row with those that fill the last unit
    dc: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    filled: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    missing: np.ndarray = field(default_factory=lambda: np.full(_BLOCK, _EVERY))  # low bits


@dataclass
class _Frame:
    progressive: bool
    components: dict[int, _Component]
    across: int  # units of a scan with several components
    down: int

    def is_complete(self) -> bool:
        """Return whether scans gave every coefficient of every component with all of its bits."""
        return not any(part.missing.any() for part in self.components.values())


def check_jpeg(content: bytes) -> None:
    """Check the compressed data of a JPEG file to the end.

    Bytes between the data and the end mark are accepted if they are no further blocks. Without an
    end mark, all scans of the image must be present: a progressive file cut off between two scans
    is a coarse image, which decoders display as if it were complete.

    Args:
        content: the file.

    Raises:
        DamagedJpeg: the data are damaged.
    """
    try:
        _read(content)
    except (IndexError, ValueError, ZeroDivisionError):
        raise DamagedJpeg("headers contradict each other") from None


def _read(content: bytes) -> None:
    codes: dict[int, np.ndarray] = {}
    quantization: dict[int, np.ndarray] = {}
    frame: _Frame | None = None
    interval = 0
    place = 2
    while True:
        found = _MARKER.search(content, place)
        if found is None:
            if frame is None or not frame.is_complete():
                raise DamagedJpeg("they end before the last scan")
            return
        kind, place = found[1][0], found.end()
        if kind == _EOI:
            return
        if kind in _BARE:
            continue
        length = int.from_bytes(content[place : place + 2], "big")
        body = content[place + 2 : place + length]
        place += length
        if kind in _OTHER_SOF:
            return
        if kind == _DHT:
            codes |= _code_tables(body)
        elif kind == _DQT:
            quantization |= _quantization_tables(body)
        elif kind == _DRI:
            interval = int.from_bytes(body[:2], "big")
        elif kind in _SOF:
            if body[0] != 8:
                return
            frame = _frame(body, progressive=kind == 0xC2)
        elif kind == _SOS and frame is not None:
            intervals, place = _intervals(content, place)
            ends = content[place : place + 2] in (b"\xff\xd9", b"\xff", b"")
            _check_scan(frame, body, codes, quantization, intervals, interval, ends)


def _code_tables(body: bytes) -> dict[int, np.ndarray]:
    """Table over 16 bits that begin with a code: its length in the high byte, and its symbol."""
    tables = {}
    while len(body) > 16:
        counts, symbols = body[1:17], body[17 : 17 + sum(body[1:17])]
        table = np.zeros(2**16, np.uint16)
        code = number = 0
        for length, count in enumerate(counts, start=1):
            for symbol in symbols[number : number + count]:
                first = code << (16 - length)
                table[first : first + (1 << (16 - length))] = length << 8 | symbol
                code += 1
            number += count
            code <<= 1
        tables[body[0]] = table
        body = body[17 + len(symbols) :]
    return tables


def _quantization_tables(body: bytes) -> dict[int, np.ndarray]:
    tables = {}
    while body:
        entry = np.dtype(">u2") if body[0] >> 4 else np.dtype("u1")
        size = _BLOCK * entry.itemsize
        tables[body[0] & 15] = np.frombuffer(body[1 : 1 + size], entry).astype(np.float64)
        body = body[1 + size :]
    return tables


def _frame(body: bytes, *, progressive: bool) -> _Frame:
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    parts = [
        _Component(body[at], body[at + 1] >> 4, body[at + 1] & 15, body[at + 2])
        for at in range(6, 6 + 3 * body[5], 3)
    ]
    most_across = max(part.across for part in parts)
    most_down = max(part.down for part in parts)
    across, down = _over(width, 8 * most_across), _over(height, 8 * most_down)
    for part in parts:
        part.columns = _over(_over(width * part.across, most_across), 8)
        part.rows = _over(_over(height * part.down, most_down), 8)
        part.stride = across * part.across
        blocks = part.stride * down * part.down if progressive else 0
        part.dc, part.filled = np.zeros(blocks, np.int32), np.zeros(blocks, np.uint64)
    return _Frame(progressive, {part.key: part for part in parts}, across, down)


def _over(number: int, by: int) -> int:
    """Division that rounds up."""
    return -(-number // by)


def _intervals(content: bytes, place: int) -> tuple[list[bytes], int]:
    """Return the data between restart marks, without stuffing, and the place of the next mark."""
    intervals = []
    while True:
        found = _MARKER.search(content, place)
        end = len(content) if found is None else found.start()
        intervals.append(content[place:end].replace(b"\xff\x00", b"\xff"))
        if found is None or found[1][0] not in _RESTARTS:
            return intervals, end
        if found[1][0] != 0xD0 + (len(intervals) - 1) % 8:
            raise DamagedJpeg("restart marks are out of order")
        place = found.end()


def _check_scan(
    frame: _Frame,
    body: bytes,
    codes: dict[int, np.ndarray],
    quantization: dict[int, np.ndarray],
    intervals: list[bytes],
    interval: int,
    ends: bool,
) -> None:
    try:
        chosen = [(frame.components[body[1 + 2 * n]], body[2 + 2 * n]) for n in range(body[0])]
        first, last, high, low = body[-3], body[-2], body[-1] >> 4, body[-1] & 15
        scales = np.stack([quantization[part.quantization] for part, _ in chosen])
        none = np.zeros(2**16, np.uint16)
        dc_codes = np.stack([codes.get(table >> 4, none) for _, table in chosen])
        ac_codes = np.stack([codes.get(16 | table & 15, none) for _, table in chosen])
    except (KeyError, IndexError, ValueError):
        raise DamagedJpeg("a scan names what the file does not have") from None
    parts = [part for part, _ in chosen]
    together = len(parts) > 1
    units = frame.across * frame.down if together else parts[0].columns * parts[0].rows
    expected = _over(units, interval) if interval else 1
    for part in parts:
        if frame.progressive:
            part.missing[first : last + 1] = low
        else:
            part.missing[:] = 0
    if len(intervals) != expected:
        raise DamagedJpeg(f"a scan has {len(intervals)} instead of {expected} intervals")
    sizes = [part.across * part.down if together else 1 for part in parts]
    pattern = np.repeat(np.arange(len(parts)), sizes)
    step = len(pattern)
    if frame.progressive:
        places = _places(frame, parts)
        values = np.concatenate([part.dc for part in parts])
    done = 0
    for data in intervals:
        count = min(interval or units, units - done)
        bits, total = np.frombuffer(data + bytes(8), np.uint8), 8 * len(data)
        here = slice(done * step, (done + count) * step)
        done += count
        if not frame.progressive:
            used = _read_blocks(bits, 0, total, count, pattern, dc_codes, ac_codes, scales)
        elif first > 0:
            read = _refine_ac if high else _read_first_ac
            spectrum = (first, last, low, scales[0])
            used = read(bits, total, places[here], ac_codes[0], *spectrum, parts[0].filled)
        elif high:
            used = count * step if count * step <= total else _SHORT
        else:
            used = _read_first_dc(
                bits, total, pattern, places[here], dc_codes, scales[:, 0], low, values
            )
        if used < 0:
            raise DamagedJpeg(_WORDS[used])
        rest = bits[used // 8 : total // 8]
        if len(rest) and used % 8:
            filling = int(rest[0]) & (0xFF >> used % 8)
            if filling not in (0, 0xFF >> used % 8):
                raise DamagedJpeg("the bits after the last block are no filling")
            rest = rest[1:]
        if len(set(rest.tolist())) < 2:
            continue
        if not ends or done < units:
            raise DamagedJpeg(
                f"{counted(len(rest), 'byte is', 'bytes are')} left over between two scans or "
                "intervals"
            )
        if not frame.progressive:
            more = (pattern, dc_codes, ac_codes, 0 * scales)  # values before are not known
            if _read_blocks(bits, used, total, _TO_THE_END, *more) >= 0:
                raise DamagedJpeg("what is left over holds further blocks")


def _places(frame: _Frame, parts: list[_Component]) -> np.ndarray:
    """Return the number of each block of a scan, in its order, among its components' blocks."""
    if len(parts) == 1:
        rows, columns = np.arange(parts[0].rows), np.arange(parts[0].columns)
        return (rows[:, None] * parts[0].stride + columns).ravel()
    found, start = [], 0
    for part in parts:
        blocks = start + np.arange(part.stride * frame.down * part.down)
        grid = blocks.reshape(frame.down, part.down, frame.across, part.across)
        found.append(grid.transpose(0, 2, 1, 3).reshape(frame.down * frame.across, -1))
        start += len(blocks)
    return np.concatenate(found, axis=1).ravel()


@compiled
def _peek(bits, at):  # type: ignore[no-untyped-def]
    """The 32 bits from bit `at` on."""
    place = at >> 3
    wide = np.uint64(0)
    for n in range(5):
        wide = (wide << np.uint64(8)) | np.uint64(bits[place + n])
    return (wide >> np.uint64(8 - (at & 7))) & np.uint64(0xFFFFFFFF)


@compiled
def _value(word, skipped, size):  # type: ignore[no-untyped-def]
    """Decode the number in the next `size` bits (T.81, F.2.2.1)."""
    if size == 0:
        return 0
    raw = np.int64((word >> np.uint64(32 - skipped - size)) & np.uint64((1 << size) - 1))
    return raw if raw >= 1 << (size - 1) else raw - (1 << size) + 1


@compiled
def _read_blocks(  # type: ignore[no-untyped-def]
    bits, at, total, count, pattern, dc_codes, ac_codes, scales
):
    """Check sequential data; returns the bit after the last unit, or an error code."""
    before = np.zeros(len(scales), np.int64)
    most = np.zeros(len(scales))
    for part in range(len(scales)):
        most[part] = (_LARGEST + 0.5 * np.sqrt(np.sum(scales[part] ** 2))) ** 2
    unit = 0
    while unit != count:
        if count == _TO_THE_END and total - at < 8:
            left = total - at
            ones = (1 << left) - 1
            return at if _peek(bits, at) >> np.uint64(32 - left) == ones or left == 0 else _SHORT
        for part in pattern:
            word = _peek(bits, at)
            code = dc_codes[part, np.int64(word >> np.uint64(16))]
            if code == 0:
                return _CODE
            length, size = np.int64(code >> 8), np.int64(code & 255)
            if size > 11:
                return _RANGE
            before[part] += _value(word, length, size)
            at += length + size
            energy = (before[part] * scales[part, 0]) ** 2
            first = alike = 0
            k = 1
            while k < 64:
                if at > total:
                    return _SHORT
                word = _peek(bits, at)
                code = ac_codes[part, np.int64(word >> np.uint64(16))]
                if code == 0:
                    return _CODE
                length, size = np.int64(code >> 8), np.int64(code & 15)
                run = np.int64((code >> 4) & 15)
                at += length + size
                if size == 0:
                    if run != 15:
                        break
                    k += 16
                    if k > 63:
                        return _RUN
                    continue
                k += run
                if k > 63:
                    return _RUN
                number = _value(word, length, size)
                energy += (number * scales[part, k]) ** 2
                if k == 1:
                    first = number
                alike += number == first
                k += 1
            if at > total:
                return _SHORT
            if energy > most[part] or (alike == 63 and most[part] > 0):
                return _RANGE  # zero bytes decode to equal coefficients
        unit += 1
    return at


@compiled
def _read_first_dc(  # type: ignore[no-untyped-def]
    bits, total, pattern, places, dc_codes, steps, low, values
):
    before = np.zeros(len(steps), np.int64)
    at = 0
    for n in range(len(places)):
        part = pattern[n % len(pattern)]
        word = _peek(bits, at)
        code = dc_codes[part, np.int64(word >> np.uint64(16))]
        if code == 0:
            return _CODE
        length, size = np.int64(code >> 8), np.int64(code & 255)
        if size > 11:
            return _RANGE
        before[part] += _value(word, length, size)
        at += length + size
        if at > total:
            return _SHORT
        if (abs(before[part]) - 1) * (1 << low) * steps[part] > _LARGEST:
            return _RANGE
    return at


@compiled
def _read_first_ac(  # type: ignore[no-untyped-def]
    bits, total, places, codes, first, last, low, steps, filled
):
    at = ends = 0
    for place in places:
        if ends:
            ends -= 1
            continue
        k = first
        while k <= last:
            word = _peek(bits, at)
            code = codes[np.int64(word >> np.uint64(16))]
            if code == 0:
                return _CODE
            length, run, size = np.int64(code >> 8), np.int64((code >> 4) & 15), np.int64(code & 15)
            at += length
            if at > total:
                return _SHORT
            if size == 0 and run != 15:
                ends = (1 << run) - 1
                if run:
                    ends += np.int64((word >> np.uint64(32 - length - run)) & np.uint64(ends))
                at += run
                break
            k += run
            if size == 0:
                k += 1
                if k > last:
                    return _RUN
                continue
            if k > last:
                return _RUN
            number = _value(word, length, size)
            if (abs(number) - 1) * (1 << low) * steps[k] > _LARGEST:
                return _RANGE
            at += size
            filled[place] |= np.uint64(1) << np.uint64(k)
            k += 1
            if at > total:
                return _SHORT
        if at > total:
            return _SHORT
    return at if ends == 0 else _RUN


@compiled
def _refine_ac(  # type: ignore[no-untyped-def]
    bits, total, places, codes, first, last, low, steps, filled
):
    at = ends = 0
    for place in places:
        k = first
        while k <= last and not ends:
            if at > total:
                return _SHORT
            word = _peek(bits, at)
            code = codes[np.int64(word >> np.uint64(16))]
            if code == 0:
                return _CODE
            length, run, size = np.int64(code >> 8), np.int64((code >> 4) & 15), np.int64(code & 15)
            at += length
            if size == 0 and run != 15:
                ends = 1 << run
                if run:
                    ends += np.int64((word >> np.uint64(32 - length - run)) & np.uint64(ends - 1))
                at += run
                break
            if size > 1:
                return _CODE
            at += size
            while k <= last:
                if (filled[place] >> np.uint64(k)) & np.uint64(1):
                    at += 1
                elif run == 0:
                    break
                else:
                    run -= 1
                k += 1
            if k > last:
                return _RUN
            if size:
                filled[place] |= np.uint64(1) << np.uint64(k)
            k += 1
        if ends:
            while k <= last:
                if (filled[place] >> np.uint64(k)) & np.uint64(1):
                    at += 1
                k += 1
            ends -= 1
        if at > total:
            return _SHORT
    return at if ends == 0 else _RUN
