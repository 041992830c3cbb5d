"""Launch environment before torch is loaded: rank, world size, which process reports errors.

The first process that fails reports the reason. The others then fail too, because they wait for it,
and stay silent.
"""

from __future__ import annotations

import os

LOST_CONNECTION = ("gloo", "nccl", "connection reset", "connection closed", "socket")


def process_count() -> int:
    """Number of processes of the run, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this is the process that writes and logs."""
    return os.environ.get("RANK", "0") == "0"


def first_to_fail() -> bool:
    """Return whether no other process of the run has failed before this one."""
    if process_count() == 1:
        return True
    from datetime import timedelta

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    key = f"vilmedic/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=5),
            wait_for_workers=False,
        )
        return store.add(key, 1) == 1
    except Exception:  # the process with the store is gone: better reported twice than never
        return True


def is_lost_connection(error: Exception) -> bool:
    """Return whether an error only means that another process has ended."""
    from torch.distributed import DistError

    text = str(error).lower()
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in LOST_CONNECTION)
    )
