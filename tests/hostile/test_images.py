"""Untrusted images are decoded or refused with a message; nothing hangs or is executed."""

from __future__ import annotations

import io
import os
import pickle
import random
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from data import check, resize
from tests.datasets.dicom_files import make_dicom, make_jpeg_dicom
from tests.datasets.dicom_files import table as lookup_table
from tests.hostile.table import Table
from vilmedic.config.load import load
from vilmedic.datasets.decode import decode_image
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.loader import make_loader
from vilmedic.errors import DataError
from vilmedic.preparation.checking import check_data
from vilmedic.tables import read_table

IMAGES = 100
SEED = 20
SECONDS = 2.0
CONFIG = """
dataset: {{proto: ImageDataset, root: {root}, resize: 256, crop: 16}}
model:
  proto: SimCLR
  cnn: {{proto: CNN, backbone: resnet18, output_layer: avgpool, pretrained: False}}
  projection: {{visual_embedding_dim: 512, projection_dim: 128}}
ckpt_dir: {root}/ckpt
name: checked
"""
Hostile = tuple[Path, Path, dict[str, str]]
EVIL = b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4), b"\xff\xff\xff\x7f", b"\0\0\0\x80"


def whole_files(folder: Path) -> dict[str, bytes]:
    """One valid file of each format and type."""
    grey = np.random.default_rng(SEED).integers(0, 256, (48, 64), dtype=np.uint8)
    kinds = {"grey": Image.fromarray(grey), "rgb": Image.fromarray(np.dstack([grey] * 3))}
    kinds["wide"] = Image.fromarray(grey.astype(np.uint16) * 16)
    found = {}
    for name, image in kinds.items():
        formats: list[tuple[str, str, dict[str, Any]]] = [
            ("png", "PNG", {}),
            ("tif", "TIFF", {"compression": "tiff_lzw"}),
        ]
        if name != "wide":
            formats += [("jpg", "JPEG", {}), ("jpeg", "JPEG", {"progressive": True})]
            formats += [("bmp", "BMP", {}), ("webp", "WEBP", {}), ("jp2", "JPEG2000", {})]
        for suffix, form, options in formats:
            stream = io.BytesIO()
            image.save(stream, form, **options)
            found[f"{name}.{suffix}"] = stream.getvalue()
    stream = io.BytesIO()
    np.save(stream, grey)
    found["array.npy"] = stream.getvalue()
    path = folder / "seed.dcm"
    lut = lookup_table([n // 16 for n in range(4096)], 0, 8)
    for syntax in ("", RLELossless, JPEG2000Lossless, JPEGLSLossless):
        make_dicom(path, grey.astype(np.uint16) * 16, syntax, VOILUTSequence=[lut])
        found[f"dicom{len(found)}.dcm"] = path.read_bytes()
    make_jpeg_dicom(path, np.dstack([grey] * 3))
    found["jpeg.dcm"] = path.read_bytes()
    path.unlink()
    return found


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A file with some bytes changed, removed, repeated or inserted."""
    changed = bytearray(content)
    kind, place = draw.randrange(6), draw.randrange(len(changed))
    head = draw.randrange(min(600, len(changed)))
    if kind == 0:
        for _ in range(draw.randrange(1, 9)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    elif kind == 1:
        changed[head] = draw.choice((0, 1, 127, 128, 255))
    elif kind == 2:
        del changed[place:]
    elif kind == 3:
        changed[place : place + 100] = bytes(100)
    elif kind == 4:
        changed[place:place] = draw.randbytes(40)
    else:
        changed[head : head + 4] = draw.choice(EVIL)
    return bytes(changed)


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def png(width: int, height: int, data: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG with any header."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def deflated_bomb() -> bytes:
    """A deflated DICOM file of a few MB that unpacks to 3 GB."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.filewriter import write_file_meta_info
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = "1.2.3"
    stream = io.BytesIO()
    write_file_meta_info(stream, meta, enforce_standard=False)
    pack = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    part = pack.compress(bytes(2**20)) + pack.flush(zlib.Z_FULL_FLUSH)
    same = pack.compress(bytes(2**20)) + pack.flush(zlib.Z_FULL_FLUSH)
    return bytes(128) + b"DICM" + stream.getvalue() + part + same * 3000 + pack.flush()


def crafted(marker: Path) -> dict[str, bytes]:
    """Malicious files."""
    claim = "{'descr': '<f8', 'fortran_order': False, 'shape': (%s), }"
    arrays = {
        name: b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode()
        for name, text in (
            ("terabytes.npy", claim % "1000000, 1000000"),
            ("negative.npy", claim % "-4, -4"),
            ("channels.npy", claim % "4, 4, 10000000000"),
            ("deep.npy", claim % ("(" * 500)),
        )
    }
    evil = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    evil += f"(%pipe%touch {marker}) (w) file\n({marker}) (w) file\nshowpage\n".encode()
    rgb = io.BytesIO()
    Image.new("RGB", (9, 9)).save(rgb, "JPEG")
    scans = rgb.getvalue()[:-2] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 2000 + b"\xff\xd9"
    long = io.BytesIO()
    Image.new("L", (65500, 1)).save(long, "JPEG")
    pickled = io.BytesIO()
    np.lib.format.write_array(pickled, np.array([[Runs(marker)]], object), allow_pickle=True)
    return arrays | {
        "script.jpg": evil,
        "script.eps": evil,
        "scans.jpg": scans,
        "pickled.npy": pickled.getvalue(),
        "plain_pickle.npy": pickle.dumps(Runs(marker)),
        "huge.png": png(2**31 - 1, 2**31 - 1, zlib.compress(bytes(10))),
        "wide.png": png(60000, 60000, zlib.compress(bytes(10)), 16, 6),
        "short.png": png(9000, 9000, zlib.compress(bytes(10)), 16, 2),
        "long.jpg": long.getvalue(),
        "bomb.dcm": deflated_bomb(),
        "nul.jpg": bytes(1000),
        "gif.jpg": b"GIF89a" + bytes(200),
        "fits.png": b"SIMPLE  =" + bytes(3000),
    }


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Hostile]:
    """A folder of hostile images, the file that executed code would create, and their names."""
    from vilmedic.datasets import jpeg_data, wide_png

    jpeg_data.check_jpeg(whole_files(tmp_path)["grey.jpeg"])  # compile before timing
    wide_png.read_wide_png(png(2, 2, zlib.compress(bytes(26)), 16, 2))
    folder, marker = tmp_path / "images", tmp_path / "executed"
    folder.mkdir()
    draw = random.Random(SEED)
    whole = whole_files(tmp_path)
    names: dict[str, str] = {}
    for name, content in crafted(marker).items():
        (folder / name).write_bytes(content)
        names[name] = "crafted"
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "device.jpg").symlink_to("/dev/zero")
    (folder / "nowhere.jpg").symlink_to(folder / "gone")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    server = socket.socket(socket.AF_UNIX)
    os.chdir(folder)
    server.bind("socket.jpg")
    special = ("pipe.jpg", "folder.jpg", "device.jpg", "nowhere.jpg", "loop.jpg", "socket.jpg")
    names |= dict.fromkeys(special, "no file")
    while len(names) < IMAGES:
        origin = draw.choice(sorted(whole))
        name = f"{len(names):03d}-{origin}"
        (folder / name).write_bytes(mutated(whole[origin], draw))
        names[name] = "mutated"
    yield folder, marker, names
    server.close()


