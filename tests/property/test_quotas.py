"""Limits of turns under every order of arrivals and ends: what is allowed, who waits, and that all get their turn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contracts.errors import ConfigurationError, InvalidRequest, TooManyRequests
from gateway.routes.quotas import LimitSettings, Permit, Quotas, TokenBucket

NAMES = ("a", "b", "c")


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Turn:
    """A turn that ends when it is told to."""

    then: list[Callable[[], None]] = field(default_factory=list)

    def on_end(self, do: Callable[[], None]) -> None:
        self.then.append(do)

    def end(self) -> None:
        for do in self.then:
            do()


def limited(quotas: Quotas, session_id: str, num_turns: int) -> Permit:
    """Where something is limited."""
    permit = quotas.permit(session_id, num_turns)
    assert permit is not None
    return permit


def begin(quotas: Quotas, session_id: str, num_turns: int = 1) -> list[Turn]:
    """A request all of whose choices are new turns."""
    permit = quotas.permit(session_id, num_turns)
    turns = [Turn() for _ in range(num_turns)]
    if permit is None:  # nothing is limited
        return turns
    try:
        for turn in turns:
            permit.ask()
            permit.settle(turn)
    finally:
        permit.close()
    return turns


@settings(max_examples=200)
@given(
    rate=st.floats(0.1, 50),
    steps=st.lists(st.tuples(st.floats(0, 3), st.integers(1, 5)), max_size=60),
)
def test_a_bucket_gives_no_more_than_its_rate_and_a_seconds_worth(rate: float, steps: list[tuple[float, int]]) -> None:
    """What the wait says is enough, to the moment; more than a bucket holds at a time is paid afterwards."""
    now, taken, largest = 0.0, 0, 0
    bucket = TokenBucket(rate, now=now)
    for seconds, num in steps:
        now += seconds
        if (wait := bucket.wait_seconds(num, now)) > 0:
            assert bucket.wait_seconds(num, now + wait / 2) > 0
            now += wait * (1 + 1e-9) + 1e-9
            assert bucket.wait_seconds(num, now) == pytest.approx(0, abs=1e-6)
        bucket.take(num, now)
        taken, largest = taken + num, max(largest, num)
        assert taken <= rate * now + max(1.0, rate) + largest + 1e-6


@settings(max_examples=200)
@given(
    limits=st.tuples(st.integers(0, 4), st.integers(0, 6)),
    steps=st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 4), st.floats(0, 2)), max_size=80),
)
def test_never_more_turns_run_than_may(limits: tuple[int, int], steps: list[tuple[str, int, float]]) -> None:
    """0 choices stand for the end of the session's oldest turn. All choices of a request begin, or none."""
    of_one, of_all = limits
    clock = Clock()
    quotas = Quotas(LimitSettings(concurrent_per_session=of_one, concurrent=of_all), clock=clock)
    running: dict[str, list[Turn]] = {name: [] for name in NAMES}
    refused: list[int] = []
    for name, num, seconds in steps:
        clock.now += seconds
        if not num:
            if running[name]:
                running[name].pop(0).end()
            continue
        try:
            running[name] += begin(quotas, name, num)
        except InvalidRequest:
            refused.append(num)
        except TooManyRequests:
            pass
        for turns in running.values():
            assert not of_one or len(turns) <= of_one
        assert not of_all or sum(map(len, running.values())) <= of_all
    assert all(num > min(limit for limit in limits if limit) for num in refused)
    for turns in running.values():
        for turn in turns:
            turn.end()
    clock.now += 100
    assert begin(quotas, "fresh", min([limit for limit in limits if limit], default=1))


def test_a_retry_that_joins_takes_nothing_and_gives_back_what_was_kept_for_it() -> None:
    quotas = Quotas(LimitSettings(concurrent_per_session=3))
    begin(quotas, "s")
    permit = limited(quotas, "s", 2)
    for is_new in (True, False):
        if is_new:
            permit.ask()
        permit.settle(Turn())
    permit.close()
    begin(quotas, "s")
    with pytest.raises(TooManyRequests, match="concurrent_per_session"):
        begin(quotas, "s")
    limited(quotas, "s", 1).settle(Turn())


