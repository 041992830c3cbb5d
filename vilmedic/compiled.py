"""Numerical loops compiled by numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile, and cache the result for other processes if a folder allows it."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no writable cache folder
        return njit(nogil=True)(function)
