from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from data import check
from tests.datasets.dicom_files import make_dicom, table
from vilmedic.config.load import load
from vilmedic.phantom.case import draw_case
from vilmedic.phantom.render import render
from vilmedic.preparation.check_page import _duplicates, _lengths, data_title, draw_page
from vilmedic.preparation.checking import Findings, SplitFacts, check_data

SIMCLR = Path(__file__).parents[2] / "config" / "phantom" / "simclr.yml"
Check = Callable[..., Findings]
REPORTS = [
    "Small left pleural effusion in the lower zone of the left lung today.",
    "The heart is enlarged and the lungs are clear on both sides now.",
    "No pneumothorax, no effusion and no consolidation can be seen here.",
    "Right upper lobe pneumonia with consolidation that was not there before.",
    "Normal chest without any finding that would need to be followed up.",
]
CONFIG = """
dataset:
  proto: ImSeqLabel
  image: {{root: {root}, resize: 16, crop: 16}}
  seq: {{root: {root}, tokenizer_max_len: 20}}
  label: {{root: {root}}}
model:
  proto: ConVIRT
  encoder: {{proto: null}}
  cnn: {{proto: CNN, backbone: resnet18, output_layer: avgpool, pretrained: False}}
  projection: {{visual_embedding_dim: 512, textual_embedding_dim: 128, projection_dim: 128}}
  loss: {{proto: ConVIRTLoss}}
ckpt_dir: {root}/ckpt
name: checked
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A valid data set with five training, three validation and three test lines."""
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, size in (("train", 5), ("validate", 3), ("test", 3)):
        names = [f"{split}_{number}.png" for number in range(size)]
        for number, name in enumerate(names):
            pixels = random.integers(0, 256, (20 + number, 30), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name)
        rows = {
            "image": names,
            "report": [f"{report} Again" for report in REPORTS[:size]],
            "label": ["Effusion", "Cardiomegaly", "No Finding", "Pneumonia", "No Finding"][:size],
            "patient": [f"{split}{number // 2}" for number in range(size)],
        }
        for kind, lines in rows.items():
            (folder / f"{split}.{kind}.tok").write_text("\n".join(lines) + "\n")
    (folder / "config.yml").write_text(CONFIG.format(root=folder))
    return folder


@pytest.fixture
def checked(root: Path) -> Check:
    def run(*overrides: str, most: int | None = None) -> Findings:
        return check_data(load(root / "config.yml", overrides), most=most, workers=2)

    return run


def change(path: Path, line: int, text: str) -> None:
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")


def test_valid_data_have_no_findings(checked: Check) -> None:
    findings = checked()
    assert findings.errors == []
    assert findings.warnings == []
    assert list(findings.splits) == ["train", "validate", "test"]
    train = findings.splits["train"]
    assert train.lines == {"image": 5, "seq": 5, "label": 5}
    assert train.images is not None
    assert train.images.sizes == [(20 + number, 30) for number in range(5)]
    assert dict(train.images.modes) == {"PNG L": 5}
    assert train.labels["No Finding"] == 2
    assert set(train.patients or []) == {"train0", "train1", "train2"}
    assert train.lengths is not None
    words = [len(re.findall(r"\w+|[^\w\s]", f"{report} Again")) for report in REPORTS]
    assert train.lengths.tolist() == [
        count + 2 for count in words
    ]  # plus a special token at each end
    assert checked(most=2).splits["train"].images.looked_at == 2  # type: ignore[union-attr]


def test_every_fault_is_found_at_once(checked: Check, root: Path) -> None:
    images = root / "images"
    (images / "train_0.png").unlink()
    (images / "train_1.png").write_bytes((images / "train_1.png").read_bytes()[:60])
    change(root / "validate.report.tok", 2, "")
    change(root / "test.image.tok", 1, "validate_0.png")
    change(root / "test.patient.tok", 3, "train1")
    label = root / "test.label.tok"
    label.write_text("\n".join(label.read_text().splitlines()[:2]) + "\n")
    findings = checked()
    errors = findings.errors
    assert findings.splits["validate"].empty == 1
    assert findings.splits["validate"].reports is not None
    for expected in (
        "train: 1 missing image: ",
        "train.image.tok:1: ",
        "train: 1 unreadable image: ",
        "train.image.tok:2: ",
        "validate: 1 empty line: ",
        "validate.report.tok:2",
        "test: The files have different numbers of lines: ",
        "train and test: 1 patient: train1 in both.",
        "validate and test: 1 image: ",
    ):
        assert any(expected in error for error in errors), expected
    assert len(errors) == 6


