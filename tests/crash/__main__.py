"""Kill every system at random moments: python -m tests.crash [--kills 20] [--seed 0] [system ...].

Prints for each system how many processes were killed, and that every run, resumed to its end,
equals the uninterrupted one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.crash.killing import kill_at_random
from tests.crash.systems import SYSTEMS
from vilmedic.phantom.write import Plan, build


def main() -> None:
    """Kill, compare and count."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("systems", nargs="*", default=[system.name for system in SYSTEMS])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    unknown = set(arguments.systems) - {system.name for system in SYSTEMS}
    if unknown:
        parser.error(f"no such system: {', '.join(sorted(unknown))}")
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        build(data, Plan(train=21, validate=9, test=4, size=32), force=False, workers=1)
        for system in SYSTEMS:
            if system.name not in arguments.systems:
                continue
            began = time.monotonic()
            base = Path(folder) / system.name
            done = kill_at_random(system, data, base, arguments.kills, arguments.seed)
            total += done.kills
            print(
                f"{system.name}: killed {done.kills} times in {done.runs} runs, "
                f"{done.while_saving} of them while a checkpoint was being written; weights, "
                "optimizer, best checkpoints and metrics equal those of the uninterrupted run "
                f"({time.monotonic() - began:.0f} s)",
                flush=True,
            )
    print(f"{total} kills, no difference")


if __name__ == "__main__":
    main()
