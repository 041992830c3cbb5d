from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tests.several_processes import environment, free_port
from vilmedic import command_line as cli
from vilmedic.cli import train
from vilmedic.config.load import Config
from vilmedic.errors import ConfigError, DataError
from vilmedic.training.trainor import Trainor

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "config/SELFSUP/convirt-mimic.yml"


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run(*words: str, action: object = None) -> int:
    return cli.command(list(words), "train.py", "Trains.", action or (lambda config: None))  # type: ignore[arg-type]


def test_arguments_are_parsed_into_options_and_overrides() -> None:
    line = cli.parse(["a.b=1", "c.yml", "~d", "--check", "e=-1"], "train.py")
    assert line == cli.CommandLine("c.yml", ("a.b=1", "~d", "e=-1"), "--check")
    assert cli.parse(["--print-config", "-h"], "train.py").option == "--help"
    asked = cli.parse(["c.yml", "--help", "trainor", "model.loss", "a=1"], "train.py")
    assert asked == cli.CommandLine("c.yml", ("a=1",), "--help", ("trainor", "model.loss"))
    assert cli.parse(["--help=trainor"], "train.py").topics == ("trainor",)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "no configuration file is given. Use: train.py config.yml"),
        (["a=1"], "no configuration file is given"),
        (
            ["c.yml", "--chek"],
            "--check, and keys as key=value. Did you mean '--check'",
        ),
        (["c.yml", "--a.b=1"], "keys are written without dashes: a.b=1"),
        (
            [CONFIG, "--epochs=3"],
            "'--epochs=3': keys are written without dashes: trainor.epochs=3.",
        ),
        ([CONFIG, "--epochs", "3"], "without dashes: trainor.epochs=3."),
        ([CONFIG, "--lr=1"], "without dashes: trainor.optim_params.lr=1."),
        (
            [CONFIG, "--batch-size"],
            "trainor.batch_size=... or validator.batch_size=... or ",
        ),
    ],
)
def test_unknown_arguments_are_refused(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cli.parse(words, "train.py")
    assert expected in str(caught.value)


def test_a_config_error_exits_with_status_2_and_no_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(CONFIG, "trainor.batchsize=3") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: trainor.batchsize (command line): unknown key, given 3. Did")
    assert run(CONFIG, "trainor.batchsize=3", "mode=x") == 2
    assert capsys.readouterr().err.startswith("2 problems:\n- trainor.batchsize")


def test_errors_during_the_run_are_printed_without_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def action(config: Config) -> None:
        raise DataError("train.image.tok:3: missing")

    assert run(CONFIG, action=action) == 2
    assert capsys.readouterr().err == "error: train.image.tok:3: missing\n"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_disk_errors_are_printed_without_traceback(
    capsys: pytest.CaptureFixture[str], code: int
) -> None:
    def act(config: Config) -> None:
        raise OSError(code, os.strerror(code), "ckpt/run/labels.json")

    assert run(CONFIG, action=act) == cli.FAILED
    assert capsys.readouterr().err == f"error: ckpt/run/labels.json: {os.strerror(code)}.\n"


def test_other_os_errors_are_raised() -> None:
    def act(config: Config) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    with pytest.raises(OSError, match="Bad file descriptor"):
        run(CONFIG, action=act)


def test_only_one_process_of_a_distributed_run_prints_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for name, value in environment(1, 2, port).items():
        monkeypatch.setenv(name, value)
    assert run("no.yml") == 2
    assert "no.yml" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert run("no.yml") == 2
    assert capsys.readouterr().err == ""
    del store


def test_a_training_that_cannot_start_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["config/phantom/simclr.yml", "dataset.root=nowhere", f"ckpt_dir={tmp_path / 'ckpt'}"]
    assert train(words) == cli.FAILED
    assert "there is no folder nowhere" in capsys.readouterr().err
    assert list((tmp_path / "ckpt").iterdir()) == []


@pytest.mark.parametrize("where", ["_prepare", "_begin"])
def test_ctrl_c_before_training_gives_one_line(
    where: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainor, "_prepare", lambda *_: None)
    monkeypatch.setattr(Trainor, where, stop)
    assert train(["config/phantom/simclr.yml", f"ckpt_dir={tmp_path / 'ckpt'}"]) == 130
    expected = "interrupted: before training began; the same command starts it\n"
    assert capsys.readouterr().err == expected


def test_a_valid_configuration_is_run() -> None:
    seen: list[Config] = []
    assert run(CONFIG, "name=x", action=seen.append) == 0
    assert seen[0].name == "x"


@pytest.mark.parametrize("option", ["--check", "--print-config", "--help"])
def test_an_option_prints_and_does_not_run(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Config] = []
    assert run(CONFIG, option, action=seen.append) == 0
    assert seen == []
    expected = {"--check": "ok: config/", "--print-config": "name: ", "--help": "usage: train.py "}
    assert capsys.readouterr().out.startswith(expected[option])


def test_help_needs_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "\n  dataset  " in capsys.readouterr().out
    assert run("--help", "trainor.epochs") == 0
    assert capsys.readouterr().out.startswith("  trainor.epochs: integer >= 0; default 99\n")
    assert run("--help", "model.loss") == 0
    assert "with model.proto=ConVIRT:\nmodel.loss: " in capsys.readouterr().out
    assert run("--help", "model.lost") == cli.FAILED
    assert "Did you mean 'model.loss'?" in capsys.readouterr().err
    assert run("--help", "model.nothing_like_it") == cli.FAILED
    assert "Give a configuration file as well" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["train.py", "ensemble.py"])
def test_config_errors_are_reported_before_torch_is_imported(script: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['bin/{script}', '{CONFIG}', 'trainor.batchsize=3']\n"
        "try:\n"
        f"    runpy.run_path('bin/{script}', run_name='__main__')\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'torchvision', 'numpy'} & set(sys.modules)\n"
        "    print(sorted(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == "[]\n"
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Did you mean 'trainor.batch_size'?" in done.stderr


def test_the_scripts_work_from_another_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bin/train.py"), str(ROOT / CONFIG), "--check"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("ok: ")
    assert " keys, 0 overrides, run " in done.stdout


def test_a_check_counts_one_override_in_the_singular(capsys: pytest.CaptureFixture[str]) -> None:
    assert train([str(ROOT / CONFIG), "name=x", "--check"]) == 0
    assert capsys.readouterr().out.endswith(" keys, 1 override, run 'x'\n")