def test_skipped_images_are_warnings_while_they_are_few(checked: Check, root: Path) -> None:
    for kind in ("image", "report", "label", "patient"):
        path = root / f"train.{kind}.tok"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines, *[lines[0]] * 200]) + "\n")
    change(root / "train.image.tok", 5, "gone.png")
    findings = checked("dataset.image.on_error=skip")
    assert findings.errors == []
    assert any("1 missing image" in text for text in findings.warnings)
    assert any("200 images: " in text for text in findings.advice)
    assert any("of the reports nearly repeat another" in text for text in findings.advice)
    assert len(findings.named["train: 200 images on more than one line"]) == 200
    assert any("missing image" in error for error in checked().errors)


def test_warnings(checked: Check, root: Path) -> None:
    Image.new("L", (30, 30), 9).save(root / "images" / "train_2.png")
    change(root / "test.label.tok", 2, "Hernia")
    change(root / "train.report.tok", 1, "word " * 40)
    findings = checked()
    warnings = findings.warnings
    assert any("train: 1 blank image: " in text for text in warnings)
    assert any("test: 1 label: Hernia not in train" in text for text in findings.advice)
    assert any("20.0% of the reports are longer than tokenizer_max_len=20" in t for t in warnings)
    assert any(
        text.endswith("are cut: 1 line: " + f"{root}/train.report.tok:1.") for text in warnings
    )


def test_letters_dropped_by_cleaning_are_reported(checked: Check, root: Path) -> None:
    for line in range(1, 6):
        text = f"Neumotórax pequeño número {line} en el pulmón."
        change(root / "train.report.tok", line, text)
    for split in ("validate", "test"):
        for line in range(1, 4):
            change(root / f"{split}.report.tok", line, "Neumotórax pequeño en el pulmón.")
    findings = checked("dataset.seq.processing=gloria_clean_report_chexpert")
    assert len(findings.warnings) == 3
    assert (
        "train: processing=gloria_clean_report_chexpert drops 20 letters that it never keeps, most "
        "often ó (10), ñ (5), ú (5);" in findings.warnings[0]
    )
    train = findings.splits["train"].lost
    assert train is not None
    assert train.share == pytest.approx(20 / 165)  # 4 of 33 in each report
    assert checked("dataset.seq.processing=multilingual_clean_report").warnings == []


def test_unknown_words(checked: Check, root: Path) -> None:
    change(root / "validate.report.tok", 2, "Widened mediastinum, unfolded aorta.")
    findings = checked()
    [warning] = findings.warnings
    # 4 of the 30 validation words: 13 + 4 + 13 in the three reports
    assert warning.startswith("validate: 13.3% of the words are unknown to the tokenizer")
    assert "aorta (1)" in warning
    assert warning.endswith("validate.report.tok:2.")


def test_misencoded_reports_are_reported(checked: Check, root: Path) -> None:
    change(root / "train.report.tok", 1, "NeumotÃ³rax in the left lung as on the first film.")
    change(root / "train.report.tok", 2, "Heart \x1b[31mis enlarged and both lungs are clear.")
    change(root / "train.report.tok", 3, "Fever of 37\ufffd and no consolidation, no effusion.")
    misread, control = checked().warnings[:2]
    assert "train: 2 misread reports: " in misread
    assert "train.report.tok:3, with signs of a wrong character set" in misread
    assert "train.report.tok:2, with control characters." in control


