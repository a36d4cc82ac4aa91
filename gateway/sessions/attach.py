"""Where in the turn tree a request's messages continue (design 4): the deepest match wins, the tier is recorded.

One walk along the request's messages, whose keys are compared with those of recorded messages at the same place; its
cost is that of reading the request once. A different tool list or other template arguments are another root, whatever
the messages say. Nothing is ever refused (I6): a request that matches nothing opens a new segment, with the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import msgspec

from gateway.contracts.generation import JsonValue
from gateway.contracts.records import MatchTier, RootContext, SegmentReason
from gateway.sessions.messages import (
    NO_CALLS,
    CallPositions,
    MessageKey,
    arguments_digest,
    calls_behind,
    compare,
    is_surely,
    message_key,
    reasoning_of,
)
from gateway.sessions.tree import Node, RecordedMessage, TurnTree

RAW = "raw"
"""`meta.certified_by` of a turn whose prompt was no conversation (`sessions.raw`)."""

_MOST_WAYS = 4

_RANK = {MatchTier.EXACT: 0, MatchTier.SEMANTIC: 1, MatchTier.PROJECTION: 2}


class Place(msgspec.Struct, frozen=True):
    """Where a request stands.

    parent: the turn whose tokens it may extend; None opens a new segment for `reason`. num_matched: how many of the
    request's messages the parent covers. follows: the turn it continues as a conversation, if any.
    """

    parent: Node | None
    follows: Node | None
    num_matched: int
    tier: MatchTier
    reason: SegmentReason | None


class _Trail(msgspec.Struct, frozen=True, eq=False):
    """A way along recorded messages that the request's first messages may have come.

    tier: the loosest on the way. num_other_ids: messages whose tool calls have other ids than those recorded.
    """

    at: RecordedMessage
    tier: MatchTier
    num_other_ids: int


class _Match(msgspec.Struct, frozen=True, eq=False):
    """A turn whose whole conversation the request begins with."""

    node: Node
    trail: _Trail
    num_messages: int


class _Step(msgspec.Struct, frozen=True, eq=False):
    """What is known behind a request's first messages: the trails that lead there, the calls that hold, and the deepest
    matches so far, under the request's own root and under others."""

    num_messages: int
    trails: Sequence[_Trail]
    calls: CallPositions
    here: Sequence[_Match]
    elsewhere: Sequence[_Match]


class KnownWay(msgspec.Struct, frozen=True, eq=False):
    """The way of an earlier request as far as its deepest match, and all its messages. num_turns: that the tree had
    then."""

    messages: Sequence[JsonValue]
    root: RootContext
    root_digest: bytes
    step: _Step
    num_turns: int

    def has_root(self, root: RootContext) -> bool:
        """Whether its root is made of the very objects, as that of a request is which only adds messages."""
        known = self.root
        return known.tools is root.tools and known.template_arguments is root.template_arguments

    def leads(self, tree: TurnTree, messages: Sequence[JsonValue]) -> bool:
        """Whether a request that begins with the same messages, the very objects, would come the same way again."""
        num = self.step.num_messages
        return (
            len(messages) >= num
            and tree.first_change_since(self.num_turns) > num
            and all(map(operator.is_, self.messages[:num], messages))
        )


