"""An epoch of training with a frozen image encoder, its features kept against computed each time.

    python benchmarks/frozen_tower.py
    python benchmarks/frozen_tower.py --train 4000 --keys trainor.device=cuda trainor.precision=bf16

Each system of the phantom data set is trained by the `Trainor` twice in one process, with
`trainor.frozen_cache_gib` as it is and with 0: a linear probe, ConVIRT with a frozen image encoder,
and ConVIRT with both encoders frozen, whose heads are trained. An epoch is all that it is for a
user: loading, steps, evaluation and checkpoint. Times are medians over the epochs but the first.
`once` is what computing the features takes before the first epoch. The last line printed is one
JSON object, for ConVIRT with a frozen image encoder.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from vilmedic.config.load import load
from vilmedic.phantom.write import Plan, build
from vilmedic.training import trainor
from vilmedic.training.trainor import Trainor

ROOT = Path(__file__).resolve().parents[1]
STILL = ("dataset.image.preset=center_crop", "~dataset.image.transforms")
CONVIRT = ("config/phantom/convirt.yml", ("image", "seq", "label"), ("model.cnn.freeze=true",))
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
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--train", type=int, default=1024, help="training samples")
    parser.add_argument("--validate", type=int, default=128, help="validation samples")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5, help="of each run, the first not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the script")
    parser.add_argument("--keys", nargs="*", default=[], help="key=value for all of them")
    return parser.parse_args()


def train(words: list[str], config: str) -> tuple[float, list[float]]:
    """Train once; seconds that features took, and those of each epoch."""
    once, epochs = 0.0, []
    ready, epoch = trainor.features_ready, Trainor._epoch

    def timed_ready(*arguments: Any, **options: Any) -> None:
        nonlocal once
        began = time.perf_counter()
        ready(*arguments, **options)
        once += time.perf_counter() - began

    def timed_epoch(self: Trainor, number: int) -> None:
        began = time.perf_counter()
        epoch(self, number)
        epochs.append(time.perf_counter() - began)

    trainor.features_ready, Trainor._epoch = timed_ready, timed_epoch  # type: ignore[method-assign]
    try:
        Trainor(load(ROOT / config, words, training=True)).start()
    finally:
        trainor.features_ready, Trainor._epoch = ready, epoch  # type: ignore[method-assign]
    return once, epochs


def main() -> None:
    """Measures all and prints the comparison."""
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
            once, ours = train([*words, f"name={name}-kept"], config)
            _, peer = train([*words, f"name={name}-0", "trainor.frozen_cache_gib=0"], config)
            times = [statistics.median(epochs[1:]) for epochs in (ours, peer)]
            print(
                f"{name:6s} computed each time {times[1]:7.3f} s an epoch, kept {times[0]:7.3f}: "
                f"{times[1] / times[0]:5.1f} times as fast; once {once:.2f} s",
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
