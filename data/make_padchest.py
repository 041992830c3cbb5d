"""Build a training folder from PadChest: python data/make_padchest.py [--help]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vilmedic import script
from vilmedic.preparation.builders.padchest import main

if __name__ == "__main__":
    script.run(main)
