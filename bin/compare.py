"""Compare evaluated runs: python bin/compare.py ckpt/a ckpt/b [ckpt/c ...]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vilmedic import script
from vilmedic.cli import compare

if __name__ == "__main__":
    script.run(compare)
