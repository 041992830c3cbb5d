"""Pictures of the documentation that no command of the package makes.

    python -m docs.generate.pictures explorer ckpt/demo-convirt
    python -m docs.generate.pictures views data/phantom

`explorer` opens report.html of an evaluated run in Chromium and saves what its embedding explorer
shows; `views` draws what SimCLR compares, two augmented views of each image. Both go to
docs/images.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from vilmedic.config import build, load
from vilmedic.registry import DATASETS

PICTURES = Path(__file__).parents[1] / "images"


def explorer(run: str) -> Path:
    """Save the picture of a run directory's explorer."""
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--window-size=1240,1400"):
        options.add_argument(word)
    browser = webdriver.Chrome(options=options)
    try:
        browser.get((Path(run) / "report.html").resolve().as_uri())
        shown = browser.find_element(By.CSS_SELECTOR, "#explorer")
        browser.execute_script("arguments[0].scrollIntoView()", shown)
        WebDriverWait(browser, 30).until(
            lambda _: shown.find_elements(By.CSS_SELECTOR, ".explorer canvas, .explorer svg")
        )
        path = PICTURES / "explorer.png"
        path.write_bytes(shown.screenshot_as_png)
    finally:
        browser.quit()
    return path


def views(root: str, columns: int = 4) -> Path:
    """Draw the two views of the first images of a phantom data set, one above the other."""
    config = load("config/phantom/simclr.yml", [f"dataset.root={root}"])
    data = build(DATASETS, config.dataset, split="train", training=True, seed=0, run_dir=Path())
    pairs = [data[number]["images"] for number in range(columns)]
    rows = [torch.cat([pair[view].expand(3, -1, -1) for pair in pairs], 2) for view in (0, 1)]
    pixels = torch.cat(rows, 1).permute(1, 2, 0).numpy()
    path = PICTURES / "simclr.png"
    Image.fromarray(pixels).resize((128 * columns, 256), Image.Resampling.BICUBIC).save(path)
    return path


if __name__ == "__main__":
    print({"explorer": explorer, "views": views}[sys.argv[1]](sys.argv[2]))
