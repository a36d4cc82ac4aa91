"""Streaming and whole replies are one, under every split of the tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contracts.generation import Finish, FinishReason
from gateway.tito.conversation import ContentDelta, ParsedReply, ReasoningDelta, ReplyDelta, ToolCallDelta
from gateway.tito.parsing.choice import choose_parsing
from gateway.tito.parsing.marked import MarkedParsing
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_end|>", "<tool", "_call>", "</th"]
WORDS = ["\n", " ", "a", "Divide.", "é", "🙂", "##", "#"]
CALLS = [
    '{"name": "f", "arguments": {"x": "é🙂"}}',
    '{"name": "f", "arguments": {}}',
    '{"name":',
    '<tool_call>\n{"name": "g", "arguments": {"a": [1, 2.50]}}\n</tool_call>',
]
PIECES = st.sampled_from([*MARKERS, *WORDS, *CALLS])
FINISHES = st.sampled_from(
    [
        Finish(FinishReason.STOP),
        Finish(FinishReason.LENGTH),
        Finish(FinishReason.ABORT),
        Finish(FinishReason.STOP, "##"),
    ]
)


@pytest.fixture(scope="module", params=["marker tokens", "text markers"])
def parsing(request: pytest.FixtureRequest, tiny_model: Path) -> MarkedParsing:
    description = json.loads((tiny_model / "tokenizer.json").read_text())
    if request.param == "text markers":
        description["added_tokens"] = [token for token in description["added_tokens"] if token["special"]]
    return choose_parsing(ChatTemplate.load(tiny_model), ChatTokenizer(json.dumps(description).encode()))


def test_deltas_join_to_the_reply_and_no_split_changes_it(parsing: MarkedParsing) -> None:
    """Design: streamed and not streamed replies are the same message (I8)."""
    vocab_size = parsing.tokenizer.vocab_size

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(
        pieces=st.lists(PIECES, max_size=12),
        noise=st.lists(st.integers(0, vocab_size - 1), max_size=6),
        splits=st.lists(st.integers(1, 7), min_size=1, max_size=8),
        finish=FINISHES,
        tools=st.booleans(),
        reasoning_open=st.booleans(),
    )
    def check(
        pieces: list[str], noise: list[int], splits: list[int], finish: Finish, tools: bool, reasoning_open: bool
    ) -> None:
        ids = [*parsing.tokenizer.encode("".join(pieces)).tolist(), *noise]
        whole = read(parsing, ids, [len(ids) or 1], finish, tools=tools, reasoning_open=reasoning_open)
        cut = read(parsing, ids, splits, finish, tools=tools, reasoning_open=reasoning_open)
        assert cut == whole

    check()


def read(
    parsing: MarkedParsing, ids: list[int], splits: list[int], finish: Finish, *, tools: bool, reasoning_open: bool
) -> tuple[object, ...]:
    """The reply, call ids left out; asserts that its deltas join to it."""
    prompt = parsing.tokenizer.encode("<think>\n" if reasoning_open else "\n")
    parser = parsing.start(prompt_ids=prompt, tools=({},) if tools else (), stop=("##",))
    deltas: list[ReplyDelta] = []
    at = step = 0
    while at < len(ids):
        deltas += parser.feed(ids[at : at + splits[step % len(splits)]])
        at += splits[step % len(splits)]
        step += 1
    last, reply = parser.finish(finish)
    deltas += last
    assert joined(deltas) == (
        reply.content,
        reply.reasoning,
        [(c.call_id, c.name, c.arguments) for c in reply.tool_calls],
    )
    assert reply.num_reasoning_tokens <= len(ids)
    calls = [(call.name, call.arguments) for call in reply.tool_calls]
    return reply.content, reply.reasoning, calls, reply.flags, reply.num_reasoning_tokens


def joined(deltas: list[ReplyDelta]) -> tuple[str | None, str | None, list[tuple[str | None, str | None, str]]]:
    calls: list[tuple[str | None, str | None, str]] = []
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            assert delta.index == len(calls)
            calls.append((delta.call_id, delta.name, delta.arguments))
    content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    assert all(delta.text for delta in deltas if not isinstance(delta, ToolCallDelta))
    return content or None, reasoning or None, calls


def test_text_without_markup_is_the_decoded_text(parsing: MarkedParsing) -> None:
    """I9: whatever bytes are sampled, what is shown is what the tokenizer decodes."""
    added = set(parsing.tokenizer.added_tokens)
    ordinary = [token_id for token_id in range(parsing.tokenizer.vocab_size) if token_id not in added]

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(ids=st.lists(st.sampled_from(ordinary), max_size=30))
    def check(ids: list[int]) -> None:
        parser = parsing.start(prompt_ids=[], tools=())
        parser.feed(ids)
        reply: ParsedReply = parser.finish(Finish(FinishReason.LENGTH))[1]
        assert (reply.content or "") == parsing.tokenizer.decode(ids)

    check()
