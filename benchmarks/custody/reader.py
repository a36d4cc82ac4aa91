"""A program: what is left of a chaos run, counted anew from files alone.

    python -m benchmarks.custody.reader FOLDER

It imports nothing of the gateway: the ledger is read by `sqlite3`, routing rows by `struct`, and every token, log-prob
and row is held against the oracle. Four accounts must agree: the engines' journals (what was sampled), the ledger
(what was recorded), the agents' journal (what was seen) and the trainer's (what was trained). A token is known by the
checksum of all ids up to and with it, so that nobody's own naming has to be believed. Prints JSON: `figures`, and
`findings`, each of which is something that must not be.
"""

from __future__ import annotations

import base64
import json
import sqlite3
import struct
import sys
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote

import zstandard

from benchmarks.custody.oracle import NUM_LAYERS, TOP_K, Script, WrongContinuation, experts, logprob

_RECORD = struct.Struct("<4sIIQ")
_CHECKED_FROM = 8
"""Bytes of a routing record before what its checksum covers: magic and checksum."""

_SCHEMAS = (3, 4)
"""Of the ledger; in 4 routing rows may be packed."""
_SHOWN = 5
_NOTICE_SECONDS = 8.0
"""How long after a deed a request may still end because of it."""
_ON_ITS_WAY_SECONDS = 2.0
"""How long an engine's last token may take to the ledger's disk on a busy machine."""

_TELLS_LATE_SECONDS = 0.5
"""Within which an engine that was not stopped learns that its client has gone."""

_CUTS = frozenset(("kill", "hang", "hang and kill", "restart"))
_KILLS = frozenset(("kill", "hang and kill", "replace and kill"))
"""A gateway that is stopped or replaced otherwise leaves nothing unrecorded."""


Replies: TypeAlias = Mapping[tuple[str, int], int]
"""Of each token, by session and mark: how many different replies hold it."""


@dataclass(slots=True)
class Turn:
    """A row of `turns`. path: all ids up to its last sampled one. asked: the checksum of those before its output."""

    session: str
    turn_id: str
    facts: Mapping[str, Any]
    prompt: list[int]
    output: list[int]
    logprobs: list[float]
    delivered: bool
    late: bool
    rows: tuple[int, int, int] | None
    path: list[int] = field(default_factory=list)
    asked: int = 0
    marks: list[int] = field(default_factory=list)

    @property
    def trainable(self) -> bool:
        """Whether the ledger says that it may train."""
        return self.facts["untrainable_reason"] is None

    @property
    def versions(self) -> list[int]:
        """Of each sampled token."""
        return [version for start, stop, version in self.facts["version_spans"] for _ in range(start, stop)]


@dataclass(slots=True)
class Attempt:
    """One request as its engine journalled it. pieces: (time, ids, version)."""

    rid: str
    session: str
    engine: str
    pid: int
    asked: list[int]
    began: float
    ended: float = 0.0
    how: str = "died"
    pieces: list[tuple[float, list[int], int]] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        """All that it sampled."""
        return [token for _, ids, _ in self.pieces for token in ids]


@dataclass(slots=True)
class Account:
    """Figures and findings; of each kind of finding the first few are shown."""

    figures: dict[str, Any] = field(default_factory=dict)
    findings: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def find(self, kind: str, detail: str) -> None:
        """Something that must not be."""
        self.findings[kind] += 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < _SHOWN:
            shown.append(detail[:1000])


def read(folder: Path, *, consumer: str = "chaos") -> Account:
    """Count everything that a run left in its folder."""
    account = Account()
    script = Script.load(folder / "script.json")
    deeds = list(_lines(folder / "deeds.jsonl"))
    with sqlite3.connect(f"file:{folder / 'data' / 'ledger.sqlite'}?mode=ro", uri=True) as store:
        turns = _read_turns(store, account)
        finished = {row[0]: row[1] for row in store.execute("SELECT session_id, snapshot FROM finishes")}
        acknowledged = _acknowledged(store, consumer)
        _check_store(store, account)
        _check_rollouts(store, account)
    replies = _check_turns(turns, script, folder / "data", account)
    attempts = _read_attempts(folder, account)
    _compare_sampled(attempts, turns, deeds, account)
    _check_one_owner(attempts, deeds, account)
    _compare_seen(folder, turns, account)
    _compare_trained(folder, turns, replies, finished, acknowledged, account)
    return account


# ---- the ledger ----


