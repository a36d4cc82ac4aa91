"""The proof of I1, I2 and I3 for one session, from three witnesses: HTTP, the ledger's SQLite file, the engine's notes.

The SQLite file is read by `sqlite3` and `numpy` alone and the engine's notes are what `gateway_with_script.py` wrote,
so that no code of the gateway vouches for itself. Log-probs and routing rows of the scripted engine are functions of
token and position, so that a row at a wrong place shows.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import numpy.typing as npt

from engines.scripted import scripted_experts, scripted_logprobs
from gateway.contracts.experts import RoutingShape

ROUTING = RoutingShape(num_layers=4, num_experts=8, top_k=2)
"""Of the checkpoint that all suites share (`tests/conftest.py`)."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredTurn:
    """One row of the ledger's table of turns: int32 ids added and sampled, float32 log-probs, and its facts."""

    turn_id: str
    prompt_token_ids: npt.NDArray[np.int32]
    output_token_ids: npt.NDArray[np.int32]
    output_logprobs: npt.NDArray[np.float32]
    facts: dict[str, Any]
    delivered_at: float | None

    @property
    def parent_id(self) -> str | None:
        """The turn whose tokens this one extends."""
        parent = self.facts["attachment"]["parent_id"]
        return None if parent is None else str(parent)


@dataclass(frozen=True, slots=True, eq=False)
class Witnesses:
    """Where a gateway's record can be looked at; `key` opens what operators may see."""

    url: str
    data: Path
    requests: Path
    key: str

    def get(self, path: str) -> Any:
        """JSON of the gateway's own endpoints."""
        reply = httpx.get(self.url + path, headers={"Authorization": f"Bearer {self.key}"}, timeout=30)
        reply.raise_for_status()
        return reply.json()

    def post(self, path: str, body: Any) -> Any:
        """As `get`, with a body."""
        headers = {"Authorization": f"Bearer {self.key}"}
        reply = httpx.post(self.url + path, json=body, headers=headers, timeout=30)
        reply.raise_for_status()
        return reply.json()

    def session(self, session_id: str, part: str) -> list[dict[str, Any]]:
        """`turns` or `segments` of a session, with arrays."""
        return list(self.get(f"/sessions/{quote(session_id, safe='')}/{part}?arrays=1")[part])

    def engine_requests(self, session_id: str) -> list[dict[str, Any]]:
        """What the engine was asked for a session, in the order in which it was done with them."""
        lines = self.requests.read_text().splitlines() if self.requests.exists() else []
        return [note for note in map(json.loads, lines) if note["session_id"] == session_id]

    def stored_turns(self, session_id: str) -> list[StoredTurn]:
        """Turns of a session as they lie in the file."""
        columns = "turn_id, prompt_token_ids, output_token_ids, output_logprobs, facts, delivered_at"
        query = f"SELECT {columns} FROM turns WHERE session_id = ? ORDER BY turn_index"
        connection = sqlite3.connect(f"file:{self.data / 'ledger.sqlite'}?mode=ro", uri=True)
        try:
            rows = connection.execute(query, (session_id,)).fetchall()
        finally:
            connection.close()
        return [
            StoredTurn(
                turn_id,
                np.frombuffer(prompt, "<i4"),
                np.frombuffer(output, "<i4"),
                np.frombuffer(logprobs, "<f4"),
                json.loads(facts),
                delivered_at,
            )
            for turn_id, prompt, output, logprobs, facts, delivered_at in rows
        ]


def prove(
    witnesses: Witnesses, session_id: str, *, num_turns: int, num_segments: int = 1, num_fruitless_requests: int = 0
) -> list[dict[str, Any]]:
    """Assert I1, I2 and I3 for a session whose turns all reached their client, each in one engine request.

    num_fruitless_requests: engine requests that broke before their first token, and of which nothing is recorded.
    Returns the turns as HTTP tells them, for what a test wants to know beyond that.
    """
    stored = witnesses.stored_turns(session_id)
    told = witnesses.session(session_id, "turns")
    assert len(stored) == num_turns
    check_http_tells_what_is_stored(stored, told)
    requests = witnesses.engine_requests(session_id)
    fruitful = [request for request in requests if request["token_ids"]]
    assert len(requests) - len(fruitful) == num_fruitless_requests
    check_engine_was_sent_the_record(stored, fruitful)
    segments = witnesses.session(session_id, "segments")
    check_segments_are_the_recorded_paths(stored, segments)
    check_each_sampled_token_trains_once(stored, segments)
    assert len(segments) == num_segments, [turn["attachment"] for turn in told]
    assert all(turn.delivered_at for turn in stored)
    return told


