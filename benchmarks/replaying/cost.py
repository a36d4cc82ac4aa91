"""What replay adds to a step and to a router call, what a batch's experts take, and how fast a step is.

Other processes share the machine: CPU time is counted, the two ways take turns, and medians of their ratios are told.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.replaying.checkpoints import MoeShape, make_moe
from benchmarks.replaying.invariance import Step, make_step
from gateway.contracts.codec import decode_rollout, encode_rollout
from gateway.contracts.experts import RoutingShape
from gateway.contracts.generation import LogprobKind
from gateway.contracts.records import FinishRecord, SessionOrigin, SessionRecord
from gateway.contracts.rollouts import FinishedRollout, PickReport
from gateway.contracts.samples import Segment, TurnSpan
from trainer.algorithms.policy_objective import PolicyObjective
from trainer.algorithms.settings import LossSettings
from trainer.backends.hf import HFBackend
from trainer.backends.settings import ModelSettings, OptimizerSettings
from trainer.data.assemble import assemble
from trainer.data.packing import PackedBatch, SampleWeights, ScoredBatch, pack
from trainer.replay.inject import RoutingReplay
from trainer.replay.validate import RoutedLayers
from trainer.settings import ReplayMode

MOST_OF_A_STEP = 1.02
"""A step with replay, in steps without."""
MOST_PER_CALL_SECONDS = 10e-6
MOST_MEMORY = 1.1
"""Peak of a batch's experts, in their bytes as uint8."""
LEAST_SPEED = 1.0
"""Tokens a second, in those of a plain transformers + AdamW loop."""

_SHAPE = MoeShape(num_layers=8, hidden_size=256, num_experts=32, top_k=4, expert_size=128, vocab_size=2048)
_TOKENS_PER_MICROBATCH = 512
_PAIRS = 12
_FORWARDS, _CALL_BLOCKS, _CALL_POSITIONS = 8, 60, (16, 128, 512, 2048)
_TINY_STEP = 1e-9


@dataclass(frozen=True, slots=True)
class Cost:
    """One figure and its target; `at_most` says on which side of `target` it must lie. low, high: quartiles."""

    name: str
    value: float
    low: float
    high: float
    target: float
    at_most: bool
    of: str

    @property
    def holds(self) -> bool:
        """Whether the target is met."""
        return self.value <= self.target if self.at_most else self.value >= self.target

    def line(self) -> str:
        """For people."""
        bound = "at most" if self.at_most else "at least"
        return (
            f"{'' if self.holds else 'MISSED '}{self.name}: {self.value:.4g} {self.of} "
            f"(quartiles {self.low:.4g} to {self.high:.4g}; {bound} {self.target:.4g})\n"
        )

    def figures(self) -> dict[str, Any]:
        """For the results file."""
        return asdict(self) | {"holds": self.holds}


def measure_costs(folder: Path, *, seed: int) -> list[Cost]:
    """All of them."""
    model = make_moe(folder / "model", "qwen3_moe", seed=seed, shape=_SHAPE)
    step = make_step(model, folder, seed=seed, num_samples=16)
    return [
        step_cost(model, step),
        *(call_cost(model, num_positions=num, seed=seed) for num in _CALL_POSITIONS),
        memory_cost(seed=seed),
        step_speed(model, step),
    ]


def step_cost(model: Path, step: Step) -> Cost:
    """A whole update with replay against one without. Both compute the same experts: the rows that are replayed are the
    live router's own, so that only the cost of replaying differs."""
    replaying, live = _backend(model, ReplayMode.R3), _backend(model, ReplayMode.OFF)
    recorded, _ = replaying.record([scored.batch for scored in step.cut(tokens_per_microbatch=_TOKENS_PER_MICROBATCH)])
    without = [ScoredBatch(replace(batch, layout=replace(batch.layout, routing=None))) for batch in recorded]
    objective = PolicyObjective(LossSettings(correction="off"))
    ratios = _ratios(
        lambda: replaying.update([ScoredBatch(batch) for batch in recorded], objective),
        lambda: live.update(without, objective),
    )
    return _cost("a step with replay", ratios, MOST_OF_A_STEP, of="steps without")


