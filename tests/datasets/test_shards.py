from __future__ import annotations

import io
import pickle
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vilmedic.datasets import shards as shards_module
from vilmedic.datasets.aligned import SampleKey
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.label import LabelDataset
from vilmedic.datasets.loader import make_loader
from vilmedic.datasets.pairs import ImSeq, ImSeqShards
from vilmedic.datasets.shards import ShardIndex, shard_order
from vilmedic.datasets.text import TextDataset
from vilmedic.errors import DataError
from vilmedic.files import BLOCK
from vilmedic.preparation.shards import write_shards

Args = Callable[..., dict[str, Any]]
Make = Callable[..., ImSeqShards]


@pytest.fixture
def shards(root: Path, tmp_path: Path) -> Path:
    """The data set in shards of three lines."""
    write_shards(root, tmp_path / "shards", samples=3)
    return tmp_path / "shards"


@pytest.fixture
def make(image_args: Args, text_args: Args, shards: Path) -> Make:
    def data_set(mixed: int = 16, **changes: Any) -> ImSeqShards:
        return ImSeqShards(
            image=ImageDataset(**image_args(root=str(shards), **changes)),
            seq=TextDataset(**text_args(root=str(shards))),
            mixed=mixed,
        )

    return data_set


@pytest.fixture
def server(shards: Path) -> Iterator[ThreadingHTTPServer]:
    """Serve the shards with the failures in `faults`, and count requests."""

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.strip("/")
            here.seen.append((name, self.headers.get("Range")))
            here.logins.append(self.headers.get("Authorization"))
            fault = here.faults.pop(0) if here.faults else None
            if isinstance(fault, int) and fault >= 400:
                self.send_error(fault)
                return
            path = shards / name
            if not path.is_file():
                self.send_error(404)
                return
            content = path.read_bytes()
            start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            part = content[start:]
            if fault == "wrong":
                part = bytes(len(part))
            self.wfile.write(part[:fault] if isinstance(fault, int) else part)

        def log_message(self, *_: Any) -> None:
            pass

    here: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here.seen, here.faults, here.logins = [], [], []
    thread = threading.Thread(target=partial(here.serve_forever, poll_interval=0.01), daemon=True)
    thread.start()
    yield here
    here.shutdown()
    here.server_close()


