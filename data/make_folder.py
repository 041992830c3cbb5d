"""Build a training folder from any folder of images: python data/make_folder.py [--help]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vilmedic import script
from vilmedic.preparation.builders.any_folder import main

if __name__ == "__main__":
    script.run(main)
