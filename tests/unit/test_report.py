"""A session's report: where two prompts differ, what re-tokenising would have broken, and its counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.contracts.errors import TemplateRaised
from gateway.contracts.examples import example_turn
from gateway.contracts.generation import JsonValue, TokenIds
from gateway.contracts.records import Attachment, MatchTier, RootContext, SegmentReason, SessionOrigin, TurnRecord
from gateway.contracts.versions import VersionSpan
from gateway.sessions.model import ServedModel
from gateway.sessions.picks import AllTurns, FinalPath
from gateway.sessions.registry import new_session
from gateway.sessions.report import Change, DriftReport, Retokenisation, changed_spans, measure_drift, session_report
from gateway.tito.conversation import Conversation, HistoryPolicy

USER, CALL, END = 1, 2, 3
CONTROL = frozenset((USER, CALL, END))


def ids(*numbers: int) -> TokenIds:
    return np.array(numbers, dtype=np.int32)


@pytest.mark.parametrize(
    ("recorded", "other", "changes"),
    [
        ((1, 10, 3, 2, 11, 3), (1, 10, 3, 2, 11, 3), []),
        ((1, 10, 3, 2, 11, 12, 13, 3), (1, 10, 3, 2, 11, 99, 13, 3), [(5, 6)]),
        ((1, 10, 3, 2, 11, 12, 13, 3), (1, 10, 3, 2, 11, 90, 91, 92, 13, 3), [(5, 6)]),
        ((1, 10, 3, 2, 11, 12, 13, 3), (1, 10, 3, 2, 11, 13, 3), [(5, 6)]),
        ((1, 10, 3, 2, 11, 13, 3), (1, 10, 3, 2, 11, 12, 13, 3), [(5, 5)]),
        ((1, 10, 3, 2, 11, 3, 1, 12, 3), (1, 10, 3, 1, 12, 3), [(3, 6)]),
        ((1, 10, 3, 1, 12, 3), (1, 10, 3, 2, 11, 3, 1, 12, 3), [(3, 3)]),
        ((1, 10, 3, 2, 11, 3), (1, 10, 3, 2, 11, 3, 9), [(6, 6)]),
        ((1, 10, 3, 2, 11, 3), (), [(0, 6)]),
        ((1, 50, 51, 3, 2, 60, 61, 3, 1, 70, 3), (1, 50, 90, 3, 2, 91, 61, 3, 1, 70, 3), [(2, 3), (5, 6)]),
        ((5, 5, 5), (5, 5), [(2, 3)]),
    ],
)
def test_changes_are_narrowed_to_the_tokens_that_differ(
    recorded: tuple[int, ...], other: tuple[int, ...], changes: list[tuple[int, int]]
) -> None:
    """I1: known answers; 1, 2 and 3 are control tokens."""
    assert changed_spans(ids(*recorded), ids(*other), CONTROL) == [Change(*change) for change in changes]


tokens = st.lists(st.sampled_from([1, 2, 3, 10, 11, 12]), max_size=14).map(lambda values: ids(*values))


@given(tokens, tokens)
def test_tokens_outside_the_changes_stand_in_both_prompts_in_order(recorded: TokenIds, other: TokenIds) -> None:
    """I1: nothing that differs is taken for equal."""
    changes = changed_spans(recorded, other, CONTROL)
    kept = np.ones(len(recorded), dtype=np.bool_)
    for change in changes:
        assert 0 <= change.start <= change.stop <= len(recorded)
        kept[change.start : change.stop] = False
    rest = iter(other.tolist())
    assert all(token in rest for token in recorded[kept].tolist()), "a common subsequence"
    assert bool(changes) == (recorded.tolist() != other.tolist())


def a_turn(
    index: int, *, prompt: tuple[int, ...], output: tuple[int, ...], parent: int | None = None, **changes: Any
) -> TurnRecord:
    """A turn whose added message and reply name their own tokens."""
    record = example_turn(
        index,
        attachment=Attachment(
            None if parent is None else f"t{parent}",
            None if parent is None else f"t{parent}",
            MatchTier.NONE if parent is None else MatchTier.EXACT,
            SegmentReason.FIRST if parent is None else None,
        ),
        root=RootContext((), {}) if parent is None else None,
        added_messages=({"role": "user", "content": list(prompt)},),
        reply={"role": "assistant", "content": list(output)},
        prompt_token_ids=ids(*prompt),
        output_token_ids=ids(*output),
        output_logprobs=np.full(len(output), -1.0, dtype=np.float32),
        version_spans=(VersionSpan(0, len(output), 0),),
        meta={"certified_by": "probe", "flags": []},
        delivered_at=1.0,
    )
    return replace(record, **changes)


def respelling(spelling: Mapping[int, tuple[int, ...]]) -> Retokenisation:
    """Renders the tokens that messages name, with some spelt otherwise; refuses token 666 as a template would."""

    def render(conversation: Conversation) -> TokenIds:
        named = [token for message in conversation.messages for token in message["content"]]
        if 666 in named:
            raise TemplateRaised("no such token here")
        return ids(*(token for name in named for token in spelling.get(name, (name,))))

    return Retokenisation(render, CONTROL)


TWO_LEAVES = [
    a_turn(0, prompt=(1, 10, 3, 2), output=(20, 21, 3)),
    a_turn(1, prompt=(1, 11, 3, 2), output=(22, 23, 24, 3), parent=0),
    a_turn(2, prompt=(1, 12, 3, 2), output=(25, 3), parent=1),
    a_turn(3, prompt=(1, 13, 3, 2), output=(21, 3), parent=1),
    a_turn(4, prompt=(1, 14, 3, 2), output=(21, 3)),
]
"""t0 ─ t1 ─ t2, t1 ─ t3 and a root of its own, t4: what t2, t3 and t4 sampled is in no later prompt."""


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ({}, DriftReport(3, 0, 0, 7, 0)),
        ({21: (90, 91)}, DriftReport(3, 3, 0, 7, 1)),
        ({23: (90,), 24: (91,)}, DriftReport(3, 2, 0, 7, 2)),
        ({22: (), 24: ()}, DriftReport(3, 2, 0, 7, 3)),
        ({25: (90,), 14: (91,)}, DriftReport(3, 0, 0, 7, 0)),
        ({11: (90,)}, DriftReport(3, 3, 0, 7, 0)),
        ({13: (90, 91)}, DriftReport(3, 1, 0, 7, 0)),
    ],
)
def test_each_sampled_token_that_would_drift_is_counted_once(
    spelling: dict[int, tuple[int, ...]], expected: DriftReport
) -> None:
    """I1, I3: a prefix that two leaves share is judged in one of them; what no later prompt holds is not judged."""
    assert measure_drift(TWO_LEAVES, respelling(spelling)) == expected


def test_where_the_template_refuses_a_leaf_the_turn_before_it_is_judged() -> None:
    """I6: a refusal is a figure of the report, not an error."""
    turns = [*TWO_LEAVES[:2], a_turn(2, prompt=(1, 666, 3, 2), output=(25, 3), parent=1)]
    assert measure_drift(turns, respelling({21: (90,)})) == DriftReport(2, 1, 1, 3, 1)
    alone = [TWO_LEAVES[0], a_turn(1, prompt=(666,), output=(3,), parent=0)]
    assert measure_drift(alone, respelling({})) == DriftReport(1, 0, 1, 0, 0)


def test_every_leaf_is_rendered_once_and_not_every_turn() -> None:
    """The cost is that of each segment's final text."""
    rendered: list[int] = []
    retokenisation = respelling({})

    def render(conversation: Conversation) -> TokenIds:
        rendered.append(len(conversation.messages))
        return retokenisation.render(conversation)

    chain = [a_turn(0, prompt=(1, 2), output=(3,))]
    chain += [a_turn(i, prompt=(1, 2), output=(20, 3), parent=i - 1) for i in range(1, 30)]
    assert measure_drift(chain, Retokenisation(render, CONTROL)).num_extending_turns == 29
    assert rendered == [59]


