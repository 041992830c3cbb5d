"""Build a training folder from MIMIC-CXR: python data/make_mimic_cxr.py [--balanced] [--help]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vilmedic import script
from vilmedic.preparation.builders.mimic_cxr import main

if __name__ == "__main__":
    script.run(main)