def url(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/"


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_samples_equal_those_of_the_folder(
    make: Make, image_args: Args, text_args: Args, label_args: Args, shards: Path
) -> None:
    folder = ImSeq(image=ImageDataset(**image_args()), seq=TextDataset(**text_args()))
    sharded = make()
    assert len(sharded) == len(folder)
    for index in range(8):
        one, other = sharded[SampleKey(index, 3)], folder[SampleKey(index, 3)]
        assert torch.equal(one["images"][0], other["images"][0])
        assert one["ids"] == other["ids"]
    where = sharded.describe(4)["image"]
    assert where == [f"{shards}/train-000001.tar:train_4.png"]
    assert sharded.lines([4]) == [f"{shards}/train.image.tok:5"]
    labelled = ImSeqShards(
        image=ImageDataset(**image_args(root=str(shards))),
        seq=TextDataset(**text_args(root=str(shards))),
        label=LabelDataset(**label_args(root=str(shards))),
    )
    assert labelled.describe(1)["labels"] == ["Pleural Effusion"]


def test_workers_and_restarts_do_not_change_the_data(make: Make) -> None:
    settings = {"batch_size": 2, "training": True, "seed": 1}
    whole = list(make_loader(make(), num_workers=0, epoch=1, **settings))
    assert sorted(int(i) for batch in whole for i in batch["index"]) == list(range(8))
    assert_same(make_loader(make(), num_workers=2, epoch=1, **settings), whole)
    assert_same(make_loader(make(), num_workers=0, epoch=1, start_batch=2, **settings), whole[2:])
    evaluation = make_loader(make(training=False), batch_size=3, training=False, seed=1)
    assert [batch["index"].tolist() for batch in evaluation] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_cache_on_shards(make: Make, tmp_path: Path) -> None:
    cached = make(cache=str(tmp_path / "cache"))
    for index in range(8):
        expected = make()[SampleKey(index)]["images"][0]
        assert torch.equal(cached[SampleKey(index)]["images"][0], expected)


def order(counts: list[int], **settings: Any) -> np.ndarray:
    of_samples = np.repeat(np.arange(len(counts)), counts)
    given = {"seed": 1, "epoch": 0, "batch_size": 8, "mixed": 8} | settings
    return shard_order(of_samples, **given).numpy()


@pytest.mark.parametrize("counts", [[5], [10, 10, 3], [7] * 20 + [2], [50] * 24, [1, 30, 2, 9]])
@pytest.mark.parametrize("batch_size", [1, 6, 7, 8, 32])
def test_order_has_every_sample_once_and_depends_only_on_its_arguments(
    counts: list[int], batch_size: int
) -> None:
    first = order(counts, batch_size=batch_size)
    assert sorted(first) == list(range(sum(counts)))
    assert np.array_equal(first, order(counts, batch_size=batch_size))
    if sum(counts) > 5:
        assert not np.array_equal(first, order(counts, batch_size=batch_size, epoch=1))
        assert not np.array_equal(first, order(counts, batch_size=batch_size, seed=2))


def test_few_shards_are_open_and_ranks_read_their_own() -> None:
    counts = [50] * 48
    shard = order(counts, batch_size=32, mixed=16) // 50
    rows = shard.reshape(-1, 32)
    for ranks in (2, 4, 8):
        pieces = np.split(rows, ranks, axis=1)
        read = [set(piece.ravel().tolist()) for piece in pieces]
        assert all(len(one) == 48 // ranks for one in read)
        assert len(set.union(*read)) == 48
    last, first = {}, {}
    for position, one in enumerate(shard.tolist()):
        first.setdefault(one, position)
        last[one] = position
    open_at = [
        sum(first[one] <= position <= last[one] for one in first)
        for position in range(0, len(shard), 50)
    ]
    assert max(open_at) <= 16 + 8  # lanes move to their next shards within a batch
    assert np.mean([len(set(row)) for row in rows.tolist()]) > 12  # batches are mixed


def test_shards_from_a_url_are_fetched_once_and_evicted(
    make: Make, server: Any, shards: Path, tmp_path: Path
) -> None:
    sizes = [path.stat().st_size for path in shards.glob("train-*.tar")]
    room = (max(sizes) + min(sizes)) / 2**30  # room for at most two of three shards
    remote = {"image_path": url(server), "spool": str(tmp_path / "spool"), "spool_gib": room}
    settings = {"batch_size": 2, "training": True, "seed": 1, "epoch": 1}
    data = make(mixed=1, **remote)
    assert_same(
        make_loader(data, num_workers=0, **settings),
        make_loader(make(mixed=1), num_workers=0, **settings),
    )
    names = [name for name, _ in server.seen]
    assert sorted(names) == [f"train-00000{n}.tar" for n in range(3)]
    held = [path.stat().st_size for path in (tmp_path / "spool").glob("*.tar")]
    assert 0 < sum(held) <= room * 2**30
    assert pickle.loads(pickle.dumps(data))[SampleKey(0)]["ids"] == data[SampleKey(0)]["ids"]
    assert data.describe(0)["image"] == [f"{url(server)}train-000000.tar:train_0.png"]


def test_two_workers_fetch_each_shard_once(make: Make, server: Any, tmp_path: Path) -> None:
    data = make(image_path=url(server), spool=str(tmp_path / "spool"))
    list(make_loader(data, batch_size=1, training=True, seed=1, num_workers=2))
    assert sorted(name for name, _ in server.seen) == [f"train-00000{n}.tar" for n in range(3)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module.time, "sleep", lambda _: None)


@pytest.mark.usefixtures("quick")
def test_fetching_survives_network_errors(make: Make, server: Any, tmp_path: Path) -> None:
    server.faults = [300, 503, "wrong", 1, None]
    data = make(image_path=url(server), spool=str(tmp_path / "spool"))
    expected = make()[SampleKey(0)]["images"][0]
    assert torch.equal(data[SampleKey(0)]["images"][0], expected)
    ranges = [given for _, given in server.seen]
    assert ranges[:3] == [None, "bytes=300-", "bytes=300-"]
    assert not list((tmp_path / "spool").glob(".*partial"))


def test_a_shard_removed_by_another_process_is_fetched_again(
    make: Make, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = shards_module.os.utime, []

    def removed(path: Path) -> None:
        calls.append(path)
        if len(calls) == 1:
            path.unlink()
        whole(path)

    monkeypatch.setattr(shards_module.os, "utime", removed)
    data = make(image_path=url(server), spool=str(tmp_path / "spool"))
    expected = make()[SampleKey(0)]["images"][0]
    assert torch.equal(data[SampleKey(0)]["images"][0], expected)
    assert [name for name, _ in server.seen] == ["train-000000.tar"] * 2


def test_the_password_comes_only_from_netrc(
    make: Make, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    remote = {"image_path": url(server), "spool": str(tmp_path / "spool")}
    make(**remote)[SampleKey(0)]
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login ada password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    make(**remote)[SampleKey(3)]
    assert server.logins == [None, "Basic YWRhOnNlY3JldA=="]
    with pytest.raises(DataError, match=r"into ~/\.netrc") as caught:
        make(image_path="http://ada:secret@127.0.0.1/")
    assert "secret" not in str(caught.value)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([404], r"train-000000\.tar cannot be fetched: the server answers 404"),
        ([403], "the server answers 403"),
        ([500] * 6, "the server answers 500"),
        (["wrong"] * 6, "content differs from the index"),
    ],
)
def test_unavailable_shards_are_an_error(
    make: Make, server: Any, tmp_path: Path, faults: list[Any], message: str
) -> None:
    server.faults = list(faults)
    data = make(image_path=url(server), spool=str(tmp_path / "spool"), on_error="skip")
    with pytest.raises(DataError, match=message) as caught:
        data[SampleKey(0)]
    assert not data.tolerates(caught.value)
    assert not list((tmp_path / "spool").glob("*.tar"))


def test_wrong_folders_are_refused(
    make: Make, image_args: Args, text_args: Args, shards: Path
) -> None:
    with pytest.raises(ValueError, match=r"holds no index of shards; data/make_shards\.py"):
        ImSeqShards(image=ImageDataset(**image_args()), seq=TextDataset(**text_args()))
    with pytest.raises(DataError, match=r"s3://bucket.*Allowed: a folder, or a URL"):
        make(image_path="s3://bucket/shards")
    with pytest.raises(DataError, match=r"nowhere/train-000000\.tar does not exist"):
        make(image_path="/nowhere")
    lines = (shards / "train.image.tok").read_text().splitlines()
    (shards / "train.image.tok").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(DataError, match=r"has 7 lines, and the index .* 8"):
        make()
    (shards / "train.image.tok").write_text("\n".join(["a.png,b.png", *lines[1:]]) + "\n")
    with pytest.raises(DataError, match=r"tok:1 names 2 images"):
        make()
    (shards / "train.shards.npz").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="no index of shards, or damaged"):
        make()


def test_a_truncated_shard_is_an_error(make: Make, shards: Path) -> None:
    path = shards / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train-000001\.tar has \d+ bytes, and the index expects"):
        make()


INDEX = {
    "names": np.array(["train-000000.tar"]),
    "sizes": np.array([1000]),
    "sha256": np.array(["0" * 64]),
    "starts": np.array([0, 1, 2]),
    "shard": np.array([0, 0]),
    "offset": np.array([512, 700]),
    "size": np.array([100, 300]),
}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"names": np.array(["x/../../../evil.tar"])}, "no file name"),
        ({"names": np.array(["/tmp/evil.tar"])}, "no file name"),
        ({"names": np.array(["a/b.tar"])}, "no file name"),
        ({"names": np.array([""])}, "no file name"),
        ({"sha256": np.array(["../" * 20 + "evil"])}, "64 hex digits"),
        ({"sha256": np.array(["0" * 63])}, "64 hex digits"),
        ({"sizes": np.array([-1])}, "the size of"),
        ({"offset": np.array([-512, 700])}, "outside its shard"),
        ({"offset": np.array([512, 701])}, "outside its shard"),
        ({"size": np.array([100, 2**62])}, "outside its shard"),
        ({"offset": np.array([512, 2**63 - 10])}, "outside its shard"),
        ({"shard": np.array([0, 1])}, "in none of its 1 shard"),
        ({"shard": np.array([0, -1])}, "in none of its 1 shard"),
        ({"starts": np.array([0, 2, 1])}, "do not rise"),
        ({"starts": np.array([1, 1, 2])}, "do not rise"),
        ({"starts": np.array([], dtype=np.int64)}, "do not rise"),
        ({"starts": np.array([0.0, 1.0, 2.0])}, "not lists of whole numbers"),
        ({"size": np.array([100])}, "different lengths"),
        ({"offset": np.array([[512, 700]])}, "not lists of whole numbers"),
    ],
)
def test_an_inconsistent_index_is_refused(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    path = tmp_path / "train.shards.npz"
    np.savez(path, **INDEX)
    assert len(ShardIndex.load(path).shards) == 1
    np.savez(path, **(INDEX | changes))
    with pytest.raises(DataError, match=why):
        ShardIndex.load(path)


def test_an_index_with_an_oversized_claim_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.shards.npz"
    np.savez(path, **INDEX)
    stream = io.BytesIO()
    claim = {"descr": "<i8", "fortran_order": False, "shape": (2**40,)}
    np.lib.format.write_array_header_1_0(stream, claim)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more.npy", stream.getvalue() + bytes(8))
    with pytest.raises(DataError, match="claims"):
        ShardIndex.load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(11):
            archive.writestr(f"{number}.npy", bytes(10**6))
    monkeypatch.setattr(shards_module, "MOST_BYTES", 10**7)
    with pytest.raises(DataError, match="unpacks to more than"):
        ShardIndex.load(path)


def test_a_download_longer_than_the_index_is_stopped(
    make: Make, server: ThreadingHTTPServer, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "TRIES", 1)
    dataset = make(image_path=url(server), spool=str(shards.parent / "spool"))
    first = sorted(shards.glob("train-*.tar"))[0]
    first.write_bytes(first.read_bytes() + bytes(3 * BLOCK))
    with pytest.raises(DataError, match="sends more than"):
        dataset[SampleKey(0, 0)]
    held = [path.stat().st_size for path in (shards.parent / "spool").iterdir()]
    assert max(held) < first.stat().st_size


def test_a_partial_download_longer_than_the_file_starts_again(
    make: Make, server: Any, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module.time, "sleep", lambda _: None)
    dataset = make(image_path=url(server), spool=str(shards.parent / "spool"))
    server.faults = [100, 416]
    assert dataset[SampleKey(0, 0)]["images"]
    assert [part for _, part in server.seen] == [None, "bytes=100-", None]
