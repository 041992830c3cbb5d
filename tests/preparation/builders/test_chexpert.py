from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.preparation.archives import lines, write_csv
from vilmedic.preparation.builders.chexpert import CHEXPERT_LABELS, FIVE, PLUS, main, present_labels

# The column order of the release differs from MIMIC-CXR.
LABELS = ["No Finding", *[name for name in reversed(CHEXPERT_LABELS) if name != "No Finding"]]
HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS]


def row(patient: int, view: str = "frontal", split: str = "train", **labels: str) -> list[str]:
    given = {name.replace("_", " "): value for name, value in labels.items()}
    path = f"CheXpert-v1.0-small/{split}/patient{patient:05d}/study1/view1_{view}.jpg"
    values = [given.get(name, "") for name in LABELS]
    return [path, "Female", "68", view.capitalize(), "AP" if view == "frontal" else "", *values]


def training() -> list[list[str]]:
    rows = []
    for index, name in enumerate(FIVE):
        key = name.replace(" ", "_")
        for n in range(20):
            patient = 1000 * (index + 1) + n
            rows.append(row(patient, **{key: "1.0", "No_Finding": "", "Fracture": "0.0"}))
            rows.append(row(patient, "lateral", **{key: "1.0"}))
    for n in range(30):
        rows.append(row(9000 + n, Edema="1.0", Pneumonia="-1.0"))
        rows.append(row(9100 + n, Edema="-1.0"))
        rows.append(row(9200 + n, Fracture="1.0"))
    return rows


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    write_csv(folder / "train.csv", HEADER, training())
    valid = [row(n, split="valid", Edema="1.0") for n in range(64541, 64551)]
    write_csv(folder / "valid.csv", HEADER, valid)
    columns = [
        "path_to_image",
        "frontal_lateral",
        "section_findings",
        "section_impression",
        "split",
    ]
    reports = [
        [line[0].split("/", 1)[1], line[3], "", f"Report of {line[0].split('/')[2]}.", "train"]
        for line in training() + valid
    ]
    write_csv(folder / PLUS, columns, reports)
    return folder


def run(raw: Path, root: Path, *options: str, status: int = 0) -> Path:
    arguments = ["--tables", str(raw), "--root", str(root), "--validate", "20", *options]
    assert main(arguments) == status
    return root


def test_splits_without_reports(raw: Path, tmp_path: Path) -> None:
    root = run(raw, tmp_path / "out", "--keep-5x200")
    assert not list(root.glob("*.impression.tok"))
    frontal = [line[0].split("/", 1)[1] for line in training() if line[3] == "Frontal"]
    names = lines(root / "train.image.tok") + lines(root / "validate.image.tok")
    assert sorted(names) == sorted(frontal)
    assert len(lines(root / "validate.image.tok")) == 20
    assert len(lines(root / "test.image.tok")) == 10
    assert all(name.startswith("valid/patient645") for name in lines(root / "test.image.tok"))
    labels = Counter(lines(root / "train.label.tok") + lines(root / "validate.label.tok"))
    assert labels["Edema"] == 50
    assert labels["No Finding"] == 30  # uncertain edema counts as absent
    train = set(lines(root / "train.patient.tok"))
    assert not train & set(lines(root / "validate.patient.tok"))


def test_the_five_by_200_set_is_as_published(raw: Path, tmp_path: Path) -> None:
    root = run(raw, tmp_path / "five", "--five-by-200", "--each", "15")
    labels = lines(root / "test.label.tok")
    assert Counter(labels) == dict.fromkeys(FIVE, 15)
    by_path = {line[0].split("/", 1)[1]: line for line in training()}
    for name, label in zip(lines(root / "test.image.tok"), labels, strict=True):
        line = by_path[name]
        assert line[3] == "Frontal"
        stated = {n: v for n, v in zip(LABELS, line[5:], strict=True) if v not in ("", "0.0")}
        assert stated == {label: "1.0"}
    other = run(raw, tmp_path / "seed", "--five-by-200", "--each", "15", "--draw-seed", "1")
    assert lines(other / "test.image.tok") != lines(root / "test.image.tok")
    rest = run(raw, tmp_path / "rest", "--each", "15")
    used = set(lines(rest / "train.patient.tok")) | set(lines(rest / "validate.patient.tok"))
    assert not used & set(lines(root / "test.patient.tok"))
    card = json.loads((rest / "data_card.json").read_text())
    assert card["dropped"]["images of patients in the 5 x 200 set"] == 75