def _check_store(store: sqlite3.Connection, account: Account) -> None:
    for (line,) in store.execute("PRAGMA integrity_check"):
        if line != "ok":
            account.find("the store is damaged", str(line))
    for table in ("sessions", "finishes"):
        for session_id, facts, checksum in store.execute(f"SELECT session_id, facts, checksum FROM {table}"):
            if zlib.crc32(facts) != checksum:
                account.find("a checksum does not hold", f"{table} {session_id}")
    (sessions,) = store.execute("SELECT count(*) FROM sessions").fetchone()
    account.figures["sessions"] = sessions


def _check_rollouts(store: sqlite3.Connection, account: Account) -> None:
    """Each rollout's snapshots count what its turns hold, nothing stands half, and no lease is left open."""
    query = """
        SELECT s.session_id, s.ordinal, s.num_sampled_tokens, coalesce(sum(length(t.output_token_ids)) / 4, 0)
        FROM snapshots s LEFT JOIN turns t ON t.session_id = s.session_id AND t.since_snapshot <= s.ordinal
        GROUP BY s.session_id, s.ordinal"""
    for session_id, ordinal, told, held in store.execute(query):
        if told != held:
            account.find("a snapshot is not what it was", f"{session_id} {ordinal}: {told} sampled tokens, {held} held")
    for (session_id,) in store.execute("SELECT session_id FROM turns EXCEPT SELECT session_id FROM sessions"):
        account.find("turns of a session that is not there", session_id)
    for (session_id,) in store.execute("SELECT session_id FROM finishes EXCEPT SELECT session_id FROM snapshots"):
        account.find("a finish without a snapshot", session_id)
    for (lease_id,) in store.execute("SELECT lease_id FROM leases WHERE state = 'open'"):
        account.find("a lease is left open", lease_id)
    query = """
        SELECT h.session_id FROM holdings h LEFT JOIN leases l ON l.lease_id = h.lease_id
        WHERE h.acknowledged = 1 AND l.state IS NOT 'acknowledged'"""
    for (session_id,) in store.execute(query):
        account.find("a rollout is acknowledged and its lease is not", session_id)
    (schema,) = store.execute("PRAGMA user_version").fetchone()
    if schema not in _SCHEMAS:
        account.find("the store has another schema", f"{schema}, this reader knows {_SCHEMAS}")


def _read_turns(store: sqlite3.Connection, account: Account) -> list[Turn]:
    """All turns with their paths, parents first."""
    rows = store.execute(
        """SELECT session_id, turn_id, facts, prompt_token_ids, output_token_ids, output_logprobs, checksum,
                   delivered_at IS NOT NULL, since_snapshot > 0, experts_file, experts_offset, experts_bytes
            FROM turns ORDER BY session_id, turn_index"""
    )
    turns: dict[tuple[str, str], Turn] = {}
    for session_id, turn_id, facts, prompt, output, logprobs, checksum, delivered, is_late, *place in rows:
        if _turn_checksum(facts, prompt, output, logprobs) != checksum:
            account.find("a checksum does not hold", f"session {session_id} turn {turn_id}")
            continue
        turn = Turn(
            session_id, turn_id, json.loads(facts.decode("utf-8", "surrogatepass")), list(array("i", prompt)),
            list(array("i", output)), list(array("f", logprobs)), bool(delivered), bool(is_late),
            None if place[0] is None else (place[0], place[1], place[2]),
        )  # fmt: skip
        parent_id = turn.facts["attachment"]["parent_id"]
        parent = turns.get((session_id, parent_id)) if parent_id else None
        if parent_id and parent is None:
            account.find("a turn without its parent", f"session {session_id} turn {turn_id}: {parent_id}")
            continue
        turn.path = [*(parent.path if parent else ()), *turn.prompt, *turn.output]
        turns[session_id, turn_id] = turn
    return list(turns.values())


def _turn_checksum(facts: bytes, *blobs: bytes) -> int:
    checksum = zlib.crc32(facts)
    for blob in blobs:
        checksum = zlib.crc32(blob, zlib.crc32(len(blob).to_bytes(8, "little"), checksum))
    return checksum


