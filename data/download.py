"""Fetch data sets: python data/download.py [NAME,NAME...] [--subset N] [--help]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vilmedic import script
from vilmedic.preparation.download.command import main

if __name__ == "__main__":
    script.run(lambda: main(scripts=Path(__file__).resolve().parent))
