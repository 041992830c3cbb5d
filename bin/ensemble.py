"""Evaluate trained checkpoints: python bin/ensemble.py config.yml [key=value ...]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vilmedic import script
from vilmedic.cli import ensemble

if __name__ == "__main__":
    script.run(ensemble)