def _check_turns(turns: Sequence[Turn], script: Script, data: Path, account: Account) -> Replies:
    """Every recorded token is what an engine must have sampled there, with its log-prob and its rows.

    Returns how many different replies hold a token: two to one prompt may begin with the same draw.
    """
    recorded: Counter[tuple[str, int]] = Counter()
    ends: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
    untrainable: Counter[str] = Counter()
    rows = 0
    for turn in turns:
        named = f"session {turn.session} turn {turn.turn_id}"
        start = len(turn.path) - len(turn.output)
        marks = _marks(turn.path)
        turn.marks, turn.asked = marks[start:], marks[start - 1] if start else 0
        recorded.update((turn.session, mark) for mark in turn.marks)
        for mark in turn.marks:
            ends[turn.session, mark].add(turn.marks[-1])
        try:
            prompt, begun = script.split(turn.path)
            script.check(prompt, begun)
        except WrongContinuation as error:
            account.find("a recorded reply is none", f"{named}: {error}")
        if len(turn.versions) != len(turn.output):
            account.find("a token without a version", named)
        for i, (token, value, version) in enumerate(zip(turn.output, turn.logprobs, turn.versions, strict=False)):
            if turn.trainable and value != logprob(token, start + i, version):
                account.find("a log-prob of another token or version", f"{named} token {i}: {value}, version {version}")
        if not turn.trainable:
            untrainable[str(turn.facts["untrainable_reason"])] += len(turn.output)
        rows += _check_rows(turn, data, account)
    for (session, mark), times in recorded.items():
        if times > len(ends[session, mark]):
            account.find("a token is recorded twice", f"session {session}: {times} times")
    account.figures |= {
        "turns": len(turns),
        "recorded_tokens": sum(len(turn.output) for turn in turns),
        "undelivered_turns": sum(not turn.delivered for turn in turns),
        "late_turns": sum(turn.late for turn in turns),
        "partial_turns": sum(turn.facts["finish"]["reason"] == "abort" for turn in turns),
        "turns_of_several_attempts": sum(turn.facts["meta"]["num_attempts"] > 1 for turn in turns),
        "turns_of_several_versions": sum(len(set(turn.versions)) > 1 for turn in turns),
        "untrainable_tokens": dict(untrainable),
        "routing_rows": rows,
    }
    return {token: len(different) for token, different in ends.items()}


def _check_rows(turn: Turn, data: Path, account: Account) -> int:
    """The routing rows of one turn against the oracle; how many there are."""
    start, stop = turn.facts["experts_start"], turn.facts["experts_stop"]
    named = f"session {turn.session} turn {turn.turn_id}"
    if turn.rows is None:
        if start != stop:
            account.find("routing rows are missing", named)
        return 0
    number, offset, num_bytes = turn.rows
    record = b""
    if (segments := data / "routing" / f"routing-{number:08d}.seg").exists():
        with segments.open("rb") as file:
            file.seek(offset)
            record = file.read(num_bytes)
    if len(record) < _RECORD.size:
        account.find("routing rows are cut off", named)
        return 0
    magic, checksum, key_bytes, payload_bytes = _RECORD.unpack_from(record)
    if magic not in (b"VRX1", b"VRX2") or len(record) != _RECORD.size + key_bytes + payload_bytes:
        account.find("no routing record where one should be", named)
        return 0
    if zlib.crc32(record[_CHECKED_FROM:]) != checksum:
        account.find("a checksum does not hold", f"routing rows of {named}")
    expected = bytes(expert for i in range(start, stop) for expert in experts(turn.path[i], i))
    rows = record[_RECORD.size + key_bytes :]
    if magic == b"VRX2":  # zstd of one layer after another
        rows = _by_token(zstandard.ZstdDecompressor().decompress(rows), stop - start)
    if rows != expected:
        account.find("routing rows of other tokens", f"{named}: rows [{start}, {stop})")
    return int(stop - start)


def _by_token(by_layer: bytes, num_rows: int) -> bytes:
    layers = [by_layer[i * num_rows * TOP_K : (i + 1) * num_rows * TOP_K] for i in range(NUM_LAYERS)]
    return b"".join(layer[i * TOP_K : (i + 1) * TOP_K] for i in range(num_rows) for layer in layers)


def _acknowledged(store: sqlite3.Connection, consumer: str) -> set[str]:
    query = "SELECT session_id FROM holdings WHERE consumer = ? AND acknowledged = 1"
    return {row[0] for row in store.execute(query, (consumer,))}


# ---- what was sampled ----


