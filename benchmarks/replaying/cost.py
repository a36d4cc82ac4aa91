"""What replay adds to a step and to a router call, what a batch's experts take, and how fast a step is.

Other processes share the machine: CPU time is counted, the two ways take turns, and medians of their ratios are told.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.replaying.checkpoints import MoeShape, make_moe
from benchmarks.replaying.invariance import Step, make_step
from gateway.contracts.codec import decode_rollout, encode_rollout
from gateway.contracts.experts import ExpertIds, RoutingShape
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
from trainer.replay.plan import ReplayPlan, RouterSite, Witness
from trainer.replay.rows import RoutingRows
from trainer.replay.selection import Selection
from trainer.replay.slots import Replayed
from trainer.replay.validate import RoutedLayers
from trainer.replay.verify import RoutingCheck
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
_FORWARDS, _CALL_BLOCKS, _CALL_POSITIONS, _CALL_SAMPLES = 3, 100, (16, 64, 512), 4
_ROUTERS = ("qwen3_moe", "deepseek_v3")
_ROUTER_CONFIG = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 25,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_local_experts": 128,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "pad_token_id": 0,
}
_ROLLOUTS, _ROLLOUT_TOKENS, _MEMORY_RUNS = 64, 11_000, 3
_ROLLOUT_SHAPE = RoutingShape(num_layers=48, num_experts=128, top_k=8)
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
        *(call_cost(name, num_positions=num, seed=seed) for name in _ROUTERS for num in _CALL_POSITIONS),
        memory_cost(folder / "memory", seed=seed),
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


def call_cost(model_type: str, *, num_positions: int, seed: int) -> Cost:
    """What replay adds to one call of a router, less the top-k that it saves: every router of a model once, in a
    context of its own, with handing ids in, validity and verification, against calls of the untouched class."""
    model = _router_model(model_type, seed=seed)
    replay = RoutingReplay.install(model)
    routers: list[Any] = [model.get_submodule(site.path) for site in replay.plan.routers]
    hidden = torch.randn(num_positions, _ROUTER_CONFIG["hidden_size"])
    rows = _random_rows(replay.plan.shape, [num_positions // _CALL_SAMPLES] * _CALL_SAMPLES, seed=seed)

    def live() -> None:
        for router in routers:
            type(router).forward(router, hidden)

    def replayed() -> None:
        with replay.replaying(rows) as check:
            for router in routers:
                router.forward(hidden)
        check.report()

    seconds: dict[Callable[[], None], list[float]] = {live: [], replayed: []}
    with torch.no_grad():
        for i in range(_CALL_BLOCKS):
            for work in (live, replayed) if i % 2 else (replayed, live):
                started = time.thread_time()
                for _ in range(_FORWARDS):
                    work()
                seconds[work].append((time.thread_time() - started) / (_FORWARDS * len(routers)))
    added = [one - other for one, other in zip(seconds[replayed], seconds[live], strict=True)]
    name = f"replay in a {model_type} router call of {num_positions} positions"
    return _cost(name, added, MOST_PER_CALL_SECONDS, of="seconds more")


def memory_cost(folder: Path, *, seed: int) -> Cost:
    """Peak of what experts take from the feed's body to the last layer of the last micro-batch, over their bytes: with
    rows less without, resident memory of fresh processes, so numpy's, torch's and the allocator's own alike.
    Qwen3-30B-A3B's shape: 48 layers, 8 of 128 experts; 258 MiB of rows in micro-batches of one rollout."""
    peaks = {}
    for routed in (False, True):
        bodies = folder / ("with-rows" if routed else "without-rows")
        bodies.mkdir(parents=True)
        for i in range(_ROLLOUTS):
            body = _body(seed + i, _ROLLOUT_SHAPE, _ROLLOUT_TOKENS, routed=routed)
            (bodies / f"{i:02}").write_bytes(body)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh:
            peaks[routed] = list(fresh.map(peak_memory, [bodies] * _MEMORY_RUNS, [routed] * _MEMORY_RUNS))
    num_bytes = _ROLLOUTS * (_ROLLOUT_TOKENS - 1) * _ROLLOUT_SHAPE.num_layers * _ROLLOUT_SHAPE.top_k
    ratios = [(one - statistics.median(peaks[False])) / num_bytes for one in peaks[True]]
    return _cost("memory of a batch's experts", ratios, MOST_MEMORY, of="of their bytes")


def peak_memory(bodies: Path, routed: bool) -> int:
    """Bytes by which this process's resident memory rose at most (Linux) while it read rollouts, packed them and handed
    each layer of each micro-batch its ids and verified them."""
    torch.set_num_threads(1)
    layers = RoutedLayers(_ROLLOUT_SHAPE, tuple(range(_ROLLOUT_SHAPE.num_layers)))
    selection = Selection("topk", _ROLLOUT_SHAPE.num_experts, _ROLLOUT_SHAPE.top_k)
    sites = tuple(RouterSite(f"layers.{i}", i, "", selection, Witness.ROUTER_OUTPUT) for i in layers.layers)
    plan = ReplayPlan(_ROLLOUT_SHAPE, sites, {}, 0)
    _hand_in([_body(0, _ROLLOUT_SHAPE, 1024, routed=routed)], plan, routed=routed)  # what is made once
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    _hand_in((path.read_bytes() for path in sorted(bodies.iterdir())), plan, routed=routed)
    return _resident("VmHWM") - before


def _hand_in(read: Iterable[bytes], plan: ReplayPlan, *, routed: bool) -> None:
    samples = [sample for body in read for sample in assemble(decode_rollout(body), plan.routed if routed else None)]
    weights = [SampleWeights(1.0, 1.0)] * len(samples)
    for batch in pack(samples, weights, tokens_per_microbatch=max(sample.layout.num_positions for sample in samples)):
        rows = batch.layout.routing
        if rows is None:
            continue
        check = RoutingCheck(rows, plan.routed.layers)
        slot = Replayed(rows, plan, check)
        for site in plan.routers:
            slot.observe(site, slot.layer_ids(site, torch.device("cpu"), rows.num_positions).ids)
        report = check.report()
        assert report.verified == report.total, report


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


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


def _router_model(model_type: str, *, seed: int) -> Any:
    """A narrow random model with routers of real width; groups where its type has them."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **_ROUTER_CONFIG)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _random_rows(shape: RoutingShape, lengths: Sequence[int], *, seed: int) -> RoutingRows:
    """Distinct random experts in every layer, one chunk a sample, all valid."""
    rng = np.random.default_rng(seed)
    return RoutingRows.join(
        [RoutingRows.of(_ids(rng, length, shape), np.ones((length, shape.num_layers), np.bool_)) for length in lengths]
    )


def _ids(rng: np.random.Generator, num_rows: int, shape: RoutingShape) -> ExpertIds:
    first = rng.integers(0, shape.num_experts, (num_rows, shape.num_layers, 1), dtype=np.uint16)
    ids: ExpertIds = ((first + np.arange(shape.top_k, dtype=np.uint16)) % shape.num_experts).astype(shape.dtype)
    return ids


def _body(seed: int, shape: RoutingShape, num_tokens: int, *, routed: bool) -> bytes:
    """One rollout of one segment, as the feed sends it."""
    rng = np.random.default_rng(seed)
    ids = _ids(rng, num_tokens - 1, shape)
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