def test_patients_are_read_from_mimic_paths(checked: Check, root: Path) -> None:
    for split in ("train", "validate", "test"):
        (root / f"{split}.patient.tok").unlink()
    assert checked().splits["train"].patients is None
    for split, size in (("train", 5), ("validate", 3), ("test", 3)):
        names = []
        for number in range(size):
            folder = f"p10/p1000003{number}/s5{number}"
            (root / "images" / folder).mkdir(parents=True, exist_ok=True)
            name = f"{split}_{number}.png"
            (root / "images" / name).rename(root / "images" / folder / name)
            names.append(f"{folder}/{name}")
        (root / f"{split}.image.tok").write_text("\n".join(names) + "\n")
    errors = checked().errors
    assert len(errors) == 3
    assert any("train and validate: 3 patients: p10000030, p1000003" in e for e in errors)


def test_reports_emptied_by_cleaning_are_reported(checked: Check, root: Path) -> None:
    change(root / "train.report.tok", 3, "___")
    cleaned = "dataset.seq.processing=r2gen_clean_report"
    findings = checked(cleaned)
    assert any("train: 1 report: " in error for error in findings.errors)
    assert checked().errors == []


def test_invalid_labels_are_reported(checked: Check, root: Path) -> None:
    change(root / "validate.label.tok", 2, "Effusion,Pneumonia")
    assert checked().errors == []
    [error] = checked("dataset.label.multi_label=false").errors
    assert re.search(r"validate: .*validate\.label\.tok:2 has 2 labels", error)
    change(root / "validate.label.tok", 2, "Effusion,,Pneumonia")
    [error] = checked().errors
    assert "validate.label.tok:2 has an empty label between commas" in error


def test_too_large_crops_are_reported(checked: Check) -> None:
    errors = checked("dataset.image.resize=16", "dataset.image.crop=20").errors
    assert [error.split(":")[0] for error in errors] == ["train", "validate", "test"]
    assert all("too small for crop=20; lower crop or set resize" in error for error in errors)
    errors = checked("dataset.image.preset=convirt", "dataset.image.crop=null").errors
    assert any("train: The preset convirt crops" in error for error in errors)


def test_images_without_reports_and_labels(root: Path) -> None:
    given = ("dataset.resize=16", "dataset.crop=16", f"dataset.root={root}")
    findings = check_data(load(SIMCLR, given))
    assert findings.errors == []
    assert findings.splits["train"].reports is None
    assert findings.splits["train"].lines == {"image": 5}


def test_figures_are_titled_by_their_data() -> None:
    findings = Findings(splits={"train": SplitFacts(lines={"image": 1200, "seq": 1200})})
    dataset = {"proto": "ImSeq", "image": {"root": "data/a"}, "seq": {"root": "data/a"}}
    assert data_title(dataset, findings) == "data/a: train 1,200 samples"


@pytest.mark.parametrize("longest", [20, 64])
def test_plot_labels_fit_into_their_axes(longest: int) -> None:
    facts = SplitFacts(lengths=np.arange(10, 66), max_len=longest)
    facts.reports = (np.zeros(9, np.int64), np.zeros(9, np.int64))  # all are repeated: 100%
    figure = Figure()
    canvas = FigureCanvasAgg(figure)
    for axis, draw in zip(figure.subplots(1, 2), (_lengths, _duplicates), strict=True):
        assert draw(axis, {"train": facts})
        canvas.draw()
        frame = axis.get_window_extent()
        for text in axis.texts:
            box = text.get_window_extent()
            assert frame.x0 <= box.x0
            assert box.x1 <= frame.x1
            assert box.y1 <= frame.y1


