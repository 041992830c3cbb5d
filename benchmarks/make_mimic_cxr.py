"""Time to build a MIMIC-CXR folder from 200,000 report files, against a published-style script.

    python benchmarks/make_mimic_cxr.py

Both read the same generated tree in the layout of the release; the published script builds no
labels. The tree is read once before, so that both find it in the file cache. The last line printed
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.preparation.archives import Mimic, write_mimic
from tests.preparation.published import make_folder
from vilmedic.preparation.builders.chexpert import CHEXPERT_LABELS
from vilmedic.preparation.builders.mimic_cxr import main as build

SENTENCES = [
    "The lungs are clear of focal consolidation, pleural effusion or pneumothorax.",
    "The heart size is normal and the mediastinal contours are unremarkable.",
    "There is a small right pleural effusion with adjacent compressive atelectasis.",
    "Moderate cardiomegaly is unchanged since the prior study.",
    "A right internal jugular catheter ends in the low superior vena cava.",
    "Mild interstitial edema has improved in the interval.",
    "Multiple healed left rib fractures are again seen.",
    "The upper abdomen is unremarkable.",
]


def make_archive(studies: int, seed: int = 0) -> Mimic:
    """Reports of about 900 characters, three studies a patient, one or two images a study."""
    draw = random.Random(seed)
    made = Mimic()
    for number in range(studies):
        patient, study = str(10000000 + 300 * (number // 3)), str(50000000 + number)
        split = {0: "validate", 1: "test"}.get(number // 3 % 60, "train")
        for view in draw.choice([["PA", "LATERAL"], ["AP"]]):
            dicom = "-".join(f"{draw.getrandbits(32):08x}" for _ in range(5))
            made.split.append([dicom, study, patient, split])
            made.metadata.append([dicom, patient, study, "CHEST", view, "3056", "2544"])
        values = draw.choices(["1.0", "0.0", "-1.0", ""], [2, 1, 1, 12], k=len(CHEXPERT_LABELS))
        made.chexpert.append([patient, study, *values])
        findings = "\n ".join(draw.choices(SENTENCES, k=draw.randint(4, 10)))
        impression = "\n ".join(draw.choices(SENTENCES, k=draw.randint(1, 3)))
        made.reports[f"p{patient[:2]}/p{patient}/s{study}.txt"] = (
            "                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n \n"
            " INDICATION:  ___ year old with cough  // eval for pneumonia\n \n"
            " TECHNIQUE:  Chest PA and lateral\n \n COMPARISON:  ___\n \n"
            f" FINDINGS: \n \n {findings}\n \n IMPRESSION: \n \n {impression}\n"
        )
    return made


def main() -> None:
    """Measure both and print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--studies", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        raw = Path(place, "raw")
        write_mimic(raw, make_archive(arguments.studies), zipped=False, compressed=False)
        size = sum(path.stat().st_size for path in raw.rglob("*.txt") if path.read_bytes())
        print(f"{arguments.studies} reports of {size / arguments.studies:.0f} bytes", flush=True)

        began = time.perf_counter()
        tables = [raw / f"mimic-cxr-2.0.0-{kind}.csv" for kind in ("split", "metadata")]
        written = make_folder(raw / "files", *tables, Path(place, "peer"))
        peer = time.perf_counter() - began
        print(f"peer: {written} lines in {peer:.1f} s", flush=True)

        began = time.perf_counter()
        options = ["--reports", str(raw), "--tables", str(raw), "--root", f"{place}/ours"]
        if build([*options, "--workers", str(arguments.workers)]):
            raise SystemExit("the build failed")
        ours = time.perf_counter() - began
        same = all(
            Path(place, "ours", f"{split}.{kind}.tok").read_bytes()
            == Path(place, "peer", f"{split}.{kind}.tok").read_bytes()
            for split in ("train", "validate", "test")
            for kind in ("report", "image")
        )
        print(f"ours: {ours:.1f} s; reports and images equal: {same}")
    result = {
        "name": "make_mimic_cxr",
        "ours": round(ours, 1),
        "peer": round(peer, 1),
        "unit": "s",
        "ratio": round(peer / ours, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
