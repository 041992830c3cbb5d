"""16-bit PNG reader that keeps all bits; Pillow keeps 8 of them in colour images."""

from __future__ import annotations

import zlib

import numpy as np

from vilmedic.compiled import compiled

CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type: grey, colours, and both with alpha
# Of each pass of an interlaced file: first row, first column, step of rows and of columns.
_PASSES = (
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
)


def read_wide_png(content: bytes) -> np.ndarray:
    """Decode a PNG of 16 bits (PNG specification, sections 7 to 10).

    Args:
        content: the file, with verified chunks and an allowed size.

    Returns:
        uint16 [C, H, W]; C is 1 or 3, and one more with alpha.

    Raises:
        ValueError: it is not such an image, or is incomplete.
    """
    width, height = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    kind, interlaced = content[25], content[28]
    if content[24] != 16 or kind not in CHANNELS or interlaced > 1:
        raise ValueError("its header is damaged")
    channels = CHANNELS[kind]
    passes = _PASSES if interlaced else ((0, 0, 1, 1),)
    pixels = np.zeros((height, width, channels), ">u2")
    parts = [pixels[top::down, left::across] for top, left, down, across in passes]
    lengths = [len(part) * (1 + part.shape[1] * 2 * channels) for part in parts if part.size]
    stream = zlib.decompressobj()
    data = stream.decompress(b"".join(_data_chunks(content)), sum(lengths))
    if len(data) < sum(lengths):
        raise ValueError("its data end too early")
    start = 0
    for part in parts:
        if part.size:
            rows = np.frombuffer(data, np.uint8, offset=start)
            rows = rows[: len(part) * (1 + part.shape[1] * 2 * channels)].reshape(len(part), -1)
            start += rows.size
            if rows[:, 0].max() > 4:
                raise ValueError("it names a filter that does not exist")
            plain = _unfiltered(rows, 2 * channels)
            part[:] = plain.view(">u2").reshape(part.shape)
    return pixels.astype(np.uint16).transpose(2, 0, 1)


def _data_chunks(content: bytes) -> list[bytes]:
    found, place = [], 8
    while place + 12 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        if content[place + 4 : place + 8] == b"IDAT":
            found.append(content[place + 8 : place + 8 + length])
        place += 12 + length
    return found


@compiled
def _unfiltered(rows, step):  # type: ignore[no-untyped-def]
    """Undo the filter of each row, given in its first byte; `step` bytes are a pixel."""
    height, width = rows.shape[0], rows.shape[1] - 1
    result = np.zeros((height, width), np.uint8)
    for row in range(height):
        kind = rows[row, 0]
        for column in range(width):
            left = int(result[row, column - step]) if column >= step else 0
            above = int(result[row - 1, column]) if row else 0
            corner = int(result[row - 1, column - step]) if row and column >= step else 0
            guess = 0
            if kind == 1:
                guess = left
            elif kind == 2:
                guess = above
            elif kind == 3:
                guess = (left + above) // 2
            elif kind == 4:
                to_left, to_above = abs(above - corner), abs(left - corner)
                to_corner = abs(left + above - 2 * corner)
                if to_left <= to_above and to_left <= to_corner:
                    guess = left
                elif to_above <= to_corner:
                    guess = above
                else:
                    guess = corner
            result[row, column] = (int(rows[row, column + 1]) + guess) & 255
    return result
