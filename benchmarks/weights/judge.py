"""What the gateway recorded of turns under changing weights, held against three witnesses that are not the gateway.

1. The engine's own words, noted at its door: which requests there were, their tokens, the label of each token.
2. The tokens themselves: each can be sampled by one version only (`telling.py`).
3. Numbers: plain forwards of every version. A token whose log-prob is that of a forward of all before it under its own
   version stands on a cache of those weights; one that is not stands on an older cache. So which turns must be flagged,
   and which must not, is known without asking anybody; and a recorded routing row must be its forward's. Where two
   experts weigh the same to the last digits, an engine may have taken the other one, and all that follows sees it: a
   forward that takes it too must then agree.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.weights.door import Served
from benchmarks.weights.telling import Forward, Scored, TellingWeights, Tie, forward_of

FRESH_WITHIN = 0.1
"""Median of a span's differences: 1e-5 for one computation in another order of summation, above 1 on another cache."""
STRAY_BEYOND = 2e-3
STRAYS_MAY_BE = 0.02
"""Share of tokens on a fresh cache that no tie of experts explains."""
ROWS_MAY_DIFFER = 0.005
"""Share of routing rows: experts of nearly equal weight change places in another order of summation."""
_MOST_TIES = 8
"""Of one sequence that are tried, alone and in pairs: one of 6,000 choices is a tie."""
_FEW_TOKENS = 4
"""So few may lie between both by chance: on another cache, and little off."""
_LABEL = re.compile(r"policy-(\d{6})")
_FIRST_LABEL = "default"


@dataclass(slots=True)
class Verdict:
    """What was found; `faults` is empty if every record is right. changed: turns inside which weights changed."""

    turns: int = 0
    tokens: int = 0
    changed: int = 0
    attempts: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    changes: Counter[int] = field(default_factory=Counter)
    """How many turns each version came into the middle of."""
    rows: int = 0
    rows_differing: int = 0
    rows_missing: int = 0
    largest_fresh_difference: float = 0.0
    strays: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Turn:
    """One recorded turn inside its segment's arrays. named: for faults."""

    named: str
    token_ids: Sequence[int]
    output_start: int
    versions: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float64]
    flags: frozenset[str]

    @property
    def output(self) -> Sequence[int]:
        return self.token_ids[self.output_start :]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Of one run. segments: by session, as `GET /sessions/{id}/segments?arrays=1` gives them; num_replies: that agents
    got."""

    segments: Mapping[str, Sequence[Mapping[str, Any]]]
    served: Sequence[Served]
    weights: TellingWeights
    num_replies: int


def judge(evidence: Evidence) -> Verdict:
    """Check all sessions' segments against the witnesses."""
    weights, verdict = evidence.weights, Verdict()
    journal = _Journal(evidence.served)
    forward = _Remembered(forward_of(weights))
    for session_id, own in evidence.segments.items():
        if len(own) != 1:
            verdict.faults.append(f"{session_id}: {len(own)} segments where nothing was edited")
        for segment in own:
            for turn in _turns(session_id, segment):
                _judge_turn(turn, journal, weights, forward, verdict)
            _judge_rows(session_id, segment, forward, verdict)
    if verdict.turns != evidence.num_replies:
        verdict.faults.append(f"{verdict.turns} turns recorded, {evidence.num_replies} replies seen")
    verdict.attempts = len(evidence.served)
    verdict.faults += journal.unused()
    if verdict.strays > STRAYS_MAY_BE * verdict.tokens:
        verdict.faults.append(f"{verdict.strays} of {verdict.tokens} log-probs are not their forward's")
    if verdict.rows_differing > ROWS_MAY_DIFFER * max(verdict.rows, 1):
        verdict.faults.append(f"{verdict.rows_differing} of {verdict.rows} routing rows are not their forward's")
    return verdict


def _turns(session_id: str, segment: Mapping[str, Any]) -> Iterator[_Turn]:
    for span in segment["turns"]:
        start, stop = span["output_start"], span["stop"]
        yield _Turn(
            named=f"{session_id} {span['turn_id']}",
            token_ids=segment["token_ids"][:stop],
            output_start=start,
            versions=np.array(segment["policy_version"][start:stop], dtype=np.int64),
            logprobs=np.array(segment["rollout_logprobs"][start:stop], dtype=np.float64),
            flags=frozenset(span["cache_flags"]),
        )