def test_reports_of_chexpert_plus(raw: Path, tmp_path: Path) -> None:
    root = run(raw, tmp_path / "out", "--reports", str(raw / PLUS), "--each", "15")
    for split in ("train", "validate", "test"):
        reports = lines(root / f"{split}.impression.tok")
        patients = lines(root / f"{split}.patient.tok")
        assert reports == [f"Report of {patient}." for patient in patients]
    five = run(raw, tmp_path / "five", "--reports", str(raw), "--five-by-200", "--each", "15")
    assert len(lines(five / "test.impression.tok")) == 75


def test_patients_of_the_five_by_200_set_are_not_in_training(raw: Path, tmp_path: Path) -> None:
    some = lines(raw / PLUS)[::3]  # every third image has a report
    (raw / PLUS).write_text("\n".join([lines(raw / PLUS)[0], *some[1:]]) + "\n")
    names = [line[0].split("/", 1)[1] for line in training()]
    for name in names[20:] + [
        row(n, split="valid")[0].split("/", 1)[1] for n in range(64541, 64551)
    ]:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"")
    shared = ["--each", "8", "--images", str(tmp_path / "images")]
    five = run(raw, tmp_path / "five", "--five-by-200", *shared)
    assert not set(lines(five / "test.image.tok")) & set(names[:20])
    taken = set(lines(five / "test.patient.tok"))
    reports = ["--reports", str(raw / PLUS)]
    for number, options in enumerate((["--seed", "1"], reports, ["--view", "all", *reports])):
        root = run(raw, tmp_path / f"rest{number}", *shared, *options)
        used = set(lines(root / "train.patient.tok")) | set(lines(root / "validate.patient.tok"))
        assert used
        assert not used & taken
    told = run(raw, tmp_path / "told", "--five-by-200", *shared, *reports)
    assert set(lines(told / "test.image.tok")) < set(lines(five / "test.image.tok"))
    missing = json.loads((told / "data_card.json").read_text())["dropped"]
    assert missing == {"images without a report": 40 - len(lines(told / "test.impression.tok"))}


