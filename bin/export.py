"""Export a run as a folder to share: python bin/export.py ckpt/<name> out/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vilmedic import script
from vilmedic.cli import export

if __name__ == "__main__":
    script.run(export)
