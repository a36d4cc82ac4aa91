"""The sampler's distribution and its log-probs."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.embedded.sampler import NO_TOP_K, Draw, Sampled, SamplingSettings, sample
from gateway.contracts.generation import LogprobKind

torch.set_num_threads(1)

LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -3.0])
KIND = LogprobKind.TEMPERATURE_SCALED


def drawn(how: SamplingSettings, times: int, *, seed: int = 0) -> list[int]:
    draws = [Draw(how, random.Random(seed * 100_003 + i)) for i in range(times)]
    return sample(LOGITS.expand(times, -1), draws, kind=KIND).token_ids


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_scaled_distribution_says(temperature: float) -> None:
    tokens = drawn(SamplingSettings(temperature=temperature), 20_000)
    shares = np.bincount(tokens, minlength=6) / len(tokens)
    np.testing.assert_allclose(shares, torch.softmax(LOGITS / temperature, dim=-1).numpy(), atol=0.015)


@pytest.mark.parametrize(
    ("how", "allowed"),
    [
        (SamplingSettings(top_k=2), {0, 1}),
        (SamplingSettings(top_p=0.5), {0, 1}),
        (SamplingSettings(top_p=0.4), {0}),
        (SamplingSettings(min_p=0.3), {0, 1, 2}),
        (SamplingSettings(top_k=3, min_p=0.5), {0, 1}),
        (SamplingSettings(top_k=1), {0}),
        (SamplingSettings(temperature=0.0), {0}),
    ],
)
def test_filters_leave_what_sglangs_leave(how: SamplingSettings, allowed: set[int]) -> None:
    assert set(drawn(how, 2_000)) == allowed


def test_filters_of_one_request_do_not_touch_its_neighbours() -> None:
    """Every row is sampled by its own settings and random numbers."""
    kinds = [
        SamplingSettings(),
        SamplingSettings(top_k=2),
        SamplingSettings(temperature=0.0),
        SamplingSettings(min_p=0.3),
    ]
    alone = [drawn(how, 1, seed=i)[0] for i, how in enumerate(kinds)]
    draws = [Draw(how, random.Random(i * 100_003)) for i, how in enumerate(kinds)]
    together = sample(LOGITS.expand(len(kinds), -1), draws, kind=KIND).token_ids
    assert together == alone


def test_logprobs_are_scaled_or_raw_as_asked_and_greedy_ones_are_at_temperature_one() -> None:
    """The record names what a log-prob is of; a mixed batch does not change it."""
    for kind, temperature in ((LogprobKind.TEMPERATURE_SCALED, 0.5), (LogprobKind.RAW, 1.0)):
        draws = [
            Draw(SamplingSettings(temperature=0.5), random.Random(1)),
            Draw(SamplingSettings(temperature=0.0), random.Random(2)),
        ]
        tokens, logprobs, _ = sample(LOGITS.expand(2, -1), draws, kind=kind)
        scaled = torch.log_softmax(LOGITS / temperature, dim=-1)
        assert logprobs[0] == pytest.approx(float(scaled[tokens[0]]), abs=1e-6)
        assert logprobs[1] == pytest.approx(float(torch.log_softmax(LOGITS, dim=-1)[0]), abs=1e-6)


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        (SamplingSettings(temperature=0.5, top_k=2), [0, 1]),
        (SamplingSettings(temperature=2.0, top_p=0.5), [0, 1]),
        # token 0 has 0.35 of the whole, and 0.56 of the two that top-k keeps
        (SamplingSettings(temperature=2.0, top_k=2, top_p=0.4), [0]),
        (SamplingSettings(temperature=2.0, top_k=2), [0, 1]),
        (SamplingSettings(min_p=0.3), [0, 1, 2]),
        (SamplingSettings(top_k=1), [0]),
        (SamplingSettings(temperature=0.0, top_k=2), None),
        (SamplingSettings(temperature=0.7), None),
    ],
)
def test_log_probs_of_a_kept_set_add_up_to_one_over_what_can_be_sampled(
    how: SamplingSettings, kept: list[int] | None
) -> None:
    """vLLM's processed_logprobs: scaled, filtered, renormalised; without a filter, and for greedy, over all tokens."""

    def sampled_as(kind: LogprobKind) -> Sampled:
        draws = [Draw(replace(how, kept_set_logprobs=True), random.Random(i), num_top_logprobs=6) for i in range(400)]
        return sample(LOGITS.expand(400, -1), draws, kind=kind)

    sampled, raw = sampled_as(KIND), sampled_as(LogprobKind.RAW)
    scaled = torch.softmax(LOGITS / (how.temperature or 1.0), dim=-1)
    expected = {i: float((scaled[i] / scaled[kept or slice(None)].sum()).log()) for i in kept or range(6)}
    assert dict(sampled.top_logprobs[0]) == pytest.approx(expected, abs=1e-6)
    assert set(sampled.token_ids) <= set(expected)
    assert (len(set(sampled.token_ids)) == 1) is (how.greedy or kept == [0])
    assert sampled.logprobs == pytest.approx([expected[token] for token in sampled.token_ids], abs=1e-6)
    assert raw.token_ids == sampled.token_ids
    plain = torch.log_softmax(LOGITS, dim=-1)
    assert raw.logprobs == pytest.approx([float(plain[token]) for token in raw.token_ids], abs=1e-6)


