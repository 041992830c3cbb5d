"""Write PNG files with any header, byte by byte (PNG specification, second edition)."""

from __future__ import annotations

import struct
import zlib

import numpy as np

PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
PASSES += ((1, 0, 2, 1),)
COLOUR_TYPES = {"grey": 0, "rgb": 2, "grey_alpha": 4, "rgba": 6}


def chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk with its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def make_png(
    pixels: np.ndarray,
    colour: str,
    *,
    depth: int = 16,
    filters: tuple[int, ...] = (0,),
    interlaced: bool = False,
    extra: bytes = b"",
) -> bytes:
    """Write pixels [H, W, C]; the rows use the given filters in turn."""
    height, width = pixels.shape[:2]
    parts = [pixels]
    if interlaced:
        parts = [pixels[top::down, left::across] for top, left, down, across in PASSES]
    data = b"".join(_rows(part, depth // 8, filters) for part in parts if part.size)
    header = struct.pack(">IIBBBBB", width, height, depth, COLOUR_TYPES[colour], 0, 0, interlaced)
    body = [chunk(b"IHDR", header), extra, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def _rows(pixels: np.ndarray, size: int, filters: tuple[int, ...]) -> bytes:
    step = size * pixels.shape[2]
    raw = pixels.astype(">u2" if size == 2 else "u1").reshape(len(pixels), -1)
    rows = raw.view(np.uint8).reshape(len(pixels), -1).astype(int)
    result = bytearray()
    above = np.zeros(rows.shape[1] + step, int)
    for number, row in enumerate(rows):
        kind = filters[number % len(filters)]
        here = np.concatenate([np.zeros(step, int), row])
        left, corner = here[:-step], above[:-step]
        guesses = (0 * row, left, above[step:], (left + above[step:]) // 2)
        guess = guesses[kind] if kind < 4 else _paeth(left, above[step:], corner)
        result += bytes([kind]) + ((row - guess) & 255).astype(np.uint8).tobytes()
        above = here
    return bytes(result)


def _paeth(left: np.ndarray, above: np.ndarray, corner: np.ndarray) -> np.ndarray:
    estimate = left + above - corner
    choices = np.stack([left, above, corner])
    return choices[np.abs(choices - estimate).argmin(axis=0), np.arange(len(left))]