def call_cost(model: Path, *, num_positions: int, seed: int) -> Cost:
    """What replay adds to one call of a router, less the top-k that it saves: every router once in a context of its own
    forward, with choosing, handing out and verifying ids."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    replay = RoutingReplay.install(loaded)
    ids = torch.randint(8, 300, (1, num_positions), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), replay.recording() as record:
        loaded(input_ids=ids)
    rows = record.rows()
    routers = [loaded.get_submodule(site.path) for site in replay.plan.routers]
    hidden = torch.randn(num_positions, loaded.config.hidden_size)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with torch.no_grad():
        for _ in range(_CALL_BLOCKS):
            for replays in (True, False):
                started = time.process_time()
                for _ in range(_FORWARDS):
                    with replay.replaying(rows) if replays else nullcontext():
                        for router in routers:
                            router(hidden)
                seconds[replays].append((time.process_time() - started) / (_FORWARDS * len(routers)))
    added = [one - other for one, other in zip(seconds[True], seconds[False], strict=True)]
    return _cost(
        f"replay in a router call of {num_positions} positions", added, MOST_PER_CALL_SECONDS, of="seconds more"
    )


def memory_cost(*, seed: int, num_rollouts: int = 8, num_tokens: int = 6000) -> Cost:
    """Peak of what experts take from the feed's body to the layers of the last micro-batch, over their bytes: with rows
    less without. Qwen3-30B-A3B's shape: 48 layers, 8 of 128 experts. Arrays of this process as tracemalloc counts."""
    shape = RoutingShape(num_layers=48, num_experts=128, top_k=8)
    routed = RoutedLayers(shape, tuple(range(shape.num_layers)))
    peaks, num_bytes = {}, num_rollouts * (num_tokens - 1) * shape.num_layers * shape.top_k
    for has_rows in (False, True):
        bodies = [_body(seed + i, shape, num_tokens, routed=has_rows) for i in range(num_rollouts)]
        tracemalloc.start()
        own = [bytearray(body) for body in bodies]  # what the client read
        samples = [sample for body in own for sample in assemble(decode_rollout(body), routed)]
        del own
        for batch in pack(samples, [SampleWeights(1.0, 1.0)] * len(samples), tokens_per_microbatch=num_tokens):
            _walk(batch, routed)
        peaks[has_rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    ratio = (peaks[True] - peaks[False]) / num_bytes
    return Cost("memory of a batch's experts", ratio, ratio, ratio, MOST_MEMORY, at_most=True, of="of their bytes")


def step_speed(model: Path, step: Step) -> Cost:
    """Tokens a second of an update with replay, over those of a plain loop (model.forward, a log-softmax of all logits,
    the same loss, backward, clip, torch's AdamW) on the same micro-batches."""
    batches = step.cut(tokens_per_microbatch=_TOKENS_PER_MICROBATCH)
    ours, plain = _backend(model, ReplayMode.R3), PlainLoop(model)
    objective = PolicyObjective(LossSettings(correction="off"))
    ratios = _ratios(
        lambda: plain.update([scored.batch for scored in batches]), lambda: ours.update(batches, objective)
    )
    return _cost("tokens a second", ratios, LEAST_SPEED, at_most=False, of="times those of a plain loop")


class PlainLoop:
    """What one writes without any of this: transformers, a policy gradient, AdamW."""

    def __init__(self, model: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=_TINY_STEP, weight_decay=0.0)

    def update(self, batches: Sequence[PackedBatch]) -> float:
        """One step over the micro-batches; the loss."""
        total = 0.0
        for batch in batches:
            layout = batch.layout
            ids = torch.from_numpy(layout.input_ids.astype(np.int64))[None]
            positions = torch.from_numpy(layout.position_ids.astype(np.int64))[None]
            logits_NV = self._model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
            labels_N = torch.from_numpy(layout.labels.astype(np.int64))
            logprobs_N = torch.log_softmax(logits_NV, dim=-1).gather(1, labels_N[:, None])[:, 0]
            ratio_N = torch.exp(logprobs_N - logprobs_N.detach())
            loss = -(torch.from_numpy(batch.weights * batch.advantages) * ratio_N).sum()
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total


def _backend(model: Path, mode: ReplayMode) -> HFBackend:
    return HFBackend(ModelSettings(path=model), OptimizerSettings(learning_rate=_TINY_STEP), replay=mode, seed=0)


def _ratios(one: Callable[[], object], other: Callable[[], object]) -> list[float]:
    """CPU time of `one` over that of `other`, pair by pair; who goes first alternates."""
    ratios = []
    for i in range(_PAIRS + 2):
        seconds = {}
        for work in (one, other) if i % 2 else (other, one):
            started = time.process_time()
            work()
            seconds[work] = time.process_time() - started
        if i >= 2:  # the first ones warm caches and make the optimiser's state
            ratios.append(seconds[one] / seconds[other])
    return ratios


def _cost(name: str, values: Sequence[float], target: float, *, of: str, at_most: bool = True) -> Cost:
    low, middle, high = statistics.quantiles(values, n=4)
    return Cost(name, middle, low, high, target, at_most=at_most, of=of)


def _walk(batch: PackedBatch, routed: RoutedLayers) -> None:
    """Each layer's rows, as a forward asks for them."""
    if batch.layout.routing is not None:
        for layer in routed.layers:
            batch.layout.routing.layer(layer)


def _body(seed: int, shape: RoutingShape, num_tokens: int, *, routed: bool) -> bytes:
    """One rollout of one segment, as the feed sends it."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, shape.num_experts, (num_tokens - 1, shape.num_layers, 1))
    ids = ((first + np.arange(shape.top_k)) % shape.num_experts).astype(shape.dtype)
    mask = np.arange(num_tokens) >= num_tokens // 10
    segment = Segment(
        segment_id=f"segment-{seed}",
        turns=(TurnSpan("t", 0, num_tokens // 10, num_tokens, True, "stop", 1.0, 1.0, -1),),
        token_ids=rng.integers(0, 1000, num_tokens).astype(np.int32),
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -1.0, np.nan).astype(np.float32),
        policy_version=np.where(mask, 0, -1).astype(np.int32),
        routed_experts=ids if routed else None,
        routed_valid=np.full(num_tokens - 1, routed),
        logprob_kind=LogprobKind.TEMPERATURE_SCALED,
    )
    name = f"session-{seed}"
    session = SessionRecord(name, None, None, None, {}, {}, {}, None, "", SessionOrigin.CREATED, True, created_at=0.0)
    finish = FinishRecord(name, "snapshot", 1.0, "completed", {}, 1.0)
    trained = int(mask.sum())
    pick = PickReport("all", trained, trained, ())
    return b"".join(encode_rollout(FinishedRollout(session, finish, (segment,), shape.num_experts, {}, pick)))
