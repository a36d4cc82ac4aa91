"""Where in the turn tree a request's messages continue (design 4): the deepest match wins, the tier is recorded.

A different tool list or other template arguments are another root, whatever the messages say. Nothing is ever refused
(I6): a request that matches nothing opens a new segment, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from gateway.contracts.generation import JsonValue
from gateway.contracts.records import MatchTier, RootContext, SegmentReason
from gateway.sessions.messages import (
    ChainHash,
    MessageKey,
    arguments_digest,
    message_keys,
    reasoning_of,
    root_digest,
)
from gateway.sessions.tree import Node, TurnTree

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


def attach(tree: TurnTree, messages: Sequence[JsonValue], root: RootContext) -> Place:
    """Find the deepest turn whose conversation the messages begin with."""
    if not len(tree):
        return Place(None, None, 0, MatchTier.NONE, SegmentReason.FIRST)
    keys, _ = message_keys(messages, calls={})
    chains = list(accumulate(keys, ChainHash.extend, initial=ChainHash()))
    wanted_root = root_digest(root)
    elsewhere: Node | None = None
    for num_matched in range(len(keys), 0, -1):
        matches = _matches(tree, keys[:num_matched], chains[num_matched])
        here = [match for match in matches if match[1].root_digest == wanted_root]
        if here:
            tier, node = min(here, key=lambda match: _preference(tree, match, messages[num_matched - 1]))
            return Place(node, elsewhere or node, num_matched, tier, None)
        if matches and elsewhere is None:
            elsewhere = min(matches, key=lambda match: _preference(tree, match, messages[num_matched - 1]))[1]
    return Place(None, elsewhere, 0, MatchTier.NONE, _reason(elsewhere, root))


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


def _matches(tree: TurnTree, keys: Sequence[MessageKey], chain: ChainHash) -> list[tuple[MatchTier, Node]]:
    matches: list[tuple[MatchTier, Node]] = []
    for node in tree.with_core(chain.core):
        tier = _tier(node, keys, chain)
        if tier is not None and len(node.record.output_token_ids):
            matches.append((tier, node))
    return matches


def _tier(node: Node, keys: Sequence[MessageKey], chain: ChainHash) -> MatchTier | None:
    if node.chain.exact == chain.exact:
        return MatchTier.EXACT
    if node.chain.semantic == chain.semantic:
        return MatchTier.SEMANTIC
    recorded = node.message_keys()
    if len(recorded) == len(keys) and all(map(_forgives, recorded, keys)):
        return MatchTier.PROJECTION
    return None


def _forgives(recorded: MessageKey, sent: MessageKey) -> bool:
    """Absent reasoning is forgiven; another reasoning is another message."""
    return recorded.semantic == sent.semantic or (recorded.core == sent.core and not sent.has_reasoning)


def _preference(
    tree: TurnTree, match: tuple[MatchTier, Node], last: Mapping[str, JsonValue]
) -> tuple[bool, int, float, int]:
    """Between equals: whose tool-call ids the replay has, then the closest spelling, then the latest delivery."""
    tier, node = match
    sent_ids = {call.get("id") for call in last.get("tool_calls") or ()}
    other_ids = sent_ids != set(node.calls)
    return (other_ids, _RANK[tier], -(tree.delivered_at(node.record.turn_id) or 0.0), -node.record.index)


def _reason(elsewhere: Node | None, root: RootContext) -> SegmentReason:
    if elsewhere is None:
        return SegmentReason.NO_MATCH
    if arguments_digest(elsewhere.root) != arguments_digest(root):
        return SegmentReason.TEMPLATE_ARGUMENTS_CHANGED
    return SegmentReason.TOOLS_CHANGED
