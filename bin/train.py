"""Train a model: python bin/train.py config.yml [key=value ...]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vilmedic import script
from vilmedic.cli import train

if __name__ == "__main__":
    script.run(train)