def test_too_few_images_of_a_finding_is_an_error(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(raw, tmp_path / "out", "--five-by-200", status=2)
    assert "Only 20 training images have Atelectasis alone; needed: 200" in capsys.readouterr().err


def test_views(raw: Path, tmp_path: Path) -> None:
    root = run(raw, tmp_path / "out", "--view", "all", "--keep-5x200")
    names = lines(root / "train.image.tok") + lines(root / "validate.image.tok")
    assert len(names) == len(training())


@pytest.mark.parametrize("mark", ["NA", "nan", "None", " "])
@pytest.mark.parametrize("options", [["--five-by-200", "--each", "20"], ["--each", "20"]])
def test_missing_value_markers_are_read_as_blanks(
    raw: Path, tmp_path: Path, mark: str, options: list[str]
) -> None:
    """As written by programs that read and rewrite blank cells."""
    wanted = run(raw, tmp_path / "blank", *options)
    for name in ("train.csv", "valid.csv"):
        header, *rows = [line.split(",") for line in lines(raw / name)]
        write_csv(raw / name, header, [[cell or mark for cell in row] for row in rows])
    root = run(raw, tmp_path / "marked", *options)
    for path in sorted(wanted.glob("*.tok")):
        assert (root / path.name).read_bytes() == path.read_bytes()
    card = json.loads((root / "data_card.json").read_text())
    blank = sum(row[HEADER.index("Pneumonia")] == "" for row in training())
    assert card["missing"]["Pneumonia"] == blank + (0 if "--five-by-200" in options else 10)
    assert "AP/PA" not in card["missing"]  # a column that is not read


def test_an_invalid_label_is_reported_with_its_line(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = training()
    rows[6][HEADER.index("Edema")] = "yes"
    write_csv(raw / "train.csv", HEADER, rows)
    for options in (["--five-by-200", "--each", "20"], ["--each", "20"]):
        run(raw, tmp_path / "out", *options, status=2)
        shown = capsys.readouterr().err
        assert f"{raw / 'train.csv'}:8: Edema: 'yes' is no label value" in shown
    rows[6][0] = "unknown.jpg"
    write_csv(raw / "train.csv", HEADER, rows)
    run(raw, tmp_path / "out", status=2)
    assert f"{raw / 'train.csv'}:8: the path 'unknown.jpg' names no patient" in (
        capsys.readouterr().err
    )


def test_left_out_images_are_listed(raw: Path, tmp_path: Path) -> None:
    root = run(raw, tmp_path / "out", "--each", "20", "--uncertain", "drop")
    dropped = json.loads((root / "data_card.json").read_text())["dropped"]
    table = [line.split("\t") for line in lines(root / "left_out.tsv")[1:]]
    assert Counter(reason for _, reason, _ in table) == dropped
    row = ["train/patient09000/study1/view1_frontal.jpg", "images with uncertain labels"]
    assert [*row, "train.csv:202"] in table


def test_rows_without_a_path_are_left_out_by_line(raw: Path, tmp_path: Path) -> None:
    rows = training()
    rows[4][0], rows[-1][0] = "NA", ""
    write_csv(raw / "train.csv", HEADER, rows)
    header, *reports = [line.split(",") for line in lines(raw / PLUS)]
    reports[9][0] = "nan"
    write_csv(raw / PLUS, header, reports)
    root = run(raw, tmp_path / "out", "--keep-5x200", "--reports", str(raw / PLUS))
    table = [line.split("\t") for line in lines(root / "left_out.tsv")[1:]]
    named = [where for _, reason, where in table if reason == "rows without the path of an image"]
    assert set(named) == {f"{PLUS}:11", "train.csv:6", f"train.csv:{len(rows) + 1}"}
    assert len(named) == 3
    written = sum(len(lines(path)) for path in root.glob("*.image.tok"))
    assert written + len(table) == len(rows) + 10 + 1  # plus one row of the reports


NAMES = ("Atelectasis", "Cardiomegaly", "No Finding")


@pytest.mark.parametrize(
    ("uncertain", "labels"),
    [
        ("negative", ("No Finding",)),
        ("positive", ("Atelectasis", "Cardiomegaly")),
        ("mixed", ("Atelectasis",)),
        ("drop", None),
    ],
)
def test_uncertain_labels(uncertain: str, labels: tuple[str, ...] | None) -> None:
    assert present_labels(["-1.0", "-1", ""], NAMES, uncertain) == labels


def test_unknown_labels_are_written_as_such() -> None:
    marked = ("?Atelectasis", "?Fracture", "?No Finding")
    names = ("Atelectasis", "Fracture", "No Finding")
    assert present_labels(["-1.0", "-1", ""], names, "unknown") == marked
    assert present_labels(["1.0", "-1", ""], names, "unknown") == ("Atelectasis", "?Fracture")


def test_certain_labels_do_not_depend_on_the_policy() -> None:
    for uncertain in ("negative", "positive", "mixed", "unknown", "drop"):
        assert present_labels(["1.0", "0.0", ""], NAMES, uncertain) == ("Atelectasis",)
        assert present_labels(["", "0", "1"], NAMES, uncertain) == ("No Finding",)
        assert present_labels(["", "", ""], NAMES, uncertain) == ("No Finding",)


@pytest.mark.parametrize("value", ["2.0", "yes", "nan", "0.5"])
def test_other_values_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"'{value}' is no label value"):
        present_labels([value, "", ""], NAMES, "negative")


def test_the_fourteen_labels() -> None:
    assert len(set(CHEXPERT_LABELS)) == 14
    assert list(CHEXPERT_LABELS) == sorted(CHEXPERT_LABELS)
