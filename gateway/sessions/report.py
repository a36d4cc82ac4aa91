"""What happened to the tokens of one session: matches, segments, forks, picks, and what re-tokenising would break.

Made on demand from what was recorded, never while a turn runs. The drift part asks what a gateway would have sent that
keeps messages only and renders each prompt anew:

    recorded prompt     <u> question <a> sampled tokens… <u> next
    re-tokenised        <u> question <a> other  tokens… <u> next      compared chunk by chunk, split at control tokens

A turn's output is judged in the deepest recorded conversation that holds it, so that every leaf of the tree is rendered
once: the cost is about one tokenisation of each segment's final text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import pairwise, takewhile
from typing import NamedTuple

import numpy as np

from gateway.contracts.errors import LedgerCorrupt, TemplateRaised
from gateway.contracts.generation import TokenIds
from gateway.contracts.records import SessionOrigin, SessionRecord, TurnRecord, conversation
from gateway.contracts.rollouts import PickReport
from gateway.sessions.attach import RAW
from gateway.sessions.model import ServedModel
from gateway.sessions.picks import Pick, pick_turns
from gateway.sessions.segments import RecordedTree, segment_leaves
from gateway.tito.conversation import Conversation


@dataclass(frozen=True, slots=True)
class DriftReport:
    """What re-tokenising would have made of the turns that extend recorded tokens.

    num_drifted_turns: whose prompt would have been other tokens, as far as the template rendered their conversation;
    num_raised_turns: where it refused to. num_compared_tokens: sampled tokens that a later prompt holds;
    num_wrong_tokens: those of them that the prompt would not have held as sampled. Each token is counted once.
    """

    num_extending_turns: int
    num_drifted_turns: int
    num_raised_turns: int
    num_compared_tokens: int
    num_wrong_tokens: int


@dataclass(frozen=True, slots=True)
class SessionReport:
    """Of one session's turn tree; the fields of `GET /sessions/{id}/report`.

    tiers: matches by tier. segment_reasons: why turns opened new tokens. num_roots: turns that did; num_forks: turns
    that two or more others extend. num_segments: under `pick`. num_hidden_messages: messages that the template did not
    show to the model. drift: None where no model was given.
    """

    session_id: str
    origin: SessionOrigin
    complete: bool
    gaps: tuple[int, ...]
    num_turns: int
    num_roots: int
    num_forks: int
    num_segments: int
    tiers: Mapping[str, int]
    segment_reasons: Mapping[str, int]
    certified_by: Mapping[str, int]
    flags: Mapping[str, int]
    num_hidden_messages: int
    pick: PickReport
    drift: DriftReport | None


@dataclass(frozen=True, slots=True, eq=False)
class Retokenisation:
    """A gateway that keeps no tokens. render: a conversation's whole prompt, int32[T], raises TemplateRaised.
    control_ids: tokens that text never becomes, by which prompts are split."""

    render: Callable[[Conversation], TokenIds]
    control_ids: frozenset[int]

    @classmethod
    def of_model(cls, model: ServedModel) -> Retokenisation:
        """As the served model's own template and tokenizer would do it."""
        control_ids = (token.token_id for token in model.tokenizer.added_tokens.values() if token.special)
        return cls(lambda conversation: model.prompts.build(conversation, None).token_ids, frozenset(control_ids))


class Change(NamedTuple):
    """Recorded tokens [start, stop) stand otherwise in the other prompt; empty where it only has more there."""

    start: int
    stop: int


