"""Synthetic frontal chest X-rays with findings drawn in, their reports and their labels.

A phantom is anatomy given by formulas: every case is drawn from a seed, so that the data set can be
rebuilt anywhere and holds no patient. It exists to see a training run work in minutes, not to stand
in for real radiographs.

Sides are the patient's, as in a report: the patient's right is on the left of the image.
"""

from __future__ import annotations

VERSION = 2
"""Raised whenever the same arguments give other images or texts."""

FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Pleural Effusion",
    "Pneumonia",
    "Pneumothorax",
)
"""The findings drawn, in the order in which labels are written."""

NO_FINDING = "No Finding"
SPLITS = ("train", "validate", "test")