def _read_attempts(folder: Path, account: Account) -> list[Attempt]:
    attempts: dict[str, Attempt] = {}
    for file in sorted(folder.glob("sampled-*.jsonl")):
        for line in _lines(file):
            if "begin" in line:
                session = unquote(line["key"].partition("#")[0])
                attempts[line["begin"]] = Attempt(
                    line["begin"], session, file.stem.replace("sampled", "engine"), line["pid"], line["ids"], line["at"]
                )
            elif "piece" in line:
                attempts[line["piece"]].pieces.append((line["at"], line["ids"], line["version"]))
            elif "end" in line:
                attempts[line["end"]].how, attempts[line["end"]].ended = line["how"], line["at"]
            elif "refused" in line:
                account.find("an engine was asked for a wrong continuation", f"{line['key']}: {line['why']}")
    for attempt in attempts.values():
        attempt.ended = attempt.ended or max([attempt.began, *(at for at, _, _ in attempt.pieces)])
    account.figures["attempts"] = dict(Counter(attempt.how for attempt in attempts.values()))
    account.figures["sampled_tokens"] = sum(len(attempt.token_ids) for attempt in attempts.values())
    return list(attempts.values())


def _compare_sampled(
    attempts: Sequence[Attempt], turns: Sequence[Turn], deeds: Sequence[Mapping[str, Any]], account: Account
) -> None:
    """Every recorded token was sampled; every sampled one is recorded, or it is known why not."""
    recorded = {(turn.session, mark) for turn in turns for mark in turn.marks}
    sampled: set[tuple[str, int]] = set()
    unrecorded: Counter[str] = Counter()
    whole: list[Attempt] = []
    for attempt in attempts:
        marks = _marks([*attempt.asked, *attempt.token_ids])[len(attempt.asked) :]
        fresh = [(attempt.session, mark) for mark in marks]
        again = sum(mark in sampled for mark in fresh)
        kept = sum(mark in recorded for mark in fresh)
        sampled.update(fresh)
        unrecorded["sampled again after a break"] += min(again, kept)
        if kept:
            unrecorded["sent after the connection was gone"] += len(fresh) - kept
        elif fresh:
            whole.append(attempt)
    of_session: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in whole:
        of_session[attempt.session].append(attempt)
    for attempt in whole:
        reason = _why_unrecorded(attempt, of_session[attempt.session], deeds)
        unrecorded[reason or "unexplained"] += len(attempt.token_ids)
        if reason is None:
            account.find(
                "sampled, not recorded, and nobody was harmed",
                f"session {attempt.session} request {attempt.rid} at {attempt.engine} from {attempt.began:.2f} to "
                f"{attempt.ended:.2f} ({attempt.how}): {len(attempt.token_ids)} tokens",
            )
    for session, _ in recorded - sampled:
        account.find("a recorded token was never sampled", f"session {session}")
    account.figures["unrecorded_tokens"] = {reason: count for reason, count in unrecorded.items() if count}


def _why_unrecorded(attempt: Attempt, others: Sequence[Attempt], deeds: Sequence[Mapping[str, Any]]) -> str | None:
    """An attempt of which nothing is recorded: the gateway died with it, or what it sampled never arrived.

    A turn of several attempts dies with its last.
    """
    last = attempt
    for other in others:
        if other.asked[: len(attempt.asked)] == attempt.asked:
            last = other if other.ended > last.ended else last
    for deed in deeds:
        began, ended = deed["began"], deed["ended"] + _NOTICE_SECONDS
        if attempt.began - 0.05 <= ended and last.ended >= began - _ON_ITS_WAY_SECONDS:
            if deed["target"] == "gateway" and deed["harm"] in _KILLS:
                return "died with the gateway before it was recorded"
            if deed["target"] == "router" and deed["harm"] in _CUTS:  # what it had read is gone with it
                return "never arrived: the router was harmed"
            if deed["target"] == attempt.engine and deed["harm"] in _CUTS and attempt.how != "stop":
                return "never arrived: its engine was harmed"
    if len(attempt.pieces) <= 2 and attempt.how in ("left", "abort"):
        return "never arrived: the agent left at once"
    return None


def _check_one_owner(attempts: Sequence[Attempt], deeds: Sequence[Mapping[str, Any]], account: Account) -> None:
    """Never two engines that sample one turn: the pieces of a session's requests do not overlap in time.

    Excused is an engine that was stopped when its client left, which it learns when it goes on, and the samples of a
    gateway that was killed or stopped.
    """
    overlaps: Counter[str] = Counter()
    by_session: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        if attempt.pieces:
            by_session[attempt.session].append(attempt)
    for session, own in by_session.items():
        own.sort(key=lambda attempt: attempt.pieces[0][0])
        for first, second in pairwise(own):
            overlap = first.pieces[-1][0] - second.pieces[0][0]
            if overlap <= 0:
                continue
            reason = _excuse(first, second, deeds)
            overlaps[reason or "unexplained"] += 1
            if reason is None:
                account.find(
                    "two engines sampled one turn at once",
                    f"session {session}: {first.rid} at {first.engine} and {second.rid} at {second.engine}, "
                    f"{overlap:.2f} s",
                )
    account.figures["overlapping_attempts"] = dict(overlaps)


