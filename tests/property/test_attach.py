"""Attachment against a plain model: whatever an agent does to its history, the deepest recorded match is found."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contracts.examples import example_turn
from gateway.contracts.generation import LogprobKind
from gateway.contracts.records import Attachment, MatchTier, RootContext, SegmentReason, TurnRecord
from gateway.contracts.versions import VersionSpan
from gateway.sessions.attach import KnownWays, Place, attach, restore_reasoning
from gateway.sessions.tree import TurnTree

TOOL = {"type": "function", "function": {"name": "f"}}
ROOTS = [
    RootContext((), {}),
    RootContext((TOOL,), {}),
    RootContext((TOOL, {"name": "g"}), {}),
    RootContext(({"name": "g"}, TOOL), {}),
    RootContext((), {"thinking": False}),
]
QUESTION = {"role": "user", "content": "q"}
FIRST = Attachment(None, None, MatchTier.NONE, SegmentReason.FIRST)


def record(index: int, attachment: Attachment, root: RootContext | None, added: list[Any], reply: Any) -> TurnRecord:
    return example_turn(
        index,
        turn_id=f"turn-{index}",
        attachment=attachment,
        root=root,
        added_messages=tuple(added),
        reply=reply,
        prompt_token_ids=np.array([index, index], dtype=np.int32),
        output_token_ids=np.array([100 + index], dtype=np.int32),
        output_logprobs=np.zeros(1, dtype=np.float32),
        version_spans=(VersionSpan(0, 1, 0),),
        logprob_kind=LogprobKind.RAW,
    )


def add(tree: TurnTree, place: Place, sent: list[Any], root: RootContext, reply: Any) -> TurnRecord:
    """Record a turn where it was placed."""
    parent_id = None if place.parent is None else place.parent.record.turn_id
    attachment = Attachment(parent_id, None, place.tier, place.reason)
    turn = record(tree.take_index(), attachment, None if place.parent else root, list(sent[place.num_matched :]), reply)
    tree.add(turn)
    return turn


def assistant(text: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def calling(*call_ids: str, arguments: str = "{}", **fields: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    calls = [{"id": call_id, "type": "function", "function": function} for call_id in call_ids]
    return assistant(None, tool_calls=calls, **fields)


# ---- the model: comparison by the letter of the design, message by message, turn by turn ----


@dataclass(frozen=True)
class Told:
    """A recorded turn as the model remembers it: its whole conversation, its root, when its reply was delivered."""

    index: int
    conversation: list[dict[str, Any]]
    root: int
    delivered_at: float | None


def plainly(message: dict[str, Any]) -> Any:
    """What must be equal in every tier."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = content[0]["text"]
    return [message["role"], content, [arguments_of(call) for call in message.get("tool_calls") or ()]]


def arguments_of(call: dict[str, Any]) -> Any:
    try:
        return ["value", tagged(json.loads(call["function"]["arguments"]))]
    except ValueError:
        return ["text", call["function"]["arguments"]]


def tagged(value: Any) -> Any:
    """Python takes True for 1; JSON does not."""
    if isinstance(value, dict):
        return {name: tagged(item) for name, item in value.items()}
    if isinstance(value, list):
        return [tagged(item) for item in value]
    return [isinstance(value, bool), value]


def answered(messages: Sequence[dict[str, Any]], at: int) -> Any:
    """Which call a tool result answers: position, id that nobody has, or None."""
    call_id = messages[at].get("tool_call_id")
    for message in reversed(messages[:at]):
        if message.get("tool_calls"):
            ids = [call.get("id") for call in message["tool_calls"]]
            return ids.index(call_id) if call_id in ids else call_id
    return call_id


def tier_of(recorded: list[dict[str, Any]], sent: list[dict[str, Any]]) -> int | None:
    """0 exact, 1 semantic, 2 projection, None for another conversation."""
    worst = 0
    for at, (one, other) in enumerate(zip(recorded, sent, strict=True)):
        asked, answer = answered(recorded, at), answered(sent, at)
        if type(asked) is type(answer) and asked != answer:
            return None
        if json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True):
            continue
        thought, echoed = one.get("reasoning_content"), other.get("reasoning_content")
        if plainly(one) != plainly(other) or (echoed and echoed != thought):
            return None
        worst = max(worst, 1 if thought == echoed else 2)
    return worst


def other_ids(recorded: list[dict[str, Any]], sent: list[dict[str, Any]]) -> int:
    def ids(message: dict[str, Any]) -> list[Any]:
        return [call.get("id") or "" for call in message.get("tool_calls") or ()]

    return sum(ids(one) != ids(other) for one, other in zip(recorded, sent, strict=True))


