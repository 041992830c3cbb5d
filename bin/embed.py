"""Embed images and texts with a run: python bin/embed.py ckpt/<name> --images DIR --out FILE."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vilmedic import script
from vilmedic.cli import embed

if __name__ == "__main__":
    script.run(embed)
