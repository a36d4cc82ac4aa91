"""The likeliest tokens of a turn that took several engine requests: each row stays with its token."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.connection import serialised
from engines.scripted import ScriptedEngine, ScriptedReply, scripted_top_logprobs
from gateway.contracts.errors import EngineProtocolError, EngineUnavailable
from gateway.contracts.examples import example_turn
from gateway.contracts.generation import (
    Finish,
    FinishReason,
    GenerateChunk,
    GenerateEnd,
    GenerateRequest,
    SamplingParams,
    TopLogprob,
    WrittenIds,
)
from gateway.contracts.records import recorded_top_logprobs
from gateway.replicas.continuation import Continuation, Generated

OUTPUT = tuple(range(30, 50))


def request(*, num_top_logprobs: int) -> GenerateRequest:
    sampling = SamplingParams(max_new_tokens=len(OUTPUT))
    prompt = np.array([1, 2], dtype=np.int32)
    return GenerateRequest(
        "", prompt, sampling, num_top_logprobs=num_top_logprobs, written=WrittenIds(prompt, b"[1,2]")
    )


async def generated(number: int, attempts: list[tuple[int, int, bool]]) -> Generated:
    """Attempts as (tokens until it breaks, tokens a chunk, whether its engine gives likeliest tokens)."""
    progress = Continuation(request(num_top_logprobs=number))
    for i, (length, chunk_size, gives) in enumerate([*attempts, (len(OUTPUT), 3, True)]):
        left = OUTPUT[progress.num_tokens :]
        engine = ScriptedEngine(
            [ScriptedReply(left, chunk_size=chunk_size, fail_after=length)] if left else [], engine_id=f"e{i}"
        )
        if not left:
            break
        try:
            asked = progress.next_request(await engine.identity())
            # I1: the prompt's JSON serves for no attempt that has more than the prompt.
            assert json.loads(serialised({"ids": asked.sent_ids})) == {"ids": asked.token_ids.tolist()}
            async for item in engine.generate(asked):
                if isinstance(item, GenerateEnd):
                    progress.end(item)
                else:
                    progress.add_chunk(item if gives else dataclasses.replace(item, top_logprobs=()))
        except EngineUnavailable:
            progress.lose(0, certain=True)
    return progress.generated(Finish(FinishReason.STOP))


@given(
    number=st.integers(0, 4),
    attempts=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 5), st.booleans()), max_size=4),
)
async def test_rows_stay_with_their_tokens_over_any_number_of_attempts(
    number: int, attempts: list[tuple[int, int, bool]]
) -> None:
    """I2, I3, I9: one row a token, none moved; () where an engine gave none, nothing where none were asked for."""
    whole = await generated(number, attempts)
    assert whole.token_ids.tolist() == list(OUTPUT)
    if not number:
        assert whole.top_logprobs == ()
        return
    expected = scripted_top_logprobs(whole.token_ids, whole.logprobs, number=number)
    assert len(whole.top_logprobs) == len(OUTPUT)
    assert all(row in ((), want) for row, want in zip(whole.top_logprobs, expected, strict=True))
    if all(gives for _, _, gives in attempts):
        assert whole.top_logprobs == expected


async def test_rows_that_are_not_one_a_token_are_a_protocol_error() -> None:
    """I2."""
    progress = Continuation(request(num_top_logprobs=1))
    progress.next_request(await ScriptedEngine([]).identity())
    two = GenerateChunk(np.array([5, 6], dtype=np.int32), np.zeros(2, dtype=np.float32), [[TopLogprob(5, 0.0)]])
    with pytest.raises(EngineProtocolError, match="2 tokens with 1 rows"):
        progress.add_chunk(two)


@given(st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(-50, 0)), max_size=5), max_size=5))
def test_a_record_gives_back_what_was_put_in(rows: list[list[tuple[int, float]]]) -> None:
    """A reply can be given again from it; a turn that was asked for none has none."""
    tops = [tuple(TopLogprob(*entry) for entry in row) for row in rows]
    turn = example_turn()
    kept = dataclasses.replace(turn, meta={**turn.meta, "top_logprobs": recorded_top_logprobs(tops)})
    assert kept.top_logprobs == tops
    assert turn.top_logprobs == []