def expected(told: list[Told], sent: list[dict[str, Any]], root: int) -> tuple[Told | None, int | None]:
    """The deepest recorded conversation that the request begins with, under the same root, and the tier."""
    best: tuple[Any, Told, int] | None = None
    for turn in told:
        depth = len(turn.conversation)
        if turn.root != root or depth > len(sent):
            continue
        tier = tier_of(turn.conversation, sent[:depth])
        if tier is not None:
            ids = other_ids(turn.conversation, sent[:depth])
            rank = (-depth, ids, tier, -(turn.delivered_at or 0), -turn.index)
            if best is None or rank < best[0]:
                best = (rank, turn, tier)
    return (None, None) if best is None else best[1:]


# ---- an agent that does anything ----


@dataclass
class Agent:
    """One session and what the agent may do to its histories; every draw is hypothesis's."""

    data: st.DataObject
    tree: TurnTree = field(default_factory=TurnTree)
    ways: KnownWays = field(default_factory=KnownWays)
    told: list[Told] = field(default_factory=list)
    clock: int = 0

    def one_of(self, *choices: Any) -> Any:
        return self.data.draw(st.sampled_from(choices))

    def step(self) -> None:
        """Ask once, or several times at once, from anywhere."""
        history = self.one_of([], *(turn.conversation for turn in self.told[-6:]))
        for change in self.data.draw(st.lists(st.sampled_from(CHANGES), max_size=3)):
            history = change(self, history)
        sent = [*history, self.one_of(QUESTION, {"role": "user", "content": "r"}, self.result(history))]
        root = self.one_of(0, 0, 0, *range(len(ROOTS)))
        parent, tier = expected(self.told, sent, root)
        places = [attach(self.tree, sent, ROOTS[root], self.ways) for _ in range(self.one_of(1, 1, 1, 3))]
        for place in places:
            self.check(place, parent, tier, sent)
        for place in places:
            self.answer(place, sent, root)

    def check(self, place: Place, parent: Told | None, tier: int | None, sent: list[Any]) -> None:
        if parent is None:
            assert (place.parent, place.num_matched, place.tier) == (None, 0, MatchTier.NONE)
            assert (place.reason is SegmentReason.FIRST) == (not self.told)
            assert place.reason is not None
            return
        assert place.parent is not None
        assert place.parent.record.index == parent.index
        assert place.num_matched == len(parent.conversation)
        assert place.tier is list(MatchTier)[tier if tier is not None else 3]
        assert place.reason is None
        shown = restore_reasoning(place, sent)
        thoughts = [message.get("reasoning_content") for message in parent.conversation]
        assert [message.get("reasoning_content") for message in shown[: place.num_matched]] == thoughts
        assert list(shown[place.num_matched :]) == sent[place.num_matched :]

    def answer(self, place: Place, sent: list[Any], root: int) -> None:
        number = len(self.told)
        reply = self.one_of(
            assistant("a"),
            assistant("b", reasoning_content="r"),
            assistant("a", reasoning_content="s"),
            calling(f"id-{number}", f"other-{number}", arguments='{"a": 1, "b": [1.0, true]}', reasoning_content="r"),
            calling(f"id-{number}", arguments="not json"),
        )
        turn = add(self.tree, place, sent, ROOTS[root], reply)
        known = [] if place.parent is None else self.told[place.parent.record.index].conversation
        tokens = [] if place.parent is None else place.parent.token_ids().tolist()
        assert self.tree[turn.turn_id].token_ids().tolist() == [*tokens, number, number, 100 + number]
        conversation = [*known, *sent[len(known) :], reply]
        assert self.tree[turn.turn_id].messages() == conversation
        self.clock += 1
        delivered_at = self.one_of(None, float(self.clock))
        if delivered_at is not None:
            self.tree.mark_delivered(turn.turn_id, delivered_at)
        self.told.append(Told(number, conversation, root, delivered_at))

    def result(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [call.get("id") for message in history for call in message.get("tool_calls") or ()]
        call_id = self.one_of(*ids[-2:], "nobody", None)
        return {"role": "tool", "content": "1"} | ({} if call_id is None else {"tool_call_id": call_id})

    def drop_reasoning(self, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: value for name, value in m.items() if name != "reasoning_content"} for m in history]

    def respell(self, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [respelled(message) if message["role"] == "assistant" else message for message in history]

    def rename_ids(self, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        text = json.dumps(history)
        return list(json.loads(text.replace('"id": "', '"id": "x').replace('_call_id": "', '_call_id": "x')))

    def drop_ids(self, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        def bare(call: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in call.items() if name != "id"}

        return [m | {"tool_calls": [*map(bare, m["tool_calls"])]} if m.get("tool_calls") else m for m in history]

    def edit(self, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        at = self.data.draw(st.integers(0, max(len(history) - 1, 0)))
        return [m | {"content": "edited"} if i == at else m for i, m in enumerate(history)]

    def insert(self, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        at = self.data.draw(st.integers(0, len(history)))
        return [*history[:at], assistant("mine"), *history[at:]]

    def cut(self, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        start = self.data.draw(st.integers(0, len(history)))
        return [*history[:start], *history[self.data.draw(st.integers(start, len(history))) :]]


CHANGES = [Agent.drop_reasoning, Agent.respell, Agent.rename_ids, Agent.drop_ids, Agent.edit, Agent.insert, Agent.cut]


def respelled(message: dict[str, Any]) -> dict[str, Any]:
    """How clients write one assistant message."""
    content = message["content"]
    sent = message | {"content": [{"type": "text", "text": content}] if content else "", "refusal": None}
    calls = [
        call | {"function": call["function"] | {"arguments": call["function"]["arguments"].replace(", ", " ,\n")}}
        for call in message.get("tool_calls", ())
    ]
    return sent | {"tool_calls": calls}


@settings(max_examples=100)
@given(st.data(), st.integers(1, 12))
def test_deepest_turn_whose_conversation_the_request_begins_with_is_found(data: st.DataObject, num_steps: int) -> None:
    """I6: always a place. I3: no recorded turn is skipped. I1: none is claimed that says something else."""
    agent = Agent(data)
    for _ in range(num_steps):
        agent.step()
    rebuilt = TurnTree(agent.tree.records)
    for turn in agent.told:
        if turn.delivered_at is not None:
            rebuilt.mark_delivered(f"turn-{turn.index}", turn.delivered_at)
    for turn in agent.told:
        assert attach(rebuilt, [*turn.conversation, QUESTION], ROOTS[turn.root]).num_matched == len(turn.conversation)
        for sent in (turn.conversation, agent.drop_reasoning(turn.conversation), agent.rename_ids(turn.conversation)):
            live, again = (attach(tree, [*sent, QUESTION], ROOTS[turn.root]) for tree in (agent.tree, rebuilt))
            places = [(place.parent.record.index if place.parent else None, place.tier) for place in (live, again)]
            assert places[0] == places[1]


# ---- between equals ----


def siblings(replies: Sequence[dict[str, Any]]) -> TurnTree:
    tree = TurnTree()
    for index, reply in enumerate(replies):
        tree.add(record(index, FIRST, ROOTS[0], [QUESTION], reply))
    return tree


def continued(tree: TurnTree, *messages: Any) -> int:
    place = attach(tree, [QUESTION, *messages, QUESTION], ROOTS[0])
    assert place.parent is not None
    return place.parent.record.index


def test_between_equal_siblings_the_latest_delivered_one_is_continued() -> None:
    """I3: of eight samples the agent goes on with one that it has seen."""
    tree = siblings([assistant("same")] * 8)
    tree.mark_delivered("turn-3", 6.0)
    tree.mark_delivered("turn-5", 5.0)
    assert continued(tree, assistant("same")) == 3


def test_among_eight_siblings_the_text_decides() -> None:
    """I1."""
    tree = siblings([assistant(f"text {i}") for i in range(8)])
    assert [continued(tree, assistant(f"text {i}")) for i in range(8)] == list(range(8))


@pytest.mark.parametrize("spelling", [{}, {"refusal": None}, {"content": ""}])
def test_among_eight_siblings_the_tool_call_ids_decide(spelling: dict[str, Any]) -> None:
    """I1: also where another one was delivered later."""
    tree = siblings([calling(f"id-{i}") for i in range(8)])
    tree.mark_delivered("turn-7", 5.0)
    for index in range(8):
        result = {"role": "tool", "tool_call_id": f"id-{index}", "content": "1"}
        assert continued(tree, calling(f"id-{index}") | spelling, result) == index


def test_replays_that_dropped_the_ids_continue_the_latest_delivered_sibling() -> None:
    tree = siblings([calling(f"id-{i}") for i in range(8)])
    tree.mark_delivered("turn-2", 5.0)
    bare = calling("x")
    del bare["tool_calls"][0]["id"]
    assert continued(tree, bare, {"role": "tool", "content": "1"}) == 2
    assert continued(tree, calling("renamed"), {"role": "tool", "tool_call_id": "renamed", "content": "1"}) == 2


def test_tool_call_ids_of_earlier_turns_decide_between_branches_with_equal_ends() -> None:
    """I1: eight branches, each continued with the same words, told apart by what their first turns were called."""
    tree = siblings([calling(f"id-{i}", reasoning_content="r") for i in range(8)])
    result = {"role": "tool", "content": "1"}
    for index in range(8):
        place = attach(tree, [QUESTION, calling(f"id-{index}"), result], ROOTS[0])
        assert place.tier is MatchTier.PROJECTION
        add(tree, place, [QUESTION, calling(f"id-{index}"), result], ROOTS[0], assistant("same", reasoning_content="r"))
    tree.mark_delivered("turn-15", 5.0)
    for index in range(8):
        assert continued(tree, calling(f"id-{index}"), result, assistant("same")) == 8 + index


def test_siblings_whose_reasoning_differs_are_told_apart_where_it_is_echoed() -> None:
    """I1."""
    tree = siblings([assistant("same", reasoning_content=f"r{i}") for i in range(8)])
    tree.mark_delivered("turn-6", 5.0)
    assert [continued(tree, assistant("same", reasoning=f"r{i}")) for i in range(8)] == list(range(8))
    assert continued(tree, assistant("same")) == 6


def test_a_turn_without_sampled_tokens_is_not_continued() -> None:
    """I1: there is nothing to extend."""
    tree = siblings([assistant("same")])
    empty = TurnTree()
    (turn,) = tree.records
    bare = {"output_token_ids": np.zeros(0, np.int32), "output_logprobs": np.zeros(0, np.float32), "version_spans": ()}
    empty.add(TurnRecord(**{name: getattr(turn, name) for name in TurnRecord.__slots__} | bare))
    assert attach(empty, [QUESTION, assistant("same")], ROOTS[0]).reason is SegmentReason.NO_MATCH


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        (2, SegmentReason.TOOLS_CHANGED),
        (3, SegmentReason.TOOLS_CHANGED),
        (0, SegmentReason.TOOLS_CHANGED),
        (4, SegmentReason.TEMPLATE_ARGUMENTS_CHANGED),
    ],
)
def test_another_root_says_why_and_what_it_follows(root: int, reason: SegmentReason) -> None:
    """I6: tools, their order or template arguments changed in the middle; a way back finds the old segment."""
    tree = TurnTree()
    first = add(tree, attach(tree, [QUESTION], ROOTS[1]), [QUESTION], ROOTS[1], assistant("a"))
    sent = [QUESTION, assistant("a"), QUESTION]
    place = attach(tree, sent, ROOTS[root])
    assert (place.parent, place.reason) == (None, reason)
    assert place.follows is tree[first.turn_id]
    second = add(tree, place, sent, ROOTS[root], assistant("b"))
    back = attach(tree, [*sent, assistant("b"), QUESTION], ROOTS[1])
    assert (back.parent, back.num_matched) == (tree[first.turn_id], 2)
    assert back.follows is tree[second.turn_id]


def test_a_request_that_begins_with_the_same_objects_is_compared_from_where_the_last_one_matched() -> None:
    """The whole way is walked once; a turn that was added beside it has it walked again."""
    tree, ways, history = TurnTree(), KnownWays(), [QUESTION]
    for index in range(8):
        place = attach(tree, history, ROOTS[0], ways)
        assert place.num_matched == 2 * index
        add(tree, place, history, ROOTS[0], assistant(f"a{index}"))
        history = [*history, assistant(f"a{index}"), {"role": "user", "content": f"q{index}"}]
    way = ways.find(tree, history)
    assert way is not None
    assert way.step.num_messages == 14
    assert ways.find(tree, json.loads(json.dumps(history))) is None
    add(tree, attach(tree, history[:3], ROOTS[0]), history[:3], ROOTS[0], assistant("a1"))
    assert ways.find(tree, history) is None
    assert attach(tree, history, ROOTS[0], ways).num_matched == 16


# ---- cost ----


def long_session(num_turns: int, num_bytes: int) -> tuple[TurnTree, list[dict[str, Any]]]:
    tree, history = TurnTree(), []
    for index in range(num_turns):
        history.append({"role": "user", "content": f"{index} " + "q" * num_bytes})
        reply = calling(f"id-{index}", arguments=json.dumps({"n": index}), reasoning_content=f"r{index}")
        reply["content"] = "a" * num_bytes
        add(tree, attach(tree, history, ROOTS[0]), history, ROOTS[0], reply)
        history = [*history, reply]
    return tree, history


def edited_reasoning(history: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for at, message in enumerate(history):
        yield message | {"reasoning_content": "edited"} if at == 1 else message


def test_the_cost_of_attaching_grows_with_the_bytes_of_the_request() -> None:
    """Twice the turns, about twice the steps, also where an early edit leaves every later turn a candidate."""

    def num_steps(num_turns: int) -> int:
        tree, history = long_session(num_turns, 200)
        requests = [[*history, QUESTION], [*edited_reasoning(history), QUESTION]]
        steps = 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal steps
            steps += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            places = [attach(tree, sent, ROOTS[0]) for sent in requests]
        finally:
            sys.setprofile(None)
        assert [place.num_matched for place in places] == [2 * num_turns, 0]
        return steps

    assert num_steps(200) < 2.2 * num_steps(100)
