"""Build a training folder from CheXpert: python data/make_chexpert.py [--help]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vilmedic import script
from vilmedic.preparation.builders.chexpert import main

if __name__ == "__main__":
    script.run(main)
