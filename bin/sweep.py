"""Train a grid of runs: python bin/sweep.py config.yml 'key=value,value' [key=value ...]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vilmedic import script
from vilmedic.cli import sweep

if __name__ == "__main__":
    script.run(sweep)
