"""Turn tree to segments: what a trainer reads, made from what was recorded and from nothing else.

A turn *trains* if it is picked (see `picks`), trainable, and at least one of its sampled tokens has a log-prob. A
segment runs from a root to a turn that trains and has no descendant that does; turns behind it would be tokens without
loss. A turn shared by several segments trains in the first of them (I3). Arrays are aligned by absolute position;
`Segment` checks I2.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gateway.contracts.errors import Conflict, ExpertsMismatch, LedgerCorrupt, NotFound
from gateway.contracts.experts import ExpertIds, RoutedExperts, expert_dtype, valid_rows
from gateway.contracts.generation import JsonValue, LogprobKind
from gateway.contracts.ports import Ledger
from gateway.contracts.records import FinishRecord, TurnRecord
from gateway.contracts.rollouts import FinishedRollout
from gateway.contracts.samples import Segment, TurnSpan
from gateway.contracts.versions import NOT_SAMPLED, expand_spans
from gateway.sessions.picks import Pick, PickedTurns, pick_turns, trainable_tokens


def build_segments(
    turns: Sequence[TurnRecord],
    experts: Mapping[str, RoutedExperts | None],
    *,
    picked: Collection[str] | None = None,
) -> tuple[Segment, ...]:
    """All segments of one session, in order of the turns they end with.

    experts: routing rows by turn id; a turn without an entry has none, and its rows are marked missing (I9).
    picked: ids of the turns that train; the others are context where a picked one builds on them. None: all turns.
    Turns whose log-probs mean different things (`logprob_kind`) never train in one segment.
    Raises LedgerCorrupt for a parent that is not among the turns, ExpertsMismatch for rows that do not fit.
    """
    tree = RecordedTree(turns)
    routing = _routing_facts(tree.turns, experts)
    training = _training(tree, picked)
    segments: list[Segment] = []
    owned: set[str] = set()
    for leaf in _leaves(tree, training):
        path = tree.path(leaf)
        trained = {t.turn_id for t in path if training.get(t.turn_id) is leaf.logprob_kind} - owned
        owned |= trained
        segments.append(_segment(leaf, path, trained, experts, routing))
    return tuple(segments)


def segment_leaves(turns: Sequence[TurnRecord], *, picked: Collection[str] | None = None) -> list[TurnRecord]:
    """The turns with which the segments of `build_segments` end, without building them."""
    tree = RecordedTree(turns)
    return _leaves(tree, _training(tree, picked))


async def load_rollout(ledger: Ledger, session_id: str, snapshot: str, pick: Pick) -> FinishedRollout:
    """Read a finished session and build its segments, off the event loop.

    Raises NotFound (no such rollout, or it was dropped), Conflict (another snapshot), IntegrityError,
    ConfigurationError (the operator's own pick failed).
    """
    finish = await _readable(ledger, session_id, snapshot)
    session, (read, experts) = await asyncio.gather(
        ledger.session(session_id), _read_turns(ledger, session_id, snapshot)
    )
    turns = sealed_turns(read, finish)
    await _readable(ledger, session_id, snapshot)  # a drop while we read must not pass for a rollout without turns
    if session is None:
        raise NotFound(f"no session {session_id}")
    picked, segments = await asyncio.to_thread(_build_picked, turns, experts, pick)
    return FinishedRollout(
        session=session,
        finish=finish,
        segments=segments,
        num_experts=max((turn.num_experts for turn in turns if turn.turn_id in experts), default=0),
        reports=tree_reports(turns),
        pick=picked.report,
    )


async def load_segments(ledger: Ledger, session_id: str, pick: Pick) -> tuple[PickedTurns, tuple[Segment, ...]]:
    """What a trainer would read of a session as it stands now, finished or not; as `load_rollout`."""
    finish, (turns, experts) = await asyncio.gather(ledger.finish_record(session_id), _read_turns(ledger, session_id))
    return await asyncio.to_thread(_build_picked, sealed_turns(turns, finish), experts, pick)


async def _read_turns(
    ledger: Ledger, session_id: str, snapshot: str | None = None
) -> tuple[Sequence[TurnRecord], Mapping[str, RoutedExperts | None]]:
    turns = await ledger.turns(session_id, snapshot=snapshot)
    routed = [turn for turn in turns if turn.experts_stop > turn.experts_start]
    rows = await asyncio.gather(*(ledger.experts(session_id, turn.turn_id) for turn in routed))
    return turns, {turn.turn_id: turn_rows for turn, turn_rows in zip(routed, rows, strict=True)}


def _build_picked(
    turns: Sequence[TurnRecord], experts: Mapping[str, RoutedExperts | None], pick: Pick
) -> tuple[PickedTurns, tuple[Segment, ...]]:
    picked = pick_turns(turns, pick)
    return picked, build_segments(turns, experts, picked=picked.turn_ids)


def sealed_turns(turns: Sequence[TurnRecord], finish: FinishRecord | None) -> list[TurnRecord]:
    """The turns as a session's seal found them (None: not sealed yet).

    A snapshot does not change: what was delivered after its session was sealed was not seen by then.
    """
    return [
        replace(turn, delivered_at=None)
        if finish is not None and turn.delivered_at is not None and turn.delivered_at > finish.finished_at
        else turn
        for turn in turns
    ]


async def _readable(ledger: Ledger, session_id: str, snapshot: str) -> FinishRecord:
    finish = await ledger.finish_record(session_id, snapshot=snapshot)
    if finish is None:
        latest = await ledger.finish_record(session_id)
        if latest is None:
            raise NotFound(f"session {session_id} has no finished rollout")
        raise Conflict(f"rollout {session_id} has snapshot {latest.snapshot}, not {snapshot}")
    if finish.dropped_at is not None:
        raise NotFound(f"the rollout of session {session_id} was dropped")
    return finish


def tree_reports(turns: Sequence[TurnRecord]) -> dict[str, JsonValue]:
    """Counts of a session's turn tree: turns, match tiers, why segments opened, what cannot be trained and why."""
    sampled = sum(len(turn.output_token_ids) for turn in turns)
    trainable = sum(int(trainable_tokens(turn).sum()) for turn in turns)
    reasons = [turn.attachment.segment_reason for turn in turns]
    return {
        "turns": len(turns),
        "tiers": _counts(turn.attachment.tier.value for turn in turns),
        "segment_reasons": _counts(reason.value for reason in reasons if reason is not None),
        "untrainable": _counts(turn.untrainable_reason for turn in turns if turn.untrainable_reason is not None),
        "cache_flags": _counts(flag.value for turn in turns for flag in turn.cache_flags),
        "sampled_tokens": sampled,
        "trainable_tokens": trainable,
    }


class RecordedTree:
    """The turns of one session by id, in order of index; raises LedgerCorrupt for a parent that is not among them."""

    def __init__(self, turns: Sequence[TurnRecord]) -> None:
        self.turns = sorted(turns, key=lambda turn: turn.index)
        self._by_id = {turn.turn_id: turn for turn in self.turns}
        for turn in self.turns:
            parent_id = turn.attachment.parent_id
            if parent_id is not None and parent_id not in self._by_id:
                raise LedgerCorrupt(
                    f"session {turn.session_id} turn {turn.index}: its parent {parent_id} is not recorded"
                )

    def ancestors(self, turn: TurnRecord) -> Iterator[TurnRecord]:
        """Parent, grandparent, … root."""
        seen = {turn.turn_id}
        while (parent_id := turn.attachment.parent_id) is not None:
            if parent_id in seen:
                raise LedgerCorrupt(f"session {turn.session_id} turn {turn.index}: the turn tree has a cycle")
            seen.add(parent_id)
            turn = self._by_id[parent_id]
            yield turn

    def path(self, leaf: TurnRecord) -> list[TurnRecord]:
        """Root … leaf."""
        return [leaf, *self.ancestors(leaf)][::-1]


def _training(tree: RecordedTree, picked: Collection[str] | None) -> dict[str, LogprobKind]:
    """The turns that train, by id, with what their log-probs mean."""
    return {
        turn.turn_id: turn.logprob_kind
        for turn in tree.turns
        if (picked is None or turn.turn_id in picked) and trainable_tokens(turn).any()
    }


def _leaves(tree: RecordedTree, training: Mapping[str, LogprobKind]) -> list[TurnRecord]:
    """Turns that train and have no descendant that does, with log-probs of the same kind; in order of index."""
    candidates = [turn for turn in tree.turns if turn.turn_id in training]
    extended: set[tuple[str, LogprobKind]] = set()
    for turn in candidates:
        for ancestor in tree.ancestors(turn):
            key = (ancestor.turn_id, turn.logprob_kind)
            if key in extended:
                break  # so are all turns above it
            extended.add(key)
    return [turn for turn in candidates if (turn.turn_id, turn.logprob_kind) not in extended]


_FIRST_ROWS = 16


class _RoutingFacts(NamedTuple):
    """Of one session: the shape of its rows, and which layers route (a layer of zeros everywhere has no experts)."""

    num_experts: int
    num_layers: int
    top_k: int
    routed_layers: tuple[int, ...]


def _routing_facts(turns: Iterable[TurnRecord], experts: Mapping[str, RoutedExperts | None]) -> _RoutingFacts | None:
    first: TurnRecord | None = None
    routes: npt.NDArray[np.bool_] | None = None
    for turn in turns:
        rows = experts.get(turn.turn_id)
        if rows is None or not len(rows.ids):
            continue
        first = turn if first is None else first
        _check_rows(turn, rows, first)
        routes = np.zeros(rows.ids.shape[1], dtype=np.bool_) if routes is None else routes
        _note_routes(routes, rows.ids)
    if first is None or routes is None:
        return None
    routed_layers = tuple(int(layer) for layer in np.flatnonzero(routes))
    return _RoutingFacts(first.num_experts, first.num_layers, first.top_k, routed_layers)


def _note_routes(routes: npt.NDArray[np.bool_], ids: ExpertIds) -> None:
    """Set those of `routes` (bool[layers]) whose layer is not zero everywhere: a few rows show nearly all of them, so
    that only the layers still unknown are looked at in every row."""
    routes |= ids[:_FIRST_ROWS].any(axis=(0, 2))
    for layer in np.flatnonzero(~routes):
        routes[layer] = ids[:, layer].any()


def _check_rows(turn: TurnRecord, rows: RoutedExperts, first: TurnRecord) -> None:
    name = f"session {turn.session_id} turn {turn.index}"
    if (rows.start, rows.stop) != (turn.experts_start, turn.experts_stop):
        raise ExpertsMismatch(
            f"{name}: rows [{rows.start}, {rows.stop}) stored, [{turn.experts_start}, {turn.experts_stop}) recorded"
        )
    shape = (turn.num_layers, turn.top_k)
    if rows.ids.shape[1:] != shape or rows.ids.dtype != expert_dtype(turn.num_experts):
        raise ExpertsMismatch(
            f"{name}: rows are {rows.ids.dtype} {rows.ids.shape}, expected [rows, {shape[0]}, {shape[1]}] "
            f"of {turn.num_experts} experts (engine {turn.engine_id})"
        )
    if (*shape, turn.num_experts) != (first.num_layers, first.top_k, first.num_experts):
        raise ExpertsMismatch(
            f"{name}: layers, top-k and experts are {(*shape, turn.num_experts)}, "
            f"in turn {first.index} they are {(first.num_layers, first.top_k, first.num_experts)}"
        )


@dataclass(slots=True)
class _Columns:
    """The aligned arrays of a segment while it is filled."""

    token_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    rollout_logprobs: npt.NDArray[np.float32]
    policy_version: npt.NDArray[np.int32]

    @classmethod
    def empty(cls, num_tokens: int) -> _Columns:
        return cls(
            np.empty(num_tokens, dtype=np.int32),
            np.zeros(num_tokens, dtype=np.bool_),
            np.full(num_tokens, np.nan, dtype=np.float32),
            np.full(num_tokens, NOT_SAMPLED, dtype=np.int32),
        )


def _segment(
    leaf: TurnRecord,
    path: Sequence[TurnRecord],
    trained: set[str],
    experts: Mapping[str, RoutedExperts | None],
    routing: _RoutingFacts | None,
) -> Segment:
    spans = _spans(path, trained)
    columns = _Columns.empty(spans[-1].stop)
    for turn, span in zip(path, spans, strict=True):
        _fill(columns, turn, span)
    ids, valid = _stitch(path, spans, experts, routing)
    return Segment(
        segment_id=f"{leaf.session_id}:{leaf.turn_id}",
        turns=spans,
        token_ids=columns.token_ids,
        loss_mask=columns.loss_mask,
        rollout_logprobs=columns.rollout_logprobs,
        policy_version=columns.policy_version,
        routed_experts=ids,
        routed_valid=valid,
        logprob_kind=leaf.logprob_kind,
    )


def _spans(path: Sequence[TurnRecord], trained: set[str]) -> tuple[TurnSpan, ...]:
    spans: list[TurnSpan] = []
    start = 0
    for turn in path:
        output_start = start + len(turn.prompt_token_ids)
        stop = output_start + len(turn.output_token_ids)
        spans.append(
            TurnSpan(
                turn_id=turn.turn_id,
                start=start,
                output_start=output_start,
                stop=stop,
                trained=turn.turn_id in trained,
                finish_reason=turn.finish.reason.value,
                temperature=float(turn.sampling.get("temperature", 1.0)),
                top_p=float(turn.sampling.get("top_p", 1.0)),
                top_k=int(turn.sampling.get("top_k", -1)),
                cache_flags=tuple(flag.value for flag in turn.cache_flags),
            )
        )
        start = stop
    return tuple(spans)


def _fill(columns: _Columns, turn: TurnRecord, span: TurnSpan) -> None:
    sampled = slice(span.output_start, span.stop)
    columns.token_ids[span.start : span.output_start] = turn.prompt_token_ids
    columns.token_ids[sampled] = turn.output_token_ids
    columns.rollout_logprobs[sampled] = turn.output_logprobs
    # I5: weights may have changed inside the turn
    columns.policy_version[sampled] = expand_spans(turn.version_spans, len(turn.output_token_ids))
    if span.trained:
        columns.loss_mask[sampled] = trainable_tokens(turn)


def _stitch(
    path: Sequence[TurnRecord],
    spans: Sequence[TurnSpan],
    experts: Mapping[str, RoutedExperts | None],
    routing: _RoutingFacts | None,
) -> tuple[ExpertIds | None, npt.NDArray[np.bool_]]:
    """Rows of all turns of a path by absolute position; a row once valid is kept, so later turns only fill gaps."""
    num_rows = spans[-1].stop - 1
    valid = np.zeros(num_rows, dtype=np.bool_)
    if routing is None:
        return None, valid
    stitched = np.empty((num_rows, routing.num_layers, routing.top_k), dtype=expert_dtype(routing.num_experts))
    for turn, span in zip(path, spans, strict=True):
        rows = experts.get(turn.turn_id)
        if rows is None:
            continue
        if rows.stop > span.stop - 1:
            raise ExpertsMismatch(
                f"session {turn.session_id} turn {turn.index}: rows end at {rows.stop}, "
                f"its tokens allow {span.stop - 1} (engine {turn.engine_id})"
            )
        taken = _sound_rows(rows.ids, routing) & ~valid[rows.start : rows.stop]
        for first, stop in turn.recomputed_rows:  # I9: they are not of the weights that sampled the tokens
            taken[max(first - rows.start, 0) : max(stop - rows.start, 0)] = False
        if taken.all():  # nearly always, and a plain copy is several times faster
            stitched[rows.start : rows.stop] = rows.ids
        else:
            stitched[rows.start : rows.stop][taken] = rows.ids[taken]
        valid[rows.start : rows.stop] |= taken
    stitched[~valid] = 0
    return stitched, valid


def _sound_rows(ids: ExpertIds, routing: _RoutingFacts) -> npt.NDArray[np.bool_]:
    if not routing.routed_layers:  # zeros in every layer of every row: nothing was captured
        return np.zeros(len(ids), dtype=np.bool_)
    return valid_rows(ids, routing.num_experts, routing.routed_layers)


def _counts(values: Iterable[str]) -> dict[str, JsonValue]:
    return dict(sorted(Counter(values).items()))
