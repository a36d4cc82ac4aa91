"""`verbatim sessions`: what a ledger shows to who looks into it."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import numpy as np
import pytest

from gateway.cli import main
from gateway.contracts.examples import example_turn
from gateway.contracts.generation import Finish, FinishReason
from gateway.contracts.records import (
    SessionOrigin,
    SessionRecord,
)
from gateway.contracts.versions import VersionSpan
from gateway.ledger.sqlite import SqliteLedger


@pytest.fixture
async def data(tmp_path: Path) -> Path:
    """A ledger with one finished session of one turn: three prompt tokens, two sampled under policies 4 and 5."""
    ledger = SqliteLedger.open(tmp_path)
    await ledger.create_session(
        SessionRecord("s/1", None, None, None, {"run": "a"}, {}, {}, None, "", SessionOrigin.CREATED, True, time.time())
    )
    turn = example_turn(
        session_id="s/1",
        turn_id="turn-1",
        added_messages=({"role": "user", "content": "hello"},),
        reply={"role": "assistant", "content": "a line\nand another"},
        prompt_token_ids=np.array([1, 2, 3], dtype=np.int32),
        output_token_ids=np.array([4, 5], dtype=np.int32),
        output_logprobs=np.array([-0.5, -0.25], dtype=np.float32),
        version_spans=(VersionSpan(0, 1, 4), VersionSpan(1, 2, 5)),
        finish=Finish(FinishReason.STOP, 5),
        engine_id="engine-0",
        meta={"certified_by": "full_render"},
        created_at=time.time(),
    )
    await ledger.append_turn(turn, None)
    await ledger.finish("s/1", reward=0.5, outcome="completed", metadata={}, finished_at=time.time())
    await ledger.aclose()
    return tmp_path


async def test_sessions_are_listed_with_their_totals(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await asyncio.to_thread(main, ["sessions", "--data", str(data), "--json"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row == {
        "session": "s/1",
        "group": None,
        "complete": True,
        "turns": 1,
        "segments": 1,
        "sampled_tokens": 2,
        "trained_tokens": 0,
        "left_out": {"undelivered": 2},
        "policy_versions": [4, 5],
        "outcome": "completed",
        "reward": 0.5,
    }


async def test_a_session_shows_its_turns_on_one_line_each(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await asyncio.to_thread(main, ["sessions", "s/1", "--data", str(data)]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "turn"
    assert "full_render" in line
    assert r"a line\nand another" in line


async def test_an_unknown_session_is_one_line_and_exit_code_1(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await asyncio.to_thread(main, ["sessions", "nobody", "--data", str(data)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no session 'nobody'" in line


def test_a_missing_data_folder_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sessions", "--data", str(tmp_path / "nowhere")]) == 2
    assert "no such data folder" in capsys.readouterr().err