def _judge_turn(
    turn: _Turn, journal: _Journal, weights: TellingWeights, forward: _Remembered, verdict: Verdict
) -> None:
    verdict.turns += 1
    verdict.tokens += len(turn.output)
    verdict.flags.update(turn.flags)
    changes = turn.versions[1:][np.diff(turn.versions) != 0]
    verdict.changed += bool(len(changes))
    verdict.changes.update(int(version) for version in changes)
    engines, fault = journal.take(turn.token_ids[: turn.output_start], turn.output)
    if fault:
        verdict.faults.append(f"{turn.named}: {fault}")
    elif engines != turn.versions.tolist():
        verdict.faults.append(f"{turn.named}: versions {_runs(turn.versions)}, the engine says {_runs(engines)}")
    told = [weights.version_of(token_id) for token_id in turn.output]
    if told != turn.versions.tolist():
        verdict.faults.append(f"{turn.named}: versions {_runs(turn.versions)}, its tokens are of {_runs(told)}")
    seen = list(_numbers(turn, told, forward))
    verdict.largest_fresh_difference = max([verdict.largest_fresh_difference, *(n.largest for n in seen if n.fresh)])
    verdict.strays += sum(n.num_far for n in seen if n.fresh)
    expected = {frozenset(filter(None, flags)) for flags in itertools.product(*(numbers.flags for numbers in seen))}
    if turn.flags not in expected:
        asked = " or ".join(str(sorted(flags)) for flags in expected)
        verdict.faults.append(
            f"{turn.named}: flagged {sorted(turn.flags)}, by its numbers {asked}; versions {_runs(told)}; "
            + ", ".join(map(str, seen))
        )


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Log-probs of one version's tokens in a turn, beside those of its own forward; num_far: how many stray."""

    version: int
    first: int
    num_tokens: int
    num_far: int
    median: float
    largest: float

    @property
    def fresh(self) -> bool:
        """Whether what these tokens stand on was computed by their own weights."""
        return self.median <= FRESH_WITHIN

    @property
    def flags(self) -> tuple[str, ...]:
        """What such a span asks for: one of these, "" for none."""
        if not self.fresh:
            return ("older",)
        fresh = "recomputed" if self.first else ""
        return (fresh, "older") if self.num_tokens < _FEW_TOKENS and self.median > STRAY_BEYOND else (fresh,)

    def __str__(self) -> str:
        far = f"{self.num_far} of {self.num_tokens} log-probs stray from policy {self.version}'s"
        return f"{far}, by {self.median:.2g} in the middle and {self.largest:.2g} at most"


def _numbers(turn: _Turn, told: Sequence[int], forward: _Remembered) -> Iterator[_Numbers]:
    begin = turn.output_start - 1
    for first, stop, version in _spans(told):

        def differences(scored: Scored, first: int = first, stop: int = stop) -> npt.NDArray[np.float64]:
            return np.abs(scored.logprobs[begin + first : begin + stop] - turn.logprobs[first:stop])

        scored = forward.settled(
            version, turn.token_ids, begin + stop, lambda scored: bool((differences(scored) <= STRAY_BEYOND).all())
        )
        found = differences(scored)
        num_far = int((found > STRAY_BEYOND).sum())
        yield _Numbers(version, first, stop - first, num_far, float(np.median(found)), float(found.max()))


