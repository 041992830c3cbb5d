"""Build a training folder from the Indiana collection: python data/make_indiana.py [--help]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vilmedic import script
from vilmedic.preparation.builders.indiana import main

if __name__ == "__main__":
    script.run(main)