def test_a_shared_prefix_is_judged_in_the_longest_conversation_that_holds_it() -> None:
    """I1: templates rewrite the past as a conversation goes on (old reasoning, say); the last word counts."""
    longer = replace(TWO_LEAVES[3], prompt_token_ids=ids(1, 13, 13, 3, 2))
    turns = [*TWO_LEAVES[:3], longer]

    def render(conversation: Conversation) -> TokenIds:
        is_longer = [1, 13, 3, 2] in [message["content"] for message in conversation.messages]
        return respelling({21: (90,), 13: (13, 13)} if is_longer else {}).render(conversation)

    assert measure_drift(turns, Retokenisation(render, CONTROL)) == DriftReport(3, 2, 0, 7, 1)


def test_a_conversation_that_two_refused_leaves_share_is_rendered_once() -> None:
    rendered: list[int] = []
    retokenisation = respelling({})

    def render(conversation: Conversation) -> TokenIds:
        rendered.append(len(conversation.messages))
        return retokenisation.render(conversation)

    refused = [a_turn(i, prompt=(1, 666, 3, 2), output=(3,), parent=1) for i in (2, 3)]
    drift = measure_drift([*TWO_LEAVES[:2], *refused], Retokenisation(render, CONTROL))
    assert drift == DriftReport(3, 0, 2, 3, 0)
    assert rendered == [5, 3, 5]