def session_report(
    session: SessionRecord, turns: Sequence[TurnRecord], pick: Pick, retokenisation: Retokenisation | None
) -> SessionReport:
    """The report on all turns of a session; renders and tokenises, so not for the event loop.

    Raises LedgerCorrupt for turns that are no tree, ConfigurationError if the operator's own pick fails.
    """
    picked = pick_turns(turns, pick)
    children = Counter(turn.attachment.parent_id for turn in turns)
    reasons = [turn.attachment.segment_reason for turn in turns]
    return SessionReport(
        session_id=session.session_id,
        origin=session.origin,
        complete=session.complete,
        gaps=session.gaps,
        num_turns=len(turns),
        num_roots=children.pop(None, 0),
        num_forks=sum(count > 1 for count in children.values()),
        num_segments=len(segment_leaves(turns, picked=picked.turn_ids)),
        tiers=_counts(turn.attachment.tier.value for turn in turns),
        segment_reasons=_counts(reason.value for reason in reasons if reason is not None),
        certified_by=_counts(str(turn.meta.get("certified_by", "unknown")) for turn in turns),
        flags=_counts(str(flag) for turn in turns for flag in turn.meta.get("flags", ())),
        num_hidden_messages=_num_hidden_messages(RecordedTree(turns)),
        pick=picked.report,
        drift=None if retokenisation is None else measure_drift(turns, retokenisation),
    )


def measure_drift(turns: Sequence[TurnRecord], retokenisation: Retokenisation) -> DriftReport:
    """Render every leaf's conversation once and compare it with the tokens that were sent.

    Where the template refuses a leaf's conversation, the turn before it is asked, and so on.
    """
    tree = RecordedTree(turns)
    tally = _Tally()
    for leaf in _extending_leaves(tree):
        for path in _upwards(tree, leaf):
            if path[-1].meta.get("certified_by") == RAW:
                continue  # no conversation: nothing that a template could render
            if tally.knows(path[-1]):
                break
            try:
                rendered = retokenisation.render(_conversation(path))
            except TemplateRaised:
                tally.raised.add(path[-1].turn_id)
                continue
            tally.judge(path, changed_spans(_prompt(path), rendered, retokenisation.control_ids))
            break
    return DriftReport(
        num_extending_turns=sum(turn.attachment.parent_id is not None for turn in turns),
        num_drifted_turns=len(tally.drifted),
        num_raised_turns=len(tally.raised),
        num_compared_tokens=tally.num_compared_tokens,
        num_wrong_tokens=tally.num_wrong_tokens,
    )


def changed_spans(recorded: TokenIds, other: TokenIds, control_ids: frozenset[int]) -> list[Change]:
    """Where two prompts differ, in positions of the first, in order.

    Both are split at control tokens and aligned chunk by chunk; a changed chunk is narrowed to what its ends do not
    share. A difference inside a long chunk therefore counts whole.
    """
    ours, theirs = _Chunks.of(recorded, control_ids), _Chunks.of(other, control_ids)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours.contents, theirs.contents, strict=False)))
    matcher = SequenceMatcher(None, ours.contents[same:], theirs.contents[same:])
    changes: list[Change] = []
    for kind, *spans in matcher.get_opcodes():
        if kind != "equal":
            for i0, i1, j0, j1 in _pairs(*(same + bound for bound in spans)):
                replacement = other[theirs.bounds[j0] : theirs.bounds[j1]]
                changes.append(_narrowed(recorded, ours.bounds[i0], ours.bounds[i1], replacement))
    return changes


def _pairs(i0: int, i1: int, j0: int, j1: int) -> list[tuple[int, int, int, int]]:
    """As many chunks on both sides are taken for the same chunks with other contents, else all are one change."""
    if i1 - i0 != j1 - j0:
        return [(i0, i1, j0, j1)]
    return [(i, i + 1, j, j + 1) for i, j in zip(range(i0, i1), range(j0, j1), strict=True)]


class _Chunks(NamedTuple):
    """A prompt split so that every control token begins a chunk; chunk i is ids[bounds[i]:bounds[i + 1]]."""

    contents: list[bytes]
    bounds: list[int]

    @classmethod
    def of(cls, ids: TokenIds, control_ids: frozenset[int]) -> _Chunks:
        controls = np.flatnonzero(np.isin(ids, np.fromiter(control_ids, dtype=np.int32)))
        bounds = sorted({0, len(ids), *controls.tolist()})
        return cls([ids[start:stop].tobytes() for start, stop in pairwise(bounds)], bounds)