def _excuse(first: Attempt, second: Attempt, deeds: Sequence[Mapping[str, Any]]) -> str | None:
    for deed in deeds:
        if deed["began"] - 0.05 <= first.pieces[-1][0] and deed["ended"] + _NOTICE_SECONDS >= second.pieces[0][0]:
            if deed["target"] == first.engine and deed["harm"].startswith("hang"):
                return "its engine was stopped"
            if deed["target"] == "router" and deed["harm"].startswith("hang"):
                return "the router was stopped"
            if deed["target"] == "gateway":
                return "the gateway was harmed"
    if first.pieces[-1][0] - second.pieces[0][0] < _TELLS_LATE_SECONDS and first.how in ("left", "abort"):
        return "within the notice of a lost connection"
    return None


# ---- what was seen, and what was trained ----


def _compare_seen(folder: Path, turns: Sequence[Turn], account: Account) -> None:
    """I4: a reply that an agent got is in the ledger, token by token."""
    recorded = {(turn.session, mark) for turn in turns for mark in turn.marks}
    replies = tokens = 0
    for line in _seen(folder):
        replies += 1
        tokens += len(line["ids"])
        marks = _marks([*line["prompt"], *line["ids"]])[len(line["prompt"]) :]
        lost = sum((line["session"], mark) not in recorded for mark in marks)
        if lost:
            account.find("an agent saw what is not recorded", f"session {line['session']}: {lost} tokens")
    account.figures["seen_replies"], account.figures["seen_tokens"] = replies, tokens


def _compare_trained(
    folder: Path,
    turns: Sequence[Turn],
    replies: Replies,
    finished: Mapping[str, str],
    acknowledged: set[str],
    account: Account,
) -> None:
    """Every rollout once; in them every token that may train once, and no other."""
    rollouts, acked = _committed(folder / "trained.jsonl", account)
    trained = _trained_tokens(rollouts, replies, account)
    seen = {(line["session"], _marks([*line["prompt"], *line["ids"]])[-1]) for line in _seen(folder)}
    left = {line["left"] for line in _lines(folder / "seen.jsonl") if "left" in line}
    answered_again = 0
    answered: set[tuple[str, int]] = set()
    left_out: Counter[str] = Counter()
    by_session: dict[str, list[Turn]] = defaultdict(list)
    for turn in turns:
        by_session[turn.session].append(turn)
    for session_id, own in by_session.items():
        if session_id not in rollouts:
            continue
        reached = _reached(own)
        continued = {turn.facts["attachment"]["parent_id"] for turn in own if turn.facts["attachment"]["continues"]}
        # Whole trained replies first: another one may share their first token and have been left out.
        for turn in sorted(own, key=lambda turn: not (turn.marks and trained[turn.session, turn.marks[-1]])):
            if turn.marks and trained[session_id, turn.marks[-1]]:
                is_new = (session_id, turn.asked) not in answered
                answered.add((session_id, turn.asked))
                answered_again += not is_new
                was_read = (session_id, turn.marks[-1]) in seen or turn.turn_id in continued
                if not was_read and session_id not in left:
                    account.find("a reply was trained that no agent got", f"session {session_id} turn {turn.turn_id}")
            missing = [mark for mark in turn.marks if not trained[session_id, mark]]
            trained.subtract((session_id, mark) for mark in turn.marks if trained[session_id, mark])
            if not missing:
                continue
            reason = _why_left_out(turn, reached, was_seen=(session_id, turn.marks[-1]) in seen)
            left_out[reason or "lost"] += len(missing)
            if reason is None:
                account.find("a token is lost", f"session {session_id} turn {turn.turn_id}: {len(missing)} tokens")
    for session_id, _ in +trained:
        account.find("a token was trained that is not recorded", f"session {session_id}")
    for session_id in finished.keys() - rollouts.keys():
        account.find("a finished rollout was not trained", session_id)
    for session_id in rollouts.keys() - acknowledged:
        account.find("a trained rollout is not acknowledged", session_id)
    for session_id in acknowledged - rollouts.keys():
        account.find("a rollout is acknowledged and was not trained", session_id)
    account.figures |= {
        "finished_rollouts": len(finished),
        "trained_rollouts": len(rollouts),
        "acknowledged_once": len(acknowledged & rollouts.keys()),
        "acknowledged_leases": len(acked),
        "left_out_tokens": dict(left_out),
        "prompts_with_another_trained_reply": answered_again,
    }