def test_the_report_counts_forks_reasons_flags_and_messages_that_were_hidden() -> None:
    """I6: whatever the agent did, it is told by cause; a message hidden from several turns counts once."""
    meta: dict[str, JsonValue] = {"certified_by": "full_render", "flags": ["malformed_tool_call"]}
    turns = [
        replace(TWO_LEAVES[0], meta={**meta, "hidden_messages": [0]}),
        TWO_LEAVES[1],
        replace(TWO_LEAVES[2], meta={"hidden_messages": [0, 4]}, delivered_at=None),
        replace(TWO_LEAVES[3], delivered_at=None),
        replace(TWO_LEAVES[4], delivered_at=0.5),
    ]
    report = session_report(
        new_session("s", key_hash="", origin=SessionOrigin.CREATED), turns, FinalPath(), respelling({})
    )
    assert asdict(report) == {
        "session_id": "s",
        "origin": "created",
        "complete": True,
        "gaps": (),
        "num_turns": 5,
        "num_roots": 2,
        "num_forks": 1,
        "num_segments": 1,
        "tiers": {"exact": 3, "none": 2},
        "segment_reasons": {"first": 2},
        "certified_by": {"full_render": 1, "probe": 3, "unknown": 1},
        "flags": {"malformed_tool_call": 1},
        "num_hidden_messages": 2,
        "pick": {
            "pick": "final-path",
            "num_sampled_tokens": 13,
            "num_trained_tokens": 7,
            "left_out": (
                {"reason": "not_on_final_path", "num_turns": 1, "num_tokens": 2},
                {"reason": "undelivered", "num_turns": 2, "num_tokens": 4},
            ),
        },
        "drift": asdict(DriftReport(3, 0, 0, 7, 0)),
    }
    assert (
        session_report(new_session("s", key_hash="", origin=SessionOrigin.CREATED), [], AllTurns(), None).drift is None
    )
    assert json.dumps(asdict(report))


def test_a_real_tokenizer_shows_the_tokens_that_the_model_spelt_otherwise(tiny_model: Path) -> None:
    """I1: sampled tokens need not be those that the tokenizer would choose; the very text round-trips."""
    model = ServedModel.load(tiny_model, history_policy=HistoryPolicy.KEEP)
    question, more = {"role": "user", "content": "What is 48/2?"}, {"role": "user", "content": "And 48+24?"}
    first = model.prompts.build(Conversation((question,)), None).token_ids
    natural = model.tokenizer.encode("The answer is 24.")
    letters = np.concatenate([model.tokenizer.encode(letter) for letter in "The answer is 24."])
    same_end = next(i for i in range(len(natural)) if natural[-1 - i] != letters[-1 - i])  # "24." is spelt as digits
    assert natural[0] != letters[0]
    stop = model.tokenizer.eos_token_ids[0]
    reply = {"role": "assistant", "content": "The answer is 24."}
    for spelt, num_wrong in ((natural, 0), (letters, len(letters) - same_end)):
        output = np.append(spelt, np.int32(stop))
        whole = model.prompts.build(Conversation((question, reply, more)), None).token_ids
        added = whole[len(first) + len(natural) + 1 :]
        turns = [
            a_turn(0, prompt=tuple(first), output=tuple(output), added_messages=(question,), reply=reply),
            a_turn(1, prompt=tuple(added), output=(stop,), parent=0, added_messages=(more,), reply=reply),
        ]
        drift = measure_drift(turns, Retokenisation.of_model(model))
        assert drift == DriftReport(1, int(num_wrong > 0), 0, len(output), num_wrong)
