"""Picks by name, and the operator's own: which are found, what they may return, what their errors say."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gateway.contracts.errors import ConfigurationError, InvalidRequest
from gateway.contracts.examples import example_turn
from gateway.contracts.records import Attachment, MatchTier, RootContext, SegmentReason, TurnRecord
from gateway.contracts.rollouts import LeftOut, PickReport
from gateway.contracts.versions import VersionSpan
from gateway.sessions.picks import BUILT_IN, AllTurns, DeliveredTurns, FinalPath, OperatorPick, PickChoice, pick_turns


def a_turn(index: int, *, parent: str | None = None, follows: str | None = None, **changes: Any) -> TurnRecord:
    """Two sampled tokens, delivered at time `index`."""
    record = example_turn(
        index,
        attachment=Attachment(
            parent, follows or parent, MatchTier.NONE, SegmentReason.NO_MATCH if parent is None else None
        ),
        root=RootContext((), {}) if parent is None else None,
        prompt_token_ids=np.array([1], dtype=np.int32),
        output_token_ids=np.array([2, 3], dtype=np.int32),
        output_logprobs=np.array([-1.0, -2.0], dtype=np.float32),
        version_spans=(VersionSpan(0, 2, 0),),
        delivered_at=float(index),
    )
    return replace(record, **changes)


SESSION = [
    a_turn(0),
    a_turn(1, parent="t0", delivered_at=None),  # a retry's first attempt: nobody saw it
    a_turn(2, parent="t0", delivered_at=None),  # its delivery was never noted, but t4 goes on from it
    a_turn(3),  # a sub-agent
    a_turn(4, follows="t2"),  # new tokens for the same conversation
    a_turn(5, parent="t4", output_logprobs=np.array([-1.0, np.nan], dtype=np.float32)),
    a_turn(6, parent="t4", delivered_at=None, untrainable_reason="policy_version_uncertain"),
]


@pytest.mark.parametrize(
    ("pick", "trained", "left_out"),
    [
        (AllTurns(), 11, {"no_logprob": (1, 1), "policy_version_uncertain": (1, 2)}),
        (DeliveredTurns(), 9, {"no_logprob": (1, 1), "policy_version_uncertain": (1, 2), "undelivered": (1, 2)}),
        (
            FinalPath(),
            7,
            {
                "no_logprob": (1, 1),
                "not_on_final_path": (1, 2),
                "policy_version_uncertain": (1, 2),
                "undelivered": (1, 2),
            },
        ),
        (
            OperatorPick("mine:first", lambda turns: [turns[0].turn_id]),
            2,
            {"no_logprob": (1, 1), "not_picked": (5, 9), "policy_version_uncertain": (1, 2)},
        ),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_each_pick_says_what_it_left_out_and_why(pick: Any, trained: int, left_out: dict[str, tuple[int, int]]) -> None:
    """I3, I9: 14 sampled tokens, each trained or left out for one reason; what cannot be proved no pick brings back."""
    report = pick_turns(SESSION, pick).report
    assert report == PickReport(pick.name, 14, trained, tuple(LeftOut(name, *both) for name, both in left_out.items()))


def test_the_final_path_follows_the_conversation_through_new_tokens() -> None:
    """I3: turns before a rewritten history caused the final answer too."""
    assert pick_turns(SESSION, FinalPath()).turn_ids == {"t0", "t2", "t4", "t5"}


def test_a_session_without_turns_has_an_empty_account_under_every_pick() -> None:
    def fails(turns: Sequence[TurnRecord]) -> list[str]:
        return [turns[-1].turn_id]

    for pick in (*BUILT_IN, OperatorPick("mine:fails", fails)):
        assert pick_turns([], pick).report == PickReport(pick.name, 0, 0, ())


WRONG_ANSWERS = [
    (lambda turns: ["t0", "nobody"], "returned 'nobody' for session s"),
    (lambda turns: "t0", "returned 't0' for session s"),
    (lambda turns: None, "returned None"),
    (lambda turns: [turns[0]], "returned TurnRecord"),
    (lambda turns: [["t0"]], "returned"),
    (lambda turns: turns[99], "failed: IndexError"),
    (lambda turns: (1 / 0 for _ in turns), "failed: ZeroDivisionError"),
]


@pytest.mark.parametrize(("choose", "says"), WRONG_ANSWERS)
def test_a_wrong_answer_of_the_operators_pick_is_one_clear_error(choose: Any, says: str) -> None:
    """I9: never a silent guess at what should train."""
    with pytest.raises(ConfigurationError, match=says) as raised:
        pick_turns(SESSION, OperatorPick("mine:wrong", choose))
    assert "mine:wrong" in raised.value.message
    assert "\n" not in raised.value.message


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A file of the operator on the import path."""
    (tmp_path / "operators_picks.py").write_text(
        "LIMIT = 3\n"
        "def newest(turns): return {turns[-1].turn_id}\n"
        "def nothing(): return []\n"
        "async def later(turns): return []\n"
    )
    (tmp_path / "broken_picks.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return ModuleType("operators_picks")


def test_the_operators_pick_is_loaded_once_and_chosen_by_name(own_module: ModuleType) -> None:
    """I3: it is the default then; the built-in ones stay choosable."""
    picks = PickChoice.load(f"{own_module.__name__}:newest")
    assert picks.names == ("all", "delivered", "final-path", "operators_picks:newest")
    assert picks.named(None).name == "operators_picks:newest"
    assert pick_turns(SESSION, picks.named("operators_picks:newest")).turn_ids == {"t6"}
    assert picks.named("all") == AllTurns()


def test_a_request_can_only_name_what_is_there(own_module: ModuleType) -> None:
    """I7: no text of a caller is imported."""
    for picks in (PickChoice.load(), PickChoice.load(f"{own_module.__name__}:newest")):
        for name in ("operators_picks:nothing", "os:getcwd", "", "ALL"):
            with pytest.raises(InvalidRequest, match="is none of all, delivered, final-path"):
                picks.named(name)
    assert PickChoice.load().default == DeliveredTurns()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("newest", "is none of all, delivered, final-path, and no module:function"),
        ("operators_picks:", "no module:function"),
        (":newest", "no module:function"),
        ("nowhere_picks:f", "nowhere_picks cannot be imported.*PYTHONPATH"),
        ("broken_picks:f", "cannot be imported: ZeroDivisionError"),
        ("operators_picks:oldest", "no plain function oldest"),
        ("operators_picks:LIMIT", "no plain function LIMIT"),
        ("operators_picks:nothing", "no plain function nothing of one argument"),
        ("operators_picks:later", "no plain function later"),
    ],
)
def test_a_pick_that_cannot_be_used_is_told_at_start_up(own_module: ModuleType, text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as raised:
        PickChoice.load(text)
    assert "\n" not in raised.value.message