@pytest.fixture(autouse=True)
def back() -> Iterator[None]:
    """Restore the working directory: tests change it because paths of sockets must be short."""
    before = Path.cwd()
    yield
    os.chdir(before)


def attempt(act: Callable[[], object], name: str) -> str | None:
    """The message of a refusal; None if the image was accepted."""
    started = time.process_time()
    try:
        act()
        message = None
    except DataError as error:
        message = str(error)
    assert time.process_time() - started < SECONDS, f"{name} takes too long"
    assert message != "", f"{name} is refused without a message"
    return message


def test_images_are_decoded_or_refused(hostile: Hostile, table: Table) -> None:
    folder, marker, names = hostile
    assert len(names) == IMAGES
    refused = {}
    for name, kind in names.items():

        def decode(path: Path = folder / name) -> None:
            decode_image(path, thorough=True)

        message = table.attempt("images", name, decode, seconds=SECONDS, marker=marker)
        if message is not None:
            assert str(folder / name) in message
            refused[name] = message
        elif kind == "no file":
            pytest.fail(f"{name} was read")
    taken = set(names) - set(refused)
    assert {name for name in taken if names[name] == "crafted"} == {"long.jpg"}
    assert "a named pipe" in refused["pipe.jpg"]
    assert "a folder" in refused["folder.jpg"]
    assert "a socket" in refused["socket.jpg"]
    assert "a device" in refused["device.jpg"]
    assert "max_pixels=134217728" in refused["terabytes.npy"]
    assert "max_pixels=134217728" in refused["huge.png"]
    assert "not an image in a known format" in refused["script.jpg"]


