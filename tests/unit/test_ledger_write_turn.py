"""Processes that write to one store: one at a time, the next at once, and who dies is not waited for."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.ledger.sqlite import SqliteLedger
from gateway.ledger.write_turn import WriteTurn

HOLDER = """
import sys
from pathlib import Path
from gateway.ledger.write_turn import WriteTurn
turn = WriteTurn(Path(sys.argv[1]))
turn.take()
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.turn"


@pytest.fixture
def mine(path: Path) -> Iterator[WriteTurn]:
    turn = WriteTurn(path)
    yield turn
    turn.close()


def test_another_waits_until_it_is_given(mine: WriteTurn, path: Path) -> None:
    other, order = WriteTurn(path), list[str]()

    def wait() -> None:
        other.take()
        order.append("other")
        other.give()

    mine.take()
    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(0.2)
    order.append("mine")
    mine.give()
    mine.give()
    thread.join(10)
    other.close()
    assert order == ["mine", "other"]


def test_a_process_that_dies_gives_its_turn(mine: WriteTurn, path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "taken\n"
        waiting = threading.Thread(target=mine.take)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        holder.kill()
        waiting.join(10)
        assert not waiting.is_alive()


async def test_a_transaction_that_failed_or_was_left_lets_the_next_one_write(tmp_path: Path) -> None:
    ledger = SqliteLedger.open(tmp_path)
    backend = ledger._backend
    one, other = backend.connect(read_only=False), backend.connect(read_only=False)
    try:
        one.begin()
        with pytest.raises(backend.failures):
            one.execute("INSERT INTO no_such_table VALUES (1)")
        one.rollback()
        other.begin()
        other.commit()
        with pytest.raises(backend.failures):
            other.commit()  # there is none
        one.begin()
        one.rollback()
    finally:
        one.close()
        other.close()
        await ledger.aclose()
