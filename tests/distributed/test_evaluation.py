from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.several_processes import CPU, run_checks
from tests.small_models import tiny_gloria
from tests.toy_models import ToyAutoencoder, ToyData, ToyModel
from vilmedic.distributed import processes
from vilmedic.evaluation.evaluation import Ensemble
from vilmedic.evaluation.features import SplitFeatures, collect

SIZE, BATCH = 11, 4
TEXTS = ["no effusion", "large left pleural effusion", "heart normal ."]


class SharedToys(ToyData):
    """A toy data set whose batches are shared among the processes, as by a loader."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__("test", size)
        self.skipped: dict[int, str] = {}

    def skip(self, reasons: dict[int, str]) -> None:
        self.skipped |= reasons

    def loader(self) -> Any:
        for number, batch in enumerate(self.batches(BATCH)):
            if number % processes.world_size() == processes.rank():
                yield batch


def _plain(found: SplitFeatures) -> dict[str, Any]:
    assert found.labels is not None
    labels = torch.from_numpy(found.labels.toarray())
    return {"index": found.index, "loss": found.loss, "labels": labels, **found.features}


def _both(model: Any, data: SharedToys) -> list[dict[str, Any]]:
    def run() -> dict[str, Any]:
        return _plain(
            collect(model, data, data.loader(), split="test", device=CPU, precision="fp32")
        )

    with processes.alone():
        expected = run()
    return [run(), expected]


def contrastive() -> Any:
    torch.manual_seed(0)
    data = SharedToys()
    if processes.rank() == 1:
        data.skipped[3] = "bad"
    result = _both(ToyModel(), data)
    return [*result, list(data.skipped)]


def autoencoder() -> Any:
    return _both(ToyAutoencoder(), SharedToys())


def fewer_batches_than_processes() -> Any:
    return _both(ToyAutoencoder(), SharedToys(3))


def words_and_regions() -> Any:
    """The local similarity of GLoRIA on a split whose batches are shared among the processes."""
    torch.manual_seed(0)
    model = tiny_gloria().eval()
    images = torch.randn(SIZE, 3, 32, 32)

    class Data(SharedToys):
        def batches(self, batch_size: int) -> Any:
            for rows in torch.arange(SIZE).split(batch_size):
                yield {"index": rows, "images": images[rows]}

        def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
            return batch

        def encode_text(self, texts: Any) -> dict[str, torch.Tensor]:
            ids = torch.tensor([[2, len(text) % 10 + 4, 6, 3] for text in texts])
            places = torch.arange(4).expand(len(texts), 4)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "word_ids": places}

    data = Data()

    def run() -> Any:
        networks = Ensemble(
            members=[lambda: model],
            dataset=lambda name: data,
            loader=lambda dataset: data.loader(),
            device=CPU,
            precision="fp32",
        )
        found = networks.local_similarity("test", TEXTS, "sum")
        assert found is not None
        assert torch.equal(found, networks.local.similarity("test", TEXTS, "sum"))

        def measure() -> list[list[float]]:
            again = networks.local_similarity("test", TEXTS, "sum")
            assert again is not None
            return again.tolist()

        assert networks.once(measure) == found.tolist()
        return {"similarity": found}

    with processes.alone():
        expected = run()
    return [run(), expected]


def measured_by_the_main_process() -> Any:
    """A metric that needs another split: one process computes it, all encode the split."""
    torch.manual_seed(0)
    model, splits = ToyModel(), {"test": SharedToys(), "train": SharedToys(7)}
    networks = Ensemble(
        members=[lambda: model],
        dataset=splits.__getitem__,
        loader=lambda dataset: dataset.loader(),
        device=CPU,
        precision="fp32",
    )
    networks.split("test")
    model.seen.clear()
    ran = []

    def measure() -> dict[str, Any]:
        ran.append(processes.rank())
        train = networks.split("train").features["visual"]
        return {"sum": float(train.sum()), "nothing": None, "nan": float("nan")}

    result = networks.once(measure)
    assert result.pop("nan") != result.get("nan")
    with processes.alone():
        expected = collect(
            model,
            splits["train"],
            splits["train"].loader(),
            split="train",
            device=CPU,
            precision="fp32",
        )
    return {
        "result": result,
        "expected": {"sum": float(expected.features["visual"].sum()), "nothing": None},
        "ran": ran,
        "batches": model.seen[:1],
        "kept": len(networks.split("train")),
    }


def agreements() -> Any:
    from vilmedic.training.parallel import seed_this_process

    torch.manual_seed(0)
    seed_this_process(3)
    return {
        "gathered": processes.gather({"rank": processes.rank(), "t": torch.arange(2)}),
        "from_main": processes.on_main(lambda: [processes.rank(), "text", None]),
        "drawn": torch.rand(3),
    }


EQUAL = [contrastive, autoencoder, fewer_batches_than_processes, words_and_regions]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_checks(
        [*EQUAL, measured_by_the_main_process, agreements], tmp_path_factory.mktemp("two")
    )


@pytest.mark.parametrize("check", EQUAL, ids=lambda check: check.__name__)
def test_shared_split_equals_one_process(check: Any, results: dict[str, list[Any]]) -> None:
    for result in results[check.__name__]:
        assert not isinstance(result, str), result
        given, expected, *_ = result
        assert given.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(given[name], value), name
            else:
                assert given[name] == value, name


def test_samples_skipped_by_one_process_are_known_to_all(results: dict[str, list[Any]]) -> None:
    assert [result[2] for result in results["contrastive"]] == [[3], [3]]


def test_metrics_are_computed_once(results: dict[str, list[Any]]) -> None:
    main, other = results["measured_by_the_main_process"]
    for result in (main, other):
        assert not isinstance(result, str), result
        assert result["result"] == result["expected"]
        assert result["kept"] == 7
    assert (main["ran"], other["ran"]) == ([0], [])
    assert (main["batches"], other["batches"]) == ([4], [3])  # each encodes its own part


def test_processes_agree_but_have_their_own_random_state(results: dict[str, list[Any]]) -> None:
    one, other = results["agreements"]
    for result in (one, other):
        assert [found["rank"] for found in result["gathered"]] == [0, 1]
        assert result["from_main"] == [0, "text", None]
    torch.manual_seed(0)
    assert torch.equal(one["drawn"], torch.rand(3))
    assert not torch.equal(one["drawn"], other["drawn"])