def _judge_rows(session_id: str, segment: Mapping[str, Any], forward: _Remembered, verdict: Verdict) -> None:
    """Rows that are called valid are those of the weights that sampled the token after each; older caches apart."""
    if segment["routed_experts"] is None:
        verdict.faults.append(f"{session_id}: no routing rows")
        return
    recorded = np.sort(np.array(segment["routed_experts"], dtype=np.int64), axis=-1)
    valid = np.array(segment["routed_valid"], dtype=bool)
    versions = np.array(segment["policy_version"])
    for span in segment["turns"]:
        rows = np.arange(span["output_start"] - 1, span["stop"] - 1)
        num_missing = int((~valid[rows]).sum())
        verdict.rows_missing += num_missing
        if num_missing and "recomputed" not in span["cache_flags"]:
            verdict.faults.append(f"{session_id} {span['turn_id']}: {num_missing} rows are missing, not recomputed")
        if "older" in span["cache_flags"]:
            continue
        for version in set(versions[rows + 1].tolist()):
            own = rows[(versions[rows + 1] == version) & valid[rows]]

            def num_differing(scored: Scored, own: npt.NDArray[np.int64] = own) -> int:
                return int((recorded[own] != scored.experts[own]).any(axis=(1, 2)).sum())

            scored = forward.settled(
                version, segment["token_ids"][: span["stop"]], span["stop"], lambda scored: not num_differing(scored)
            )
            verdict.rows += len(own)
            verdict.rows_differing += num_differing(scored)


class _Remembered:
    """Forwards of the last sequence, which is asked for twice."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._last: dict[tuple[int, int, frozenset[Tie]], tuple[Sequence[int], Scored]] = {}

    def settled(self, version: int, token_ids: Sequence[int], stop: int, agrees: Callable[[Scored], bool]) -> Scored:
        """The forward that agrees with what an engine said, by as few ties before `stop` taken the other way as it
        takes; the plain one if none does."""
        plain = self._score(version, token_ids, frozenset())
        if agrees(plain):
            return plain
        ties = [tie for tie in plain.ties if tie.position < stop][-_MOST_TIES:]
        for flipped in itertools.chain(itertools.combinations(ties, 1), itertools.combinations(ties, 2)):
            other = self._score(version, token_ids, frozenset(flipped))
            if agrees(other):
                return other
        return plain

    def _score(self, version: int, token_ids: Sequence[int], flipped: frozenset[Tie]) -> Scored:
        key = (version, len(token_ids), flipped)
        if key not in self._last or self._last[key][0] != token_ids:
            self._last[key] = (token_ids, self._forward.score(version, token_ids, flipped))
        return self._last[key][1]


class _Journal:
    """The engine's requests, by prompt; each belongs to one turn."""

    def __init__(self, served: Sequence[Served]) -> None:
        self._by_prompt: defaultdict[tuple[int, ...], list[Served]] = defaultdict(list)
        for one in sorted(served, key=lambda one: one.begun):
            self._by_prompt[one.prompt].append(one)

    def take(self, prompt: Sequence[int], output: Sequence[int]) -> tuple[list[int], str]:
        """The versions of a turn's tokens by the requests that it took, and what is wrong with these."""
        versions: list[int] = []
        ended = 0.0
        while True:
            attempts = self._by_prompt.pop((*prompt, *output[: len(versions)]), [])
            for one in attempts:
                if one.begun < ended:
                    return versions, "two requests of one turn ran at once"
                ended = one.ended
                if one.token_ids != list(output[len(versions) : len(versions) + len(one.token_ids)]):
                    return versions, f"the engine sampled other tokens (request {one.rid})"
                if not one.whole or len(one.labels) != len(one.token_ids):
                    return versions, f"the engine named {len(one.labels)} labels of {len(one.token_ids)} tokens"
                versions += [_version(label) for label in one.labels]
            if not attempts or len(versions) == len(output):
                break
        return versions, "" if len(versions) == len(output) else f"the engine sampled {len(versions)} of its tokens"

    def unused(self) -> list[str]:
        """A line for each request that no turn was made of."""
        left = [one for attempts in self._by_prompt.values() for one in attempts]
        return [f"{len(one.token_ids)} tokens of request {one.rid} ({one.finish}) are in no turn" for one in left]


def _version(label: str) -> int:
    ours = _LABEL.fullmatch(label)
    return 0 if ours is None and label == _FIRST_LABEL else int(ours[1]) if ours is not None else -1


def _spans(versions: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first token, token behind the last, version)."""
    first = 0
    for i in range(1, len(versions) + 1):
        if i == len(versions) or versions[i] != versions[first]:
            yield first, i, int(versions[first])
            first = i


def _runs(versions: Sequence[int] | npt.NDArray[Any]) -> str:
    return " ".join(f"{stop - first}×{version}" for first, stop, version in _spans(list(versions)))
