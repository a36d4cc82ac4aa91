"""Where in the turn tree a request's messages continue (design 4): the deepest match wins, the tier is recorded.

One walk along the request's messages, whose keys are compared with those of recorded messages at the same place; its
cost is that of reading the request once. A different tool list or other template arguments are another root, whatever
the messages say. Nothing is ever refused (I6): a request that matches nothing opens a new segment, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gateway.contracts.generation import JsonValue
from gateway.contracts.records import MatchTier, RootContext, SegmentReason
from gateway.sessions.messages import (
    NO_CALLS,
    MessageKey,
    arguments_digest,
    compare,
    message_keys,
    reasoning_of,
    root_digest,
)
from gateway.sessions.tree import Node, RecordedMessage, TurnTree

RAW = "raw"
"""`meta.certified_by` of a turn whose prompt was no conversation (`sessions.raw`)."""

_RANK = {MatchTier.EXACT: 0, MatchTier.SEMANTIC: 1, MatchTier.PROJECTION: 2}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request stands.

    parent: the turn whose tokens it may extend; None opens a new segment for `reason`. num_matched: how many of the
    request's messages the parent covers. follows: the turn it continues as a conversation, if any.
    """

    parent: Node | None
    follows: Node | None
    num_matched: int
    tier: MatchTier
    reason: SegmentReason | None


class _Trail(NamedTuple):
    """A way along recorded messages that the request's first messages may have come.

    tier: the loosest on the way. num_other_ids: messages whose tool calls have other ids than those recorded.
    """

    at: RecordedMessage
    tier: MatchTier
    num_other_ids: int


class _Match(NamedTuple):
    """A turn whose whole conversation the request begins with."""

    node: Node
    trail: _Trail
    num_messages: int


def attach(tree: TurnTree, messages: Sequence[JsonValue], root: RootContext) -> Place:
    """Find the deepest turn whose conversation the messages begin with."""
    if not len(tree):
        return Place(None, None, 0, MatchTier.NONE, SegmentReason.FIRST)
    wanted_root = root_digest(root)
    here: list[_Match] = []
    elsewhere: list[_Match] = []
    for matches in _matches(tree, messages):
        here = [match for match in matches if match.node.root_digest == wanted_root] or here
        elsewhere = [match for match in matches if match.node.root_digest != wanted_root] or elsewhere
    best, other = _best(tree, here), _best(tree, elsewhere)
    if best is None:
        return Place(None, other.node if other else None, 0, MatchTier.NONE, _reason(other, root))
    follows = other if other is not None and other.num_messages > best.num_messages else best
    return Place(best.node, follows.node, best.num_messages, best.trail.tier, None)


def restore_reasoning(place: Place, messages: Sequence[JsonValue]) -> tuple[JsonValue, ...]:
    """The messages, with the recorded reasoning where the replay left it out: the template sees what was sampled."""
    if place.parent is None or place.tier is not MatchTier.PROJECTION:
        return tuple(messages)
    recorded = place.parent.messages()
    restored = [
        sent if reasoning_of(sent) or not reasoning_of(kept) else {**sent, "reasoning_content": reasoning_of(kept)}
        for sent, kept in zip(messages, recorded, strict=False)
    ]
    return (*restored, *messages[len(restored) :])


def _matches(tree: TurnTree, messages: Sequence[JsonValue]) -> Iterator[list[_Match]]:
    """Turns that have sampled something and end after 1, 2, … of the request's messages; only where there are any.

    Turns of raw prompts have no conversation, whatever a message looks like that stands for one."""
    keys, _ = message_keys(messages, calls=NO_CALLS)
    trails = [_Trail(tree.start, MatchTier.EXACT, 0)]
    for num_messages, key in enumerate(keys, start=1):
        trails = [step for trail in trails for step in _steps(trail, key)]
        if not trails:
            return
        matches = [
            _Match(node, trail, num_messages)
            for trail in trails
            for node in trail.at.turns
            if len(node.record.output_token_ids) and node.record.meta.get("certified_by") != RAW
        ]
        if matches:
            yield matches


def _steps(trail: _Trail, key: MessageKey) -> Iterator[_Trail]:
    for recorded in trail.at.following(key.core):
        if recorded.key is None:
            continue
        tier = compare(recorded.key, key)
        if tier is not None:
            loosest = tier if _RANK[tier] > _RANK[trail.tier] else trail.tier
            yield _Trail(recorded, loosest, trail.num_other_ids + (recorded.key.call_ids != key.call_ids))


def _best(tree: TurnTree, matches: Sequence[_Match]) -> _Match | None:
    """Between equals: whose tool-call ids the replay has, then the closest spelling, then the latest delivery."""

    def preference(match: _Match) -> tuple[int, int, float, int]:
        delivered_at = tree.delivered_at(match.node.record.turn_id) or 0.0
        return (match.trail.num_other_ids, _RANK[match.trail.tier], -delivered_at, -match.node.record.index)

    return min(matches, key=preference, default=None)


def _reason(elsewhere: _Match | None, root: RootContext) -> SegmentReason:
    if elsewhere is None:
        return SegmentReason.NO_MATCH
    if arguments_digest(elsewhere.node.root) != arguments_digest(root):
        return SegmentReason.TEMPLATE_ARGUMENTS_CHANGED
    return SegmentReason.TOOLS_CHANGED
