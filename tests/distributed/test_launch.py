from __future__ import annotations

import pytest
from torch.distributed import TCPStore

from tests.several_processes import environment, free_port
from vilmedic.distributed.launch import (
    first_to_fail,
    is_lost_connection,
    is_main_process,
    process_count,
)
from vilmedic.errors import ConfigError


def test_a_single_process_is_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert process_count() == 1
    assert is_main_process()
    assert first_to_fail()
    assert first_to_fail()


def test_only_the_first_of_several_processes_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for name, value in environment(1, 2, port).items():
        monkeypatch.setenv(name, value)
    assert not is_main_process()
    assert first_to_fail()
    assert not first_to_fail()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert first_to_fail()
    del store


def test_lost_connections_are_recognised() -> None:
    assert is_lost_connection(RuntimeError("[gloo/transport/tcp] Connection closed by peer"))
    assert not is_lost_connection(RuntimeError("shapes do not fit"))
    assert not is_lost_connection(ConfigError("gloo"))
