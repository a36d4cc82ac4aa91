"""Harbor 0.25 as it is: what its chat layer collects is what the ledger holds, and terminus-2's histories are survived.

Skipped, and saying so, only where there is no Python 3.12 or newer.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engines.scripted import scripted_experts
from tests.clients.fleet import Task
from tests.clients.proof import ROUTING, Witnesses, paths_of, prove
from tests.clients.script import FLOODING, NUM_TURNS, PRINTING, RAMBLING, TALK, TERMINAL

SAID = ["One.", "Two.", "Three.", "Four.", "Five."]


def check_details_are_the_record(
    detail: dict[str, Any], witnesses: Witnesses, session_id: str, turns: list[int]
) -> None:
    """One trajectory of `rollout_details` against the turns of those indices: ids, log-probs and routing rows."""
    stored = witnesses.stored_turns(session_id)
    paths = paths_of(stored)
    chosen = [stored[i] for i in turns]
    assert detail["prompt_token_ids"] == [paths[turn.turn_id][0].tolist() for turn in chosen]
    assert detail["completion_token_ids"] == [turn.output_token_ids.tolist() for turn in chosen]
    for told, turn in zip(detail["logprobs"], chosen, strict=True):
        assert np.array_equal(np.array(told, np.float32), turn.output_logprobs)
    for told, turn in zip(detail["extra"]["routed_experts"], chosen, strict=True):
        token_ids = np.concatenate(paths[turn.turn_id])
        assert np.array_equal(rows(told), scripted_experts(token_ids[:-1], ROUTING, start=told["start"]))
        assert told["start"] <= max(0, len(token_ids) - len(turn.output_token_ids) - len(turn.prompt_token_ids))


def rows(body: dict[str, Any]) -> npt.NDArray[Any]:
    """Routing rows as a reply spells them."""
    return np.frombuffer(base64.b64decode(body["data"]), body["dtype"]).reshape(body["shape"])


CHATS = [Task("harbor_chat", mode, TALK, "harbor", num_turns=NUM_TURNS) for mode in ("openai", "hosted_vllm")]


@pytest.mark.parametrize("task", CHATS, ids=lambda task: task.name)
def test_rollout_details_are_what_the_ledger_holds(task: Task, outcome: dict[str, Any], witnesses: Witnesses) -> None:
    """I1, I2, I3: prompt ids, completion ids, log-probs and experts of all turns, equally long, token for token."""
    assert outcome["saw"]["said"] == SAID
    [detail] = outcome["saw"]["rollout_details"]
    prove(witnesses, task.name, num_turns=NUM_TURNS)
    check_details_are_the_record(detail, witnesses, task.name, list(range(NUM_TURNS)))


RESPONSES = [Task("harbor_chat", "responses", TALK, "harbor", num_turns=NUM_TURNS)]


@pytest.mark.parametrize("task", RESPONSES, ids=lambda task: task.name)
def test_harbor_goes_on_by_response_id_in_one_segment(
    task: Task, outcome: dict[str, Any], witnesses: Witnesses
) -> None:
    """I1, I2, I3, where Harbor sends only what is new."""
    assert outcome["saw"]["said"] == SAID
    prove(witnesses, task.name, num_turns=NUM_TURNS)


OVERFLOWS = [
    Task("harbor_chat", mode, TALK, "harbor", about="overflow", options={"max_tokens": 100_000})
    for mode in ("openai", "hosted_vllm")
]


@pytest.mark.parametrize("task", OVERFLOWS, ids=lambda task: task.name)
def test_context_overflow_is_harbors_own_error(task: Task, outcome: dict[str, Any], witnesses: Witnesses) -> None:
    assert outcome["raised"][0] == "harbor.ContextLengthExceededError"
    assert witnesses.stored_turns(task.name) == []


LINEAR = [Task("harbor_terminus", mode, TERMINAL, "harbor") for mode in ("linear", "interleaved")]


@pytest.mark.parametrize("task", LINEAR, ids=lambda task: task.name)
def test_terminus_2_solves_its_task_in_one_segment(task: Task, outcome: dict[str, Any], witnesses: Witnesses) -> None:
    """I1, I2, I3, whether its history drops the reasoning or not."""
    [detail] = outcome["saw"]["rollout_details"]
    prove(witnesses, task.name, num_turns=NUM_TURNS)
    check_details_are_the_record(detail, witnesses, task.name, list(range(NUM_TURNS)))


HANDOFF = [Task("harbor_terminus", "handoff", PRINTING, "harbor")]


@pytest.mark.parametrize("task", HANDOFF, ids=lambda task: task.name)
def test_terminus_2_hands_off_and_every_call_of_it_is_recorded(
    task: Task, outcome: dict[str, Any], witnesses: Witnesses
) -> None:
    """I3, I6: work, summary and answers are one segment; the questions begin anew, and so does the work after them."""
    assert outcome["saw"]["metadata"]["summarization_count"] == 1
    prove(witnesses, task.name, num_turns=9, num_segments=3)
    main, summary, questions, answers = outcome["saw"]["rollout_details"]
    for detail, turns in ((main, [0, 1, 2, 6, 7, 8]), (summary, [3]), (questions, [4]), (answers, [5])):
        check_details_are_the_record(detail, witnesses, task.name, turns)


FLOOD = [Task("harbor_terminus", "overflow", FLOODING, "harbor")]


@pytest.mark.parametrize("task", FLOOD, ids=lambda task: task.name)
def test_terminus_2_unwinds_its_history_when_the_context_is_full(
    task: Task, outcome: dict[str, Any], witnesses: Witnesses
) -> None:
    """I3, I6: the summary grows from an earlier turn than the last, and the turn that was dropped still trains."""
    assert outcome["saw"]["metadata"]["summarization_count"] == 1
    told = prove(witnesses, task.name, num_turns=8, num_segments=4)
    assert told[2]["attachment"]["parent_id"] == told[1]["attachment"]["parent_id"] == told[0]["turn_id"]


RAMBLE = [Task("harbor_terminus", "linear", RAMBLING, "harbor", about="ramble", options={"max_tokens": 150})]


@pytest.mark.parametrize("task", RAMBLE, ids=lambda task: task.name)
def test_terminus_2_goes_on_from_a_reply_that_was_cut(
    task: Task, outcome: dict[str, Any], witnesses: Witnesses
) -> None:
    """I3: Harbor's details leave the reply out that was cut; the ledger has it, and trains it in the one segment."""
    [detail] = outcome["saw"]["rollout_details"]
    told = prove(witnesses, task.name, num_turns=3)
    assert [turn["finish"]["reason"] for turn in told] == ["length", "stop", "stop"]
    check_details_are_the_record(detail, witnesses, task.name, [1, 2])