def test_forbidden_tokens_are_not_sampled() -> None:
    draws = [Draw(SamplingSettings(), random.Random(i), forbidden=[0, 1]) for i in range(500)]
    tokens, _, _ = sample(LOGITS.expand(500, -1), draws, kind=KIND)
    assert not {0, 1} & set(tokens)


@settings(max_examples=60)
@given(
    logits=st.lists(st.floats(-60, 60), min_size=2, max_size=40),
    temperature=st.sampled_from([0.0, 0.05, 1.0, 3.0]),
    top_p=st.sampled_from([0.01, 0.9, 1.0]),
    top_k=st.sampled_from([1, 3, NO_TOP_K]),
    seed=st.integers(0, 1_000),
)
def test_any_settings_give_a_possible_token_and_its_logprob(
    logits: list[float], temperature: float, top_p: float, top_k: int, seed: int
) -> None:
    """I9: a log-prob is finite and belongs to the token that came."""
    how = SamplingSettings(temperature=temperature, top_p=top_p, top_k=top_k)
    row = torch.tensor([logits])
    tokens, logprobs, _ = sample(row, [Draw(how, random.Random(seed))], kind=KIND)
    scale = 1.0 if how.greedy else temperature
    expected = torch.log_softmax(row / scale, dim=-1)[0, tokens[0]]
    assert logprobs[0] == pytest.approx(float(expected), abs=1e-5)
    assert np.isfinite(logprobs[0])


@pytest.mark.parametrize("kind", [LogprobKind.RAW, LogprobKind.TEMPERATURE_SCALED])
def test_likeliest_tokens_are_of_the_distribution_that_logprobs_are_of(kind: LogprobKind) -> None:
    """Scaled or raw like the log-prob itself, likeliest first, each sequence as many as it wants; filters hide none."""
    hows = [SamplingSettings(temperature=0.5, top_k=2), SamplingSettings(temperature=0.0), SamplingSettings()]
    draws = [
        Draw(how, random.Random(i), num_top_logprobs=n) for i, (how, n) in enumerate(zip(hows, (3, 9, 0), strict=True))
    ]
    sampled = sample(LOGITS.expand(3, -1), draws, kind=kind)
    scaled = torch.log_softmax(LOGITS / (0.5 if kind is LogprobKind.TEMPERATURE_SCALED else 1.0), dim=-1).tolist()
    plain = torch.log_softmax(LOGITS, dim=-1).tolist()
    first, second, third = sampled.top_logprobs
    assert [top.token_id for top in first] == [0, 1, 2]
    assert [top.logprob for top in first] == pytest.approx(scaled[:3], abs=1e-6)
    assert [top.logprob for top in second] == pytest.approx(plain, abs=1e-6)
    assert third == []
    assert second[0].logprob == sampled.logprobs[1]


def test_wanting_likeliest_tokens_changes_nothing_that_is_sampled() -> None:
    """I7: and a token that must not come yet is none of them."""
    how = SamplingSettings(temperature=1.3, top_p=0.9)
    without, with_tops = (
        sample(
            LOGITS.expand(40, -1),
            [Draw(how, random.Random(i), forbidden=[0], num_top_logprobs=n) for i in range(40)],
            kind=KIND,
        )
        for n in (0, 6)
    )
    assert without[:2] == with_tops[:2]
    assert all([top.token_id for top in tops] == [1, 2, 3, 4, 5] for tops in with_tops.top_logprobs)