def test_what_was_admitted_and_never_began_is_given_back() -> None:
    clock = Clock()
    quotas = Quotas(LimitSettings(concurrent=2, requests_per_second_per_session=2), clock=clock)
    permit = limited(quotas, "s", 2)
    permit.ask()
    permit.close()
    assert len(begin(quotas, "s", 2)) == 2


@settings(max_examples=20)
@given(
    num_polite=st.integers(1, 6),
    limit=st.integers(1, 4),
    turn_seconds=st.floats(0.5, 8),
    greedy_choices=st.integers(1, 3),
)
def test_a_session_that_asks_without_pause_cannot_starve_others(
    num_polite: int, limit: int, turn_seconds: float, greedy_choices: int
) -> None:
    """The others ask again only when they were told to; each gets its turns as often as the greedy one its requests."""
    greedy_choices = min(greedy_choices, limit)
    clock = Clock()
    quotas = Quotas(LimitSettings(concurrent=limit), clock=clock)
    served: Counter[str] = Counter()
    running: list[tuple[float, Turn]] = []
    asks_at = {f"polite-{i}": clock.now + i * 0.01 for i in range(num_polite)} | {"greedy": clock.now - 1}
    for _ in range(3000):
        clock.now += 0.1
        for _, turn in [each for each in running if each[0] <= clock.now]:
            turn.end()
        running = [each for each in running if each[0] > clock.now]
        for name in asks_at:
            if asks_at[name] > clock.now:
                continue
            try:
                turns = begin(quotas, name, greedy_choices if name == "greedy" else 1)
            except TooManyRequests as error:
                asks_at[name] = clock.now + (0 if name == "greedy" else error.retry_after_seconds)
                continue
            running += [(clock.now + turn_seconds, turn) for turn in turns]
            served[name] += 1
            asks_at[name] = clock.now + (0 if name == "greedy" else turn_seconds)
    for name in asks_at:
        assert served[name] > 0, served
        if name != "greedy" and num_polite < limit:
            assert served[name] >= 300 / (turn_seconds + 12), served


def test_a_rate_of_all_is_shared_out_in_turn() -> None:
    """One a second; the greedy session asks a hundred times a second, the other when it is told to."""
    clock = Clock()
    quotas = Quotas(LimitSettings(requests_per_second=1), clock=clock)
    served: Counter[str] = Counter()
    polite_at = clock.now
    for _ in range(6000):
        clock.now += 0.01
        for name in ("greedy", "polite"):
            if name == "polite" and clock.now < polite_at:
                continue
            try:
                quotas.admit_call(name)
                served[name] += 1
            except TooManyRequests as error:
                if name == "polite":
                    polite_at = clock.now + error.retry_after_seconds
    assert 50 <= sum(served.values()) <= 62
    assert served["polite"] >= 15


def ask_often(quotas: Quotas, num: int) -> None:
    for _ in range(num):
        quotas.admit_call("s")


@settings(max_examples=100)
@given(rate=st.floats(0.2, 20), num=st.integers(1, 30))
def test_retry_after_is_true_for_rates(rate: float, num: int) -> None:
    """Not a second too early, and at most one too late."""
    clock = Clock()
    quotas = Quotas(LimitSettings(requests_per_second_per_session=rate), clock=clock)
    with pytest.raises(TooManyRequests) as refused:
        ask_often(quotas, num + math.ceil(rate) + 2)
    seconds = refused.value.retry_after_seconds
    clock.now += seconds
    quotas.admit_call("s")
    assert seconds <= 1 / rate + 1


def test_buckets_of_sessions_that_are_quiet_are_forgotten() -> None:
    clock = Clock()
    quotas = Quotas(LimitSettings(requests_per_second_per_session=5), clock=clock)
    for i in range(5000):
        clock.now += 0.01
        quotas.admit_call(f"s-{i}")
    assert len(quotas._buckets) < 2000


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_a_limit_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ConfigurationError, match="requests_per_second"):
        LimitSettings(requests_per_second=value)