class KnownWays:
    """The latest ways of one session, of a conversation each; what they spare is reading the whole history again."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: Sequence[KnownWay] = ()

    def find(self, tree: TurnTree, messages: Sequence[JsonValue]) -> KnownWay | None:
        """The longest that a request goes too."""
        found = None
        for way in self._known:
            is_longer = found is None or way.step.num_messages > found.step.num_messages
            if is_longer and way.leads(tree, messages):
                found = way
        return found

    def keep(self, new: KnownWay, instead_of: KnownWay | None) -> None:
        """Remember a way; the one that it goes on from is not needed any more."""
        if len(self._known) <= 1 and instead_of in self._known:  # the rule
            self._known = (new,)
            return
        others = [way for way in self._known if way is not instead_of]
        self._known = [*others[-_MOST_WAYS + 1 :], new]

    def clear(self) -> None:
        """Forget all."""
        self._known = ()


def attach(tree: TurnTree, messages: Sequence[JsonValue], root: RootContext, ways: KnownWays | None = None) -> Place:
    """Find the deepest turn whose conversation the messages begin with. ways: of the session's earlier requests."""
    num_turns = len(tree)
    if not num_turns:
        return Place(None, None, 0, MatchTier.NONE, SegmentReason.FIRST)
    way = None if ways is None else ways.find(tree, messages)
    wanted_root = way.root_digest if way is not None and way.has_root(root) else tree.digest_of(root)
    if way is not None and way.root_digest == wanted_root:
        step = way.step
    else:
        step = _Step(0, (_Trail(tree.start, MatchTier.EXACT, 0),), NO_CALLS, (), ())
    deepest = step
    for message in messages[step.num_messages :]:
        if not (trails := _further(step, message)):
            break
        step = _stepped(tree, step, message, trails, wanted_root)
        if step.here is not deepest.here:
            deepest = step
    if ways is not None and deepest.num_messages:
        ways.keep(KnownWay(messages, root, wanted_root, deepest, num_turns), way)
    best = _best(tree, step.here) if step.here else None
    other = _best(tree, step.elsewhere) if step.elsewhere else None
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


def _stepped(tree: TurnTree, step: _Step, message: JsonValue, trails: Sequence[_Trail], wanted_root: bytes) -> _Step:
    """One message further, on the trails that go on with it.

    Matches are turns that have sampled something and end just there. Turns of raw prompts have no conversation,
    whatever a message looks like that stands for one.
    """
    num_messages = step.num_messages + 1
    here: list[_Match] = []
    elsewhere: list[_Match] = []
    for trail in trails:
        for node in map(tree.__getitem__, trail.at.turn_ids):
            if len(node.record.output_token_ids) and node.record.meta.get("certified_by") != RAW:
                matches = here if node.root_digest == wanted_root else elsewhere
                matches.append(_Match(node, trail, num_messages))
    first = trails[0]  # where all ids are those recorded, so are the calls
    calls = calls_behind(message, step.calls) if first.num_other_ids else first.at.calls
    return _Step(num_messages, trails, calls, here or step.here, elsewhere or step.elsewhere)


def _further(step: _Step, message: JsonValue) -> Sequence[_Trail]:
    """The trails that go on with a message."""
    if len(step.trails) == 1:  # the rule, and then nobody may need the message's key
        trail = step.trails[0]
        only = trail.at.next
        if only is None:
            return ()
        # Where all ids are those recorded, an equal message answers the same calls.
        if isinstance(only, RecordedMessage) and not trail.num_other_ids and is_surely(message, only.message):
            return (_Trail(only, trail.tier, 0),)
    key = message_key(message, step.calls)
    return [further for trail in step.trails for further in _steps(trail, key)]


def _steps(trail: _Trail, key: MessageKey) -> Iterator[_Trail]:
    for recorded in trail.at.following(key.core):
        tier = compare(recorded.key, key)
        if tier is not None:
            loosest = tier if _RANK[tier] > _RANK[trail.tier] else trail.tier
            yield _Trail(recorded, loosest, trail.num_other_ids + (recorded.key.call_ids != key.call_ids))


def _best(tree: TurnTree, matches: Sequence[_Match]) -> _Match | None:
    """Between equals: whose tool-call ids the replay has, then the closest spelling, then the latest delivery."""

    def preference(match: _Match) -> tuple[int, int, float, int]:
        delivered_at = tree.delivered_at(match.node.record.turn_id) or 0.0
        return (match.trail.num_other_ids, _RANK[match.trail.tier], -delivered_at, -match.node.record.index)

    return matches[0] if len(matches) == 1 else min(matches, key=preference, default=None)


def _reason(elsewhere: _Match | None, root: RootContext) -> SegmentReason:
    if elsewhere is None:
        return SegmentReason.NO_MATCH
    if arguments_digest(elsewhere.node.root) != arguments_digest(root):
        return SegmentReason.TEMPLATE_ARGUMENTS_CHANGED
    return SegmentReason.TOOLS_CHANGED