def _seen(folder: Path) -> Iterator[dict[str, Any]]:
    """Replies that agents read."""
    return (line for line in _lines(folder / "seen.jsonl") if "ids" in line)


def _committed(file: Path, account: Account) -> tuple[dict[str, Mapping[str, Any]], set[str]]:
    """Rollouts whose lease was committed, and the leases whose acknowledgement was noted."""
    waiting: dict[tuple[str, str], Mapping[str, Any]] = {}
    rollouts: dict[str, Mapping[str, Any]] = {}
    acked: set[str] = set()
    for line in _lines(file):
        if "rollout" in line:
            waiting[line["lease"], line["rollout"]] = line
        elif "commit" in line:
            for session_id in line["sessions"]:
                if session_id in rollouts:
                    account.find("a rollout was trained twice", session_id)
                rollouts[session_id] = waiting.pop((line["commit"], session_id))
        elif "acked" in line:
            acked.add(line["acked"])
    account.figures["rollouts_read_and_not_committed"] = len(waiting)
    return rollouts, acked


def _trained_tokens(
    rollouts: Mapping[str, Mapping[str, Any]], replies: Replies, account: Account
) -> Counter[tuple[str, int]]:
    """(session, mark) of every trained token; log-probs, versions and rows are checked on the way."""
    trained: Counter[tuple[str, int]] = Counter()
    total = rows = 0
    for session_id, rollout in rollouts.items():
        for segment in rollout["segments"]:
            ids, mask = segment["ids"], segment["mask"]
            marks = _marks(ids)
            for i, trains in enumerate(mask):
                if not trains:
                    continue
                total += 1
                trained[session_id, marks[i]] += 1
                if trained[session_id, marks[i]] > replies.get((session_id, marks[i]), 1):
                    account.find("a token was trained twice", f"session {session_id} token {i}")
                if segment["logprobs"][i] != logprob(ids[i], i, segment["versions"][i]):
                    account.find("a trained log-prob is another token's", f"session {session_id} token {i}")
            rows += _check_trained_rows(session_id, segment, account)
    account.figures |= {"trained_tokens": total, "trained_rows": rows}
    return trained


def _check_trained_rows(session_id: str, segment: Mapping[str, Any], account: Account) -> int:
    if segment["experts"] is None:
        return 0
    flat, width = base64.b64decode(segment["experts"]), NUM_LAYERS * TOP_K
    for i, valid in enumerate(segment["valid"]):
        if valid and flat[i * width : (i + 1) * width] != bytes(experts(segment["ids"][i], i)):
            account.find("a trained routing row is another token's", f"session {session_id} row {i}")
    return sum(segment["valid"])


def _reached(turns: Sequence[Turn]) -> set[str]:
    """Turns that were delivered, or from which a delivered one goes on."""
    by_id = {turn.turn_id: turn for turn in turns}
    reached: set[str] = set()
    for turn in turns:
        at: Turn | None = turn if turn.delivered else None
        while at is not None and at.turn_id not in reached:
            reached.add(at.turn_id)
            at = by_id.get(at.facts["attachment"]["parent_id"] or "")
    return reached


def _why_left_out(turn: Turn, reached: set[str], *, was_seen: bool) -> str | None:
    if not turn.trainable:
        return f"untrainable: {turn.facts['untrainable_reason']}"
    if turn.late:
        return "recorded after its rollout was taken"
    if turn.turn_id not in reached:
        return "not delivered as far as is known, though seen" if was_seen else "not delivered"
    return None


def _marks(token_ids: Iterable[int]) -> list[int]:
    """For each position a checksum (64 bits) of all ids up to it."""
    at, marks = 0xCBF29CE484222325, []
    for token in token_ids:
        at = ((at ^ (token + 1)) * 0x100000001B3 + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        marks.append(at)
    return marks


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Whole lines only: the writer of the last one may have been killed."""
    if not file.exists():
        return
    with file.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield json.loads(line)


def main() -> int:
    """Print the account; 1 if there is a finding."""
    account = read(Path(sys.argv[1]))
    content = {"figures": account.figures, "findings": dict(account.findings), "examples": account.examples}
    sys.stdout.write(json.dumps(content, indent=1) + "\n")
    return 1 if account.findings else 0


if __name__ == "__main__":
    sys.exit(main())
