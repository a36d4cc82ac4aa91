"""`verbatim bench chaos`, short: real processes are killed, hung, replaced and restarted, and the counts come out even.

Its judge is tried too: what it should find is done to the files of a clean run.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import ChaosSettings, is_clean, run_chaos, shown, shown_sweep, sweep_and_count
from benchmarks.custody.agents import Habits
from benchmarks.custody.reader import read
from benchmarks.custody.schedule import ALL, Harm, Planned

DEEDS = (
    Planned(1.0, "engine-0", Harm.KILL, lasts=0.5),
    Planned(1.5, ALL, Harm.UPDATE, mode="abort"),
    Planned(2.5, "trainer", Harm.KILL, lasts=0.1),
    Planned(3.0, "engine-1", Harm.HANG, lasts=0.5),
    Planned(4.0, "router", Harm.KILL, lasts=0.2),
    Planned(5.5, "gateway", Harm.KILL, lasts=0.1),
    Planned(7.0, "gateway", Harm.REPLACE),
    Planned(8.0, "gateway", Harm.RESTART),
)
NUM_KILLS, NUM_SESSIONS = 6, 12


def ignore(text: str) -> None:
    """Nobody watches."""


def test_every_part_may_die_under_agents_and_no_token_is_lost_or_trained_twice(tmp_path: Path) -> None:
    """I3, I4, I9: agents only ever ask again; ledger, engines' journals, agents and trainer agree token by token."""
    settings = ChaosSettings(
        24, 11.0, 1.0, 7, habits=Habits(most_turns=4, leaves=0.1, max_retries=30, thinks_seconds=0.5)
    )
    report = asyncio.run(run_chaos(tmp_path, settings, tell=ignore, planned=DEEDS))
    assert is_clean(report), shown(report)
    assert {deed["target"] for deed in report["deeds"]} == {deed.target for deed in DEEDS}
    figures = report["reader"]["figures"]
    assert report["agents"]["num_retries"] > 0
    assert figures["acknowledged_once"] == figures["trained_rollouts"] == figures["finished_rollouts"] >= 24
    assert figures["trained_tokens"] > 0
    assert figures["turns_of_several_attempts"] > 0, "no turn went on elsewhere: the test harms nothing"


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("swept")
    return folder, asyncio.run(sweep_and_count(folder, NUM_KILLS, num_lanes=NUM_SESSIONS, seed=11, tell=ignore))


def test_a_gateway_killed_at_any_instant_of_a_step_is_not_noticed(swept: tuple[Path, dict[str, Any]]) -> None:
    """I3, I4: a retry gets the reply that was on disk, or a fresh one; the next prompt is what it would have been."""
    _, report = swept
    assert is_clean(report), shown_sweep(report)
    assert report["kill_points"] == NUM_KILLS
    assert report["struck_steps"] >= 4 * NUM_KILLS
    assert sum(times > 0 for times in report["struck_steps_by_instant"].values()) >= 6
    assert report["reader"]["figures"]["prompts_with_another_trained_reply"] == 0


def lose_a_turn(folder: Path, store: sqlite3.Connection) -> None:
    """The last of a session, so that no other misses its parent."""
    store.execute(
        """DELETE FROM turns WHERE rowid = (SELECT t.rowid FROM turns t WHERE t.delivered_at IS NOT NULL AND NOT EXISTS
           (SELECT 1 FROM turns l WHERE l.session_id = t.session_id AND l.turn_index > t.turn_index) LIMIT 1)"""
    )


def double_a_turn(folder: Path, store: sqlite3.Connection) -> None:
    columns = [row[1] for row in store.execute("PRAGMA table_info(turns)")]
    values = {"turn_id": "'turn-again'", "turn_index": "turn_index + 1000"}
    chosen = ", ".join(values.get(column, column) for column in columns)
    store.execute(f"INSERT INTO turns SELECT {chosen} FROM turns LIMIT 1")