def test_training_raises_or_skips(hostile: Hostile, tmp_path: Path) -> None:
    """`raise` gives a message; `skip` trains on all other images."""
    folder, marker, names = hostile
    Image.new("L", (20, 20), 99).save(folder / "good.png")
    lines = tmp_path / "train.image.tok"
    given: dict[str, Any] = {"root": str(tmp_path), "split": "train", "training": True, "seed": 0}
    given |= {"resize": 256, "crop": 16}

    def train(**changes: Any) -> int:
        data = ImageDataset(**given, **changes)
        batches = make_loader(data, batch_size=50, training=True, seed=0, epoch=0, num_workers=0)
        return sum(len(batch["images"]) for batch in batches)

    for name in names:
        lines.write_text(f"{name}\n")
        message = attempt(train, name)
        if names[name] != "mutated":
            assert message is not None, name
            assert name in message
    bad = [name for name, kind in names.items() if kind != "mutated"]
    for name in bad:
        lines.write_text("good.png\n" * 150 + f"{name}\n")
        found: list[int] = []
        assert attempt(lambda f=found: f.append(train(on_error="skip")), name) is None
        assert found == [150], name
    lines.write_text("good.png\n" * 150 + "long.jpg\n")
    with pytest.raises(DataError, match=r"tok:151: .*long\.jpg, resized to 256, has 256 x 16768"):
        train()
    assert not marker.exists()


def test_check_and_resize_list_bad_images(
    hostile: Hostile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, marker, names = hostile
    Image.new("L", (20, 20), 99).save(folder / "good.png")
    (tmp_path / "train.image.tok").write_text("".join(f"{name}\n" for name in names))
    for split in ("validate", "test"):
        (tmp_path / f"{split}.image.tok").write_text("good.png\n")
    config = tmp_path / "config.yml"
    config.write_text(CONFIG.format(root=tmp_path))
    assert check.main([str(config)]) == 1
    shown = capsys.readouterr().out
    assert "pipe.jpg is no file" in shown
    findings = check_data(load(config, ()))
    facts = findings.splits["train"].images
    assert facts is not None
    text = "\n".join([*findings.errors, *facts.unreadable])
    assert "6 missing images" in text
    assert [n for n, kind in names.items() if kind == "crafted" and n not in text] == []
    assert resize.main([str(folder), str(tmp_path / "small"), "--size", "32"]) == 1
    listed = (tmp_path / "small" / "unreadable.txt").read_text()
    other = {"long.jpg", "script.eps", "folder.jpg"}  # a valid image, another file, a folder
    expected = {name for name, kind in names.items() if kind != "mutated"} - other
    assert {name for name in expected if name not in listed} == set()
    assert "Traceback" not in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket"])
def test_special_files_as_line_files_and_tables_are_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train.image.tok", "table.csv"):
        if kind == "pipe":
            os.mkfifo(name)
        elif kind == "folder":
            os.mkdir(name)
        else:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(name)
    for read in (
        lambda: ImageDataset(root=str(tmp_path), split="train", training=True, seed=0),
        lambda: list(read_table(tmp_path / "table.csv", ["file"])),
    ):
        with pytest.raises(DataError, match=f"cannot be read: it is a .*{kind}, not a file"):
            read()