@pytest.mark.parametrize("parts", [("image", "seq"), ("image", "seq", "label")])
def test_the_page_says_what_the_data_set_does_not_read(
    parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    monkeypatch.setattr(Axes, "text", lambda axes, x, y, text, **kwargs: texts.append(text))
    draw_page(Findings(parts, {"train": SplitFacts()}), tmp_path / "page.png", "title")
    unread = "none" if "label" in parts else "this data set reads no labels"
    assert texts == ["none", "none", "none", "none", unread, "none"]


def test_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(root / "config.yml")
    assert check.main([config]) == 0
    shown = capsys.readouterr().out
    assert "0 errors, 0 warnings" in shown
    rows = {line.split("  ")[0].strip(): line.split() for line in shown.splitlines()}
    assert rows["images"][-3:] == ["5", "3", "3"]
    assert rows["label Effusion"][-2:] == ["1", "(33.3%)"]
    folder = root / "ckpt" / "checked"
    assert min(Image.open(folder / "data_check.png").size) > 600
    values = json.loads((folder / "data_check.json").read_text())
    assert values["splits"]["train"]["labels"]["No Finding"] == 2

    (root / "images" / "test_1.png").unlink()
    assert check.main([config, "--out", str(tmp_path / "out")]) == 1
    assert "error: test: 1 missing image" in capsys.readouterr().out
    assert (tmp_path / "out" / "data_check.json").is_file()

    for path in (root / "images").glob("*_*.png"):
        Image.new("L", (30, 30), 9).save(path)
    change(root / "train.label.tok", 1, "\x1b[2JEffusion")
    assert check.main([config, "--out", str(tmp_path / "out"), "dataset.image.on_error=skip"]) == 1
    shown = capsys.readouterr().out
    assert "label \\x1b[2JEffusion" in shown
    assert "\x1b" not in shown

    assert check.main([config, "dataset.image.croop=3"]) == 2
    assert "dataset.image.croop" in capsys.readouterr().err


def test_warnings_set_the_exit_status_and_advice_does_not(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(root / "config.yml"), "--out", str(tmp_path / "out")]
    change(root / "test.label.tok", 2, "Hernia")
    assert check.main(command) == 0
    assert "advice: test: 1 label: Hernia not in train." in capsys.readouterr().out
    assert check.main([*command, "--images", "2"]) == 0
    assert "advice: train: 2 of 5 images were decoded" in capsys.readouterr().out
    for kind in ("image", "report", "label", "patient"):
        path = root / f"train.{kind}.tok"
        path.write_text(path.read_text() * 2)
    names = [f"train_{number}.png" for number in range(10)]
    for name in names:
        Image.new("L", (30, 30), 9).save(root / "images" / name)
    (root / "train.image.tok").write_text("\n".join(names) + "\n")
    assert check.main(command) == 1
    shown = capsys.readouterr().out
    assert "warning: train: 10 blank images: " in shown
    assert re.search(r"^0 errors, 1 warning; see ", shown, re.MULTILINE)
    assert "train_4.png and 5 more, all pixels of one value." in shown
    lists = tmp_path / "out" / "data_check.txt"
    assert f"Lists of more than 5 in full: {lists}" in shown
    heading = lists.read_text().splitlines().index("train: 10 blank images")
    listed = lists.read_text().splitlines()[heading + 1 : heading + 11]
    assert [line.rpartition("/")[-1] for line in listed] == names


def test_an_image_with_two_names_in_two_splits_is_an_error(checked: Check, root: Path) -> None:
    """Compared by content, also if a file was converted to another format."""
    images = root / "images"
    (images / "test_0.png").write_bytes((images / "train_3.png").read_bytes())
    with Image.open(images / "validate_1.png") as image:
        image.save(images / "test_1.bmp")
    change(root / "test.image.tok", 2, "test_1.bmp")
    errors = checked().errors
    assert errors == [
        f"train and test: 1 image: {images / 'train_3.png'} = {images / 'test_0.png'} in both, "
        "under names of their own.",
        f"validate and test: 1 image: {images / 'validate_1.png'} = {images / 'test_1.bmp'} in "
        "both, under names of their own.",
    ]
    Image.new("L", (30, 30), 9).save(images / "train_0.png")  # two blank images are not a leak
    Image.new("L", (30, 30), 9).save(images / "test_2.png")
    assert len(checked().errors) == 2


def test_a_patient_id_in_two_formats_is_recognised(checked: Check, root: Path) -> None:
    change(root / "train.patient.tok", 1, "12")
    change(root / "test.patient.tok", 2, "12.0")
    change(root / "validate.patient.tok", 2, "1.2")
    assert checked().errors == ["train and test: 1 patient: 12 (also 12.0) in both."]


def phantoms(root: Path, count: int) -> None:
    """Use radiographs instead of noise on `count` training lines."""
    names = [f"x{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        pixels = render(draw_case(0, "train", number), 64).pixels
        Image.fromarray(pixels).save(root / "images" / name)
    (root / "train.image.tok").write_text("".join(f"{name}\n" for name in names))
    for kind in ("report", "label"):
        lines = (root / f"train.{kind}.tok").read_text().splitlines()
        texts = [f"{lines[number % len(lines)]} {number}" for number in range(count)]
        (root / f"train.{kind}.tok").write_text("".join(f"{text}\n" for text in texts))
    patients = "".join(f"train{number}\n" for number in range(count))
    (root / "train.patient.tok").write_text(patients)


def test_implausible_images_are_reported(checked: Check, root: Path) -> None:
    phantoms(root, 24)
    images = root / "images"
    assert not any("image" in text for text in checked().warnings)

    def changed(number: int, change: Callable[[np.ndarray], object]) -> None:
        pixels = np.array(Image.open(images / f"x{number}.png"))
        Image.fromarray(np.asarray(change(pixels), np.uint8)).save(images / f"x{number}.png")

    changed(1, lambda pixels: pixels // 20)
    changed(2, lambda pixels: 255 - pixels // 20)
    changed(3, lambda pixels: 255 - pixels)
    changed(4, lambda pixels: np.concatenate([pixels[:40], np.full((24, 64), 128)]))
    changed(5, lambda pixels: np.where(np.arange(4096).reshape(64, 64) == 99, 255, pixels // 20))
    make_dicom(images / "x6.dcm", np.arange(4096, dtype=np.uint16).reshape(64, 64))
    lut = table(list(range(4096)), 0, 16)
    make_dicom(
        images / "x6.dcm", np.arange(4096, dtype=np.uint16).reshape(64, 64), VOILUTSequence=[lut]
    )
    change(root / "train.image.tok", 7, "x6.dcm")
    findings = checked()
    for number, expected in (
        (1, "near-black"),
        (2, "near-white"),
        (3, "a negative of what most images look like"),
        (4, "torn or empty rows"),
        (5, "flattened by single pixels"),
        (6, "its VOI table states 16 bits and holds 12"),
    ):
        told = findings.advice if number == 6 else findings.warnings
        [warning] = [text for text in told if expected in text]
        assert re.search(rf"train: 1 .*train\.image\.tok:{number + 1}: \S+x{number}\.", warning)


def test_damaged_jpeg_is_an_error(checked: Check, root: Path) -> None:
    pixels = render(draw_case(0, "train", 0), 256).pixels
    Image.fromarray(pixels).save(root / "images" / "a.jpg", quality=95)
    content = (root / "images" / "a.jpg").read_bytes()
    middle = len(content) // 2
    damaged = content[:middle] + bytes(300) + content[middle + 300 :]
    (root / "images" / "a.jpg").write_bytes(damaged)
    change(root / "train.image.tok", 2, "a.jpg")
    [error] = checked().errors
    assert re.search(r"train: 1 unreadable image: \S+tok:2: \S+a\.jpg cannot be decoded", error)


def test_the_sample_figure_shows_reports(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(root / "config.yml")
    assert check.main([config, "--out", str(tmp_path)]) == 0
    assert f"Images with their reports: {tmp_path / 'data_samples.png'}" in capsys.readouterr().out
    with Image.open(tmp_path / "data_samples.png") as page:
        assert min(page.size) > 600
    facts = check_data(load(config, ())).splits["train"]
    assert facts.images is not None
    assert [sample.line for sample in facts.images.samples] == [0, 1, 2, 3, 4]
    first = np.asarray(Image.open(root / "images" / "train_0.png"))
    assert np.array_equal(facts.images.samples[0].pixels, first)
    assert facts.texts[0].startswith("Small left pleural effusion")


def test_missing_glyphs_give_no_warnings(root: Path, tmp_path: Path) -> None:
    for split in ("train", "validate", "test"):
        for name, text in (("report", "两肺纹理清晰 ქართული $x_"), ("label", "肺炎")):
            path = root / f"{split}.{name}.tok"
            path.write_text(f"{text}\n" * len(path.read_text().splitlines()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check.main([str(root / "config.yml"), "--out", str(tmp_path)])
    for name in ("data_check.png", "data_samples.png"):
        assert min(Image.open(tmp_path / name).size) > 600
