"""Speed of bin/compare.py on many runs, against a short script that reads the same files.

    python benchmarks/compare.py
    python benchmarks/compare.py --runs 1000 --repetitions 5

Both are whole commands, from the start of Python to the printed table, on the same made-up run
directories: resolved configurations of ConVIRT with learning rates and seeds, and their results.
The peer is a short user script: `yaml.safe_load` and json, runs grouped by their configuration
without name and seed, mean and standard deviation of each number; `peer_in_c` is the same with
PyYAML's C parser, which few use. Unlike ours, neither checks whether the runs are comparable. Times
are medians of alternating repetitions, after one warm-up of each. The last line printed is one JSON
object; `of_1000` is the time for 1,000 runs at the measured speed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import alternate
from tests.comparison.runs import write_run
from vilmedic.config.load import load

ROOT = Path(__file__).resolve().parents[1]
SEEDS = 5
PEER = """\
import json, statistics, sys
from pathlib import Path
import yaml
loader = getattr(yaml, sys.argv.pop(1))  # a safe loader
groups = {}
for run in map(Path, sys.argv[1:]):
    config = loader(next(run.glob("config_*.yml")).read_text()).get_single_data()
    config.pop("name"), config["trainor"].pop("seed")
    results = json.loads((run / "results_test.json").read_text())
    groups.setdefault(json.dumps(config, sort_keys=True), []).append(results["metrics"])
for runs in groups.values():
    parts = []
    for metric in runs[0]:
        for name, value in runs[0][metric].items():
            if isinstance(value, float):
                values = [one[metric][name] for one in runs]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                parts.append(f"{metric} {name} {statistics.mean(values):.3f} +- {spread:.3f}")
    print(len(runs), *parts)
"""


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--repetitions", type=int, default=5)
    return parser.parse_args()


def write_runs(folder: Path, count: int) -> list[str]:
    """Write run directories: five seeds for each learning rate."""
    written = []
    for number in range(count):
        setting, seed = divmod(number, SEEDS)
        run = write_run(folder / f"run{number}", seed=seed, draw=number, predictions=False)
        words = [f"name={run.name}", f"trainor.seed={seed}"]
        words += [f"trainor.optim_params.lr={1e-4 * (1 + setting)}"]
        config = load(str(ROOT / "config/phantom/convirt.yml"), words)
        (run / f"config_{seed}.yml").write_text(config.to_yaml())
        written.append(str(run))
    return written


def main() -> None:
    """Measure both and print the comparison."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        runs = write_runs(Path(name), arguments.runs)

        def command(*words: str) -> Callable[[], object]:
            call = [sys.executable, *words, *runs]
            return lambda: subprocess.run(call, check=True, stdout=subprocess.DEVNULL)

        steps = {
            "ours": command(str(ROOT / "bin/compare.py"), "--split", "test"),
            "peer": command("-c", PEER, "SafeLoader"),
            "peer_in_c": command("-c", PEER, "CSafeLoader"),
        }
        times = alternate(steps, arguments.repetitions)
    result = {
        "name": f"compare {arguments.runs} runs",
        "ours": round(times["ours"], 3),
        "peer": round(times["peer"], 3),
        "unit": "s",
        "ratio": round(times["peer"] / times["ours"], 2),
        "peer_in_c": round(times["peer_in_c"], 3),
        "of_1000": round(times["ours"] * 1000 / arguments.runs, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