def check_http_tells_what_is_stored(stored: list[StoredTurn], told: list[dict[str, Any]]) -> None:
    """What operators are shown is what lies on the disk."""
    assert [turn.turn_id for turn in stored] == [turn["turn_id"] for turn in told]
    for turn, shown in zip(stored, told, strict=True):
        assert turn.prompt_token_ids.tolist() == shown["prompt_token_ids"]
        assert turn.output_token_ids.tolist() == shown["output_token_ids"]
        assert np.array_equal(turn.output_logprobs, np.array(shown["output_logprobs"], np.float32))


def check_engine_was_sent_the_record(stored: list[StoredTurn], requests: list[dict[str, Any]]) -> None:
    """I1: the ids sent are the recorded path, the ids returned are the recorded output, and nothing else was sent."""
    paths = paths_of(stored)
    recorded = sorted((paths[turn.turn_id][0].tolist(), turn.output_token_ids.tolist()) for turn in stored)
    assert recorded == sorted((request["prompt_token_ids"], request["token_ids"]) for request in requests)
    for turn in stored:
        assert len(turn.output_token_ids) == len(turn.output_logprobs) > 0
        first = len(paths[turn.turn_id][0])
        assert np.array_equal(turn.output_logprobs, scripted_logprobs(turn.output_token_ids, first=first))


def check_segments_are_the_recorded_paths(stored: list[StoredTurn], segments: list[dict[str, Any]]) -> None:
    """I1 and I2: a segment is its last turn's path, every array is as long, every row is of its own token."""
    paths = paths_of(stored)
    by_id = {turn.turn_id: turn for turn in stored}
    for segment in segments:
        prompt, output = paths[segment["turns"][-1]["turn_id"]]
        token_ids = np.concatenate([prompt, output])
        assert segment["token_ids"] == token_ids.tolist()
        length = len(token_ids)
        for name in ("loss_mask", "rollout_logprobs", "policy_version"):
            assert len(segment[name]) == length
        assert len(segment["routed_experts"]) == len(segment["routed_valid"]) == length - 1
        assert all(segment["routed_valid"])
        assert np.array_equal(segment["routed_experts"], scripted_experts(token_ids[:-1], ROUTING, start=0))
        for span in segment["turns"]:
            sampled = slice(span["output_start"], span["stop"])
            assert segment["token_ids"][sampled] == by_id[span["turn_id"]].output_token_ids.tolist()
            assert segment["loss_mask"][sampled] == [span["trained"]] * (span["stop"] - span["output_start"])
            assert segment["policy_version"][sampled] == [0] * (span["stop"] - span["output_start"])
            expected = scripted_logprobs(token_ids[sampled], first=span["output_start"])
            assert np.array_equal(np.array(segment["rollout_logprobs"][sampled], np.float32), expected)


def check_each_sampled_token_trains_once(stored: list[StoredTurn], segments: list[dict[str, Any]]) -> None:
    """I3: every turn is trained in exactly one segment, and nothing but sampled tokens is."""
    trained = Counter(span["turn_id"] for segment in segments for span in segment["turns"] if span["trained"])
    assert trained == {turn.turn_id: 1 for turn in stored}
    num_sampled = sum(len(turn.output_token_ids) for turn in stored)
    assert sum(sum(segment["loss_mask"]) for segment in segments) == num_sampled


def paths_of(stored: list[StoredTurn]) -> dict[str, tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]:
    """For each turn the whole prompt, put together from its ancestors' rows, and its output."""
    paths: dict[str, tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]] = {}
    for turn in stored:  # parents come first
        before = () if turn.parent_id is None else paths[turn.parent_id]
        paths[turn.turn_id] = (np.concatenate([*before, turn.prompt_token_ids]), turn.output_token_ids)
    return paths
