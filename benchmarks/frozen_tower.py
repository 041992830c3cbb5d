"""Time of an epoch with a frozen image encoder: cached features against recomputed ones.

    python benchmarks/frozen_tower.py
    python benchmarks/frozen_tower.py --clock wall --keys trainor.device=cuda

The `Trainor` trains each system on the phantom data set twice in one process, with the default
`trainor.frozen_cache_gib` and with 0: a linear probe, ConVIRT with a frozen image encoder, and
ConVIRT with both encoders frozen and trained heads. An epoch is what a user waits for: loading,
steps, validation and checkpoint; `steps` is the part before the validation. Times are medians over
all epochs except the first. They are CPU time unless `--clock wall` is given: the process loads the
data itself (`trainor.num_workers=0`), and other programs on the machine do not count. `once` is the
time for computing the features before the first epoch. The last line printed is one JSON object,
for ConVIRT with a frozen image encoder.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from vilmedic.config.load import load
from vilmedic.phantom.write import Plan, build
from vilmedic.training import trainor
from vilmedic.training.trainor import Trainor

ROOT = Path(__file__).resolve().parents[1]
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
STILL = ("dataset.image.preset=center_crop", "~dataset.image.transforms", "trainor.num_workers=0")
PROMPTS = f"validator.metrics.zero_shot.prompts={ROOT}/config/phantom/prompts-impression.yml"
CONVIRT = (
    "config/phantom/convirt.yml",
    ("image", "seq", "label"),
    ("model.cnn.freeze=true", PROMPTS),
)
SYSTEMS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "probe": (
        "config/downstream/phantom.yml",
        ("image", "label"),
        ("model.freeze=all", "trainor.steps=null", "validator.every=1epochs"),
    ),
    "image": CONVIRT,
    "both": (*CONVIRT[:2], (*CONVIRT[2], "model.encoder.freeze=true")),
}
TINY = ("model.cnn.backbone=shufflenet_v2_x0_5",)
TINY_CONVIRT = (*TINY, "model.projection.visual_embedding_dim=1024", "trainor.batch_size=4")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--train", type=int, default=1024, help="training samples")
    parser.add_argument("--validate", type=int, default=128, help="validation samples")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument(
        "--epochs", type=int, default=5, help="epochs per run; the first is not counted"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--tiny", action="store_true", help="small networks, for a trial run")
    parser.add_argument("--keys", nargs="*", default=[], help="key=value for all runs")
    return parser.parse_args()


def train(
    words: list[str], config: str, clock: Callable[[], float]
) -> tuple[float, list[float], list[float]]:
    """Train once; return seconds for the features, for each epoch, and for its steps alone."""
    once: list[float] = []
    epochs: list[float] = []
    steps: list[float] = []
    kept = trainor.features_ready, Trainor._epoch, Trainor._train_on_all_batches

    def timed(call: Callable[..., None], times: list[float]) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            began = clock()
            call(*arguments, **options)
            times.append(clock() - began)

        return run

    trainor.features_ready = timed(kept[0], once)
    Trainor._epoch = timed(kept[1], epochs)  # type: ignore[method-assign]
    Trainor._train_on_all_batches = timed(kept[2], steps)  # type: ignore[method-assign]
    try:
        Trainor(load(ROOT / config, words, training=True)).start()
    finally:
        trainor.features_ready = kept[0]
        Trainor._epoch = kept[1]  # type: ignore[method-assign]
        Trainor._train_on_all_batches = kept[2]  # type: ignore[method-assign]
    return sum(once), epochs, steps


def main() -> None:
    """Measure all and print the comparison."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        plan = Plan(
            train=arguments.train, validate=arguments.validate, test=1, size=arguments.pixels
        )
        build(data, plan, force=False, workers=arguments.threads)
        for name in arguments.systems:
            config, parts, keys = SYSTEMS[name]
            words = [f"dataset.{part}.root={data}" for part in parts]
            words += [*STILL, *keys, f"ckpt_dir={folder}/ckpt", "trainor.loggers=[]"]
            words += [f"trainor.epochs={arguments.epochs}", "trainor.seed=0"]
            if arguments.tiny:
                words += TINY if name == "probe" else TINY_CONVIRT
            words += arguments.keys
            clock = CLOCKS[arguments.clock]
            once, *ours = train([*words, f"name={name}-kept"], config, clock)
            off = [*words, f"name={name}-0", "trainor.frozen_cache_gib=0"]
            _, *peer = train(off, config, clock)
            times = [statistics.median(each[0][1:]) for each in (ours, peer)]
            steps = [statistics.median(each[1][1:]) for each in (ours, peer)]
            print(
                f"{name:6s} recomputed {times[1]:7.3f} s an epoch, cached {times[0]:7.3f}: "
                f"{times[1] / times[0]:5.1f} times as fast; steps {steps[1]:.3f} and "
                f"{steps[0]:.3f}: {steps[1] / steps[0]:.1f} times; once {once:.2f} s",
                flush=True,
            )
            results[name] = {
                "name": f"frozen_tower {name}",
                "ours": round(times[0], 4),
                "peer": round(times[1], 4),
                "unit": "s",
                "ratio": round(times[1] / times[0], 2),
            }
    print(json.dumps(results.get("image") or results[arguments.systems[-1]]))


if __name__ == "__main__":
    main()