def change_a_token(folder: Path, store: sqlite3.Connection) -> None:
    row, ids = store.execute("SELECT rowid, output_token_ids FROM turns LIMIT 1").fetchone()
    store.execute("UPDATE turns SET output_token_ids = ? WHERE rowid = ?", (bytes([ids[0] ^ 1]) + ids[1:], row))


def forget_an_acknowledgement(folder: Path, store: sqlite3.Connection) -> None:
    store.execute("DELETE FROM holdings WHERE rowid = (SELECT min(rowid) FROM holdings)")


def flip_a_routing_byte(folder: Path, store: sqlite3.Connection) -> None:
    file, offset, num_bytes = store.execute(
        "SELECT experts_file, experts_offset, experts_bytes FROM turns WHERE experts_file IS NOT NULL LIMIT 1"
    ).fetchone()
    with (folder / "data" / "routing" / f"routing-{file:08d}.seg").open("r+b") as segments:
        segments.seek(offset + num_bytes - 1)
        last = segments.read(1)[0]
        segments.seek(offset + num_bytes - 1)
        segments.write(bytes([last ^ 1]))


def train_a_rollout_again(folder: Path, store: sqlite3.Connection) -> None:
    lines = (folder / "trained.jsonl").read_text().splitlines()
    first = next(json.loads(line) for line in lines if line.startswith('{"rollout"'))
    with (folder / "trained.jsonl").open("a") as journal:
        journal.write(json.dumps(first | {"lease": "again"}) + "\n")
        journal.write(json.dumps({"commit": "again", "at": 0.0, "sessions": [first["rollout"]]}) + "\n")


def leave_a_rollout_untrained(folder: Path, store: sqlite3.Connection) -> None:
    lines = (folder / "trained.jsonl").read_text().splitlines()
    number, commit = next((i, json.loads(line)) for i, line in enumerate(lines) if line.startswith('{"commit"'))
    lines[number] = json.dumps(commit | {"sessions": commit["sessions"][1:]})
    (folder / "trained.jsonl").write_text("\n".join(lines) + "\n")


def mask_a_token(folder: Path, store: sqlite3.Connection) -> None:
    """A trainer that leaves out what it should train."""
    lines = (folder / "trained.jsonl").read_text().splitlines()
    number, rollout = next((i, json.loads(line)) for i, line in enumerate(lines) if '"mask":[' in line)
    mask = rollout["segments"][0]["mask"]
    mask[mask.index(1)] = 0
    lines[number] = json.dumps(rollout)
    (folder / "trained.jsonl").write_text("\n".join(lines) + "\n")


def forget_what_an_agent_read(folder: Path, store: sqlite3.Connection) -> None:
    lines = (folder / "seen.jsonl").read_text().splitlines()
    (folder / "seen.jsonl").write_text("\n".join(lines[1:]) + "\n")


@pytest.mark.parametrize(
    ("harm", "finding"),
    [
        (lose_a_turn, "an agent saw what is not recorded"),
        (double_a_turn, "a token is recorded twice"),
        (change_a_token, "a checksum does not hold"),
        (forget_an_acknowledgement, "a trained rollout is not acknowledged"),
        (flip_a_routing_byte, "a checksum does not hold"),
        (train_a_rollout_again, "a rollout was trained twice"),
        (leave_a_rollout_untrained, "a finished rollout was not trained"),
        (mask_a_token, "a token is lost"),
        (forget_what_an_agent_read, "a reply was trained that no agent got"),
    ],
)
def test_the_reader_finds_what_was_lost_doubled_or_changed(
    swept: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    harm: Callable[[Path, sqlite3.Connection], None],
    finding: str,
) -> None:
    """The judge can fail: each harm is done to the files of a clean run."""
    folder = tmp_path / "harmed"
    shutil.copytree(swept[0], folder, ignore=shutil.ignore_patterns("*.sock"))
    assert not read(folder).findings
    with closing(sqlite3.connect(folder / "data" / "ledger.sqlite")) as store, store:
        harm(folder, store)
    found = read(folder).findings
    assert finding in found, dict(found)
