"""Write the report pages of a run: python bin/report.py ckpt/<name>."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vilmedic import script
from vilmedic.cli import report

if __name__ == "__main__":
    script.run(report)
