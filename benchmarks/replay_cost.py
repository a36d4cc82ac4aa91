"""What routing replay costs: time of a router call over the untouched router, and memory of a batch's experts.

Each side is timed in alternation with the other, many short runs of each, and the medians are compared, in CPU time of
this process: a machine that other work shares drifts by more than replay costs.
"""

from __future__ import annotations

import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gateway.contracts.experts import RoutingShape
from trainer.replay.inject import RoutingReplay
from trainer.replay.rows import RoutingRows


@dataclass(frozen=True, slots=True)
class CallCost:
    """Microseconds of one router call, medians: the untouched router, outside of any context with replay installed, and
    under replay."""

    untouched_us: float
    outside_us: float
    replayed_us: float

    @property
    def added_us(self) -> float:
        """By replay."""
        return self.replayed_us - self.untouched_us


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of one forward and backward, medians, and how much longer replay makes it."""

    untouched_seconds: float
    replayed_seconds: float

    @property
    def added_share(self) -> float:
        """0.02: two per cent longer."""
        return self.replayed_seconds / self.untouched_seconds - 1


@dataclass(frozen=True, slots=True)
class MemoryCost:
    """Bytes that Python and numpy held at most, above those before, while a batch of rows was replayed."""

    rows_bytes: int
    peak_bytes: int

    @property
    def ratio(self) -> float:
        """Of the rows' own size and the peak beside them, to that size."""
        return (self.rows_bytes + self.peak_bytes) / self.rows_bytes


def router_call_cost(
    model: Any, *, num_positions: int = 64, num_samples: int = 4, rounds: int = 60, calls: int = 50
) -> CallCost:
    """Time the first router of a model by itself, over packed rows of `num_samples` samples."""
    replay = RoutingReplay.install(model)
    site = replay.plan.routers[0]
    router = model.get_submodule(site.path)
    hidden = torch.randn(num_positions, _hidden_size(model))
    rows = random_rows(replay, [num_positions // num_samples] * num_samples)
    untouched = type(router).forward

    def run_untouched() -> None:
        for _ in range(calls):
            untouched(router, hidden)

    def run() -> None:
        for _ in range(calls):
            router.forward(hidden)

    def run_replayed() -> None:
        with replay.replaying(rows):
            run()

    with torch.no_grad():
        seconds = _medians([run_untouched, run, run_replayed], rounds)
    replay.remove()
    return CallCost(*(each / calls * 1e6 for each in seconds))


def step_cost(model: Any, *, num_positions: int = 256, num_samples: int = 4, rounds: int = 12) -> StepCost:
    """Time forward and backward of packed samples without and with replay; verification is in it."""
    replay = RoutingReplay.install(model)
    length = num_positions // num_samples
    rows = random_rows(replay, [length] * num_samples)
    input_ids = torch.randint(3, model.config.get_text_config().vocab_size, (1, length * num_samples))
    position_ids = torch.arange(length).repeat(num_samples)[None]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.square().mean().backward()

    def replayed() -> None:
        with replay.replaying(rows) as check:
            step()
        check.report()

    with replay.recording() as record, torch.no_grad():
        model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    rows = record.rows()  # the same experts on both sides: other loads of experts would cost otherwise
    seconds = _medians([step, replayed], rounds)
    replay.remove()
    return StepCost(*seconds)


def memory_cost(model: Any, *, num_positions: int, num_samples: int) -> MemoryCost:
    """Replay one micro-batch and return the peak of what Python and numpy allocated for it (tracemalloc)."""
    replay = RoutingReplay.install(model)
    length = num_positions // num_samples
    rows = random_rows(replay, [length] * num_samples)
    input_ids = torch.randint(3, model.config.get_text_config().vocab_size, (1, length * num_samples))
    position_ids = torch.arange(length).repeat(num_samples)[None]
    gc.collect()
    tracemalloc.start()
    try:
        with torch.no_grad(), replay.replaying(rows) as check:
            model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        check.report()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    replay.remove()
    return MemoryCost(rows.nbytes, peak)


def random_rows(replay: RoutingReplay, lengths: list[int], seed: int = 0) -> RoutingRows:
    """Distinct random experts in every layer, one chunk a sample, all valid."""
    rng, shape = np.random.default_rng(seed), replay.plan.shape
    return RoutingRows.join([_sample_rows(rng, shape, length) for length in lengths])


def _sample_rows(rng: np.random.Generator, shape: RoutingShape, length: int) -> RoutingRows:
    start = rng.integers(0, shape.num_experts, size=(length, shape.num_layers, 1))
    ids = ((start + np.arange(shape.top_k)) % shape.num_experts).astype(shape.dtype)
    return RoutingRows.of(ids, np.ones((length, shape.num_layers), dtype=np.bool_))


def _hidden_size(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


def _medians(runs: list[Callable[[], None]], rounds: int) -> list[float]:
    """Seconds of each, the median of `rounds` alternating runs after one that is not counted."""
    taken: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 1):
        for run, seconds in zip(runs, taken, strict=True):
            start = time.process_time()
            run()
            if number:
                seconds.append(time.process_time() - start)
    return [statistics.median(seconds) for seconds in taken]