def _narrowed(recorded: TokenIds, start: int, stop: int, replacement: TokenIds) -> Change:
    """The span without what both sides have at its beginning and its end."""
    ours = recorded[start:stop]
    shorter = min(len(ours), len(replacement))
    first = _common(ours[:shorter], replacement[:shorter])
    last = _common(ours[first:][::-1], replacement[first:][::-1])
    return Change(start + first, stop - last)


def _common(one: TokenIds, other: TokenIds) -> int:
    """How many tokens two sequences have in common at their beginning."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


@dataclass(slots=True)
class _Tally:
    """What has been judged so far; turns by id, so that a prefix that leaves share counts once (in the first)."""

    prompts: set[str] = field(default_factory=set)
    outputs: set[str] = field(default_factory=set)
    drifted: set[str] = field(default_factory=set)
    raised: set[str] = field(default_factory=set)
    num_compared_tokens: int = 0
    num_wrong_tokens: int = 0

    def knows(self, turn: TurnRecord) -> bool:
        """Whether this turn's prompt was judged, or could not be."""
        return turn.turn_id in self.prompts or turn.turn_id in self.raised

    def judge(self, path: Sequence[TurnRecord], changes: Sequence[Change]) -> None:
        """Count what differs in the prompt of the last turn of a path."""
        first_change = min((change.start for change in changes), default=None)
        stop = 0
        for turn in path:
            output_start = stop + len(turn.prompt_token_ids)
            stop = output_start + len(turn.output_token_ids)
            is_last = turn is path[-1]
            if turn.attachment.parent_id is not None and turn.turn_id not in self.prompts:
                self.prompts.add(turn.turn_id)
                if first_change is not None and (is_last or first_change < output_start):
                    self.drifted.add(turn.turn_id)
            if not is_last and turn.turn_id not in self.outputs:
                self.outputs.add(turn.turn_id)
                self.num_compared_tokens += len(turn.output_token_ids)
                self.num_wrong_tokens += sum(_overlap(change, output_start, stop) for change in changes)


def _overlap(change: Change, start: int, stop: int) -> int:
    return max(0, min(change.stop, stop) - max(change.start, start))


def _extending_leaves(tree: RecordedTree) -> list[TurnRecord]:
    """Turns that extend recorded tokens and that none extends, those with the longest prompts first."""
    parents = {turn.attachment.parent_id for turn in tree.turns}
    leaves = [turn for turn in tree.turns if turn.attachment.parent_id is not None and turn.turn_id not in parents]
    return sorted(leaves, key=lambda leaf: -len(_prompt(tree.path(leaf))))


def _upwards(tree: RecordedTree, leaf: TurnRecord) -> Iterator[list[TurnRecord]]:
    """Paths to the leaf, to its parent, …, as long as their last turn extends another."""
    path = tree.path(leaf)
    while len(path) > 1:
        if not path[-1].attachment.continues:  # the rest of a reply: no prompt of its own that could be rendered
            yield path
        path = path[:-1]


def _prompt(path: Sequence[TurnRecord]) -> TokenIds:
    """int32[P]: what the engine was sent for the last turn of a path (I1)."""
    parts = [part for turn in path for part in (turn.prompt_token_ids, turn.output_token_ids)]
    return np.concatenate(parts[:-1])


def _conversation(path: Sequence[TurnRecord]) -> Conversation:
    """What the last turn of a path answers, as recorded."""
    root = path[0].root
    if root is None:
        raise LedgerCorrupt(f"session {path[0].session_id} turn {path[0].index}: a root without its context")
    return Conversation(tuple(conversation(path)[:-1]), root.tools, root.template_arguments)


def _num_hidden_messages(tree: RecordedTree) -> int:
    """A message that several turns did not show counts once."""
    hidden: set[tuple[str, int]] = set()
    for turn in tree.turns:
        indices = turn.meta.get("hidden_messages") or ()
        if indices:
            asked = [t for t in tree.path(turn) if not t.attachment.continues]
            places = [(t.turn_id, i) for t in asked for i in range(len(t.added_messages) + 1)]
            hidden.update(places[index] for index in indices)
    return len(hidden)


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
