"""HFBackend: a transformers causal language model on one device, AdamW, routing replay, adapters, a reference policy.

    update      accumulate: for each micro-batch  forward under replay → objective → backward
                step:       clip → is all finite? → AdamW → schedule

Deterministic on CPU with one thread: no operation draws random numbers. On a GPU the host waits for the device
once a micro-batch, for which tokens the objective takes out, and once a step, for loss and gradient norm. Whatever
concerns several processes is behind `Sharding`.

Shape letters: S = trained positions of a micro-batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from gateway.contracts.errors import ConfigurationError, NonFiniteLoss, TrainingError
from trainer.algorithms.objective import LiveTokens, Objective
from trainer.backends.export import SourceFolder, write_policy
from trainer.backends.forward import ModelForward
from trainer.backends.logprobs import TokenScores
from trainer.backends.lora import adapters_off, add_adapters, base_model, merged_state
from trainer.backends.model import choose_device, is_dense, load_model, packing_holds, recompute_layers
from trainer.backends.optimizer import MasterWeights, make_optimizer, resume_schedule
from trainer.backends.protocol import Measured, Policy, Update
from trainer.backends.settings import LoraSettings, ModelSettings, OptimizerSettings
from trainer.backends.sharding import Sharding, WholeModel
from trainer.data.packing import PackedBatch, ScoredBatch
from trainer.replay.inject import RoutingReplay
from trainer.replay.slots import Compared
from trainer.replay.validate import RoutedLayers
from trainer.replay.verify import RoutingCheck, RoutingReport
from trainer.settings import ReplayMode

_log = logging.getLogger(__name__)

_Batch = TypeVar("_Batch", PackedBatch, ScoredBatch)
_Routing: TypeAlias = RoutingCheck | Compared | None


class _Scored(NamedTuple):
    """One micro-batch's scores without gradient, still on the device, and how to tell what its routers did."""

    scores: TokenScores
    routing: Callable[[], RoutingReport]


@dataclass(frozen=True, slots=True, eq=False)
class Accumulated:
    """This process's part of a step before it is taken; gradients lie in the parameters.

    loss: float64[] on the device. shares: sums by name, likewise.
    """

    num_trained: int
    loss: Tensor
    shares: dict[str, Tensor]
    measured: Measured


class HFBackend:
    """A `TrainBackend` in this process; with a `sharding`, one process's part of one."""

    def __init__(
        self,
        model: ModelSettings,
        optimizer: OptimizerSettings,
        *,
        replay: ReplayMode,
        seed: int,
        lora: LoraSettings | None = None,
        num_updates: int = 1,
        needs_reference: bool = False,
        sharding: Sharding | None = None,
        on_microbatch: Callable[[int, int], None] | None = None,
    ) -> None:
        """Load the checkpoint, install replay, and put adapters on it where `lora` has a rank.

        num_updates: optimiser steps of the whole run, which schedules end with. needs_reference: load what KL is taken
        against. on_microbatch: told, in each pass, how many micro-batches of how many are done. Raises
        ConfigurationError for a folder that holds no causal language model and for settings that do not fit it,
        ReplayUnsupported where `replay` is not off and the model's routing cannot be replayed.
        """
        torch.manual_seed(seed)
        self._settings = model
        self._on_microbatch = on_microbatch
        self._sharding = sharding or WholeModel()
        self._device = choose_device(model.device)
        self._dtype = torch.float32 if self._sharding.casts else getattr(torch, model.dtype)
        self._adapts = lora is not None and lora.rank > 0

        policy = load_model(model.path, model, dtype=self._dtype, device=self._device)
        self._source = SourceFolder(model.path)
        self._replay = _installed_replay(policy, replay)
        self._packs_samples = packing_holds(policy)
        if model.checkpoint_activations:
            recompute_layers(policy, None if self._replay is None else self._replay.checkpoint_contexts)
        if lora is not None and self._adapts:
            policy = add_adapters(policy, lora)
        self._model = self._sharding.shard(policy)
        self._forward = ModelForward(self._model, self._device)
        self._reference = self._load_reference() if needs_reference else None

        exact = self._exact_values()
        self._exact_buffers = {name: exact[name] for name, _ in self._model.named_buffers() if name in exact}
        self._masters = MasterWeights(
            ((name, parameter) for name, parameter in self._model.named_parameters() if parameter.requires_grad),
            exact=exact,
        )
        self._grad_clip = optimizer.grad_clip
        self._optimizer, self._schedule = make_optimizer(
            self._sharding.parameter_groups(self._masters.parameters), optimizer, num_updates=num_updates
        )

    @property
    def routed(self) -> RoutedLayers | None:
        """The model's routing; None with replay off, and for a dense model."""
        return None if self._replay is None else self._replay.plan.routed

    @property
    def packs_samples(self) -> bool:
        """Measured at load: whether packed samples keep the log-probs that they have alone."""
        return self._packs_samples

    def measure(self, batches: Sequence[PackedBatch], *, replay: bool, policy: Policy = Policy.ACTOR) -> Measured:
        """Log-probs, entropy and routing of all trained tokens, without gradient; the reference is never replayed."""
        with torch.no_grad():
            if policy is Policy.REFERENCE:
                return self._measure_reference(batches)
            return _measured(batches, [self._scored(batch, replay=replay) for batch in self._told(batches)])

    def record(self, batches: Sequence[PackedBatch]) -> tuple[tuple[PackedBatch, ...], Measured]:
        """The batches with the live router's choices as their rows; as they are where nothing is replayed."""
        if self._replay is None:
            return tuple(batches), self.measure(batches, replay=False)
        recorded, scored = [], []
        for batch in self._told(batches):
            with torch.no_grad(), self._replay.recording() as record:
                scored.append(_Scored(self._forward(batch), partial(self._live, batch)))
            recorded.append(replace(batch, layout=replace(batch.layout, routing=record.rows())))
        return tuple(recorded), _measured(batches, scored)

    def update(self, batches: Sequence[ScoredBatch], objective: Objective) -> Update:
        """Accumulate gradients over the micro-batches under replay, clip them, and step.

        Raises NonFiniteLoss, TrainingError without a trained token; parameters and optimiser are then as before.
        """
        return self.step(self.accumulate(batches, objective))

    def accumulate(self, batches: Sequence[ScoredBatch], objective: Objective) -> Accumulated:
        """Gradients of this process's micro-batches, from zero."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._zero_gradients()
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        shares: dict[str, Tensor] = {}
        scored_batches = []
        for scored in self._told(batches):
            with self._routing(scored.batch, replay=True) as routing:
                live = self._forward(scored.batch, entropy_gradient=objective.needs_entropy_gradient)
            part, part_shares = self._loss(scored, live, objective)
            part.backward()
            loss += part.detach()
            for name, values in part_shares.items():
                total = values.detach().sum(dtype=torch.float64)
                shares[name] = shares[name] + total if name in shares else total
            # After the backward pass, so that layers that ran again are compared too.
            seen = self._seen(routing, scored.batch)
            scored_batches.append(_Scored(TokenScores(live.logprobs.detach(), live.entropy.detach()), seen))
        return Accumulated(
            num_trained=sum(scored.batch.layout.num_trained for scored in batches),
            loss=loss,
            shares=shares,
            measured=_measured([scored.batch for scored in batches], scored_batches),
        )

    def nonfinite_gradients(self, batch: ScoredBatch, objective: Objective) -> tuple[str, ...]:
        """Names of the parameters whose gradient of this micro-batch is not finite, in the model's order."""
        self.accumulate([batch], objective)
        gradients = ((name, master.grad) for name, master in self._masters.by_name.items())
        names = tuple(name for name, grad in gradients if grad is not None and not bool(grad.isfinite().all()))
        self._zero_gradients()
        return names

    def step(self, part: Accumulated) -> Update:
        """Clip and step on the gradients of all processes; see `update`."""
        names = sorted(part.shares)
        count = torch.full_like(part.loss, part.num_trained)
        totals = self._sharding.total(torch.stack([count, part.loss, *(part.shares[name] for name in names)]))
        norm = self._sharding.clip(self._masters.parameters, self._grad_clip)
        num_trained, loss, *sums = totals.tolist()
        grad_norm = float(norm)
        if not num_trained:
            self._zero_gradients()
            raise TrainingError("no token of this batch may be trained")
        if not np.isfinite(loss) or not np.isfinite(grad_norm):
            self._zero_gradients()
            raise NonFiniteLoss(f"loss {loss}, gradient norm {grad_norm}: the step was not made")
        learning_rate = float(self._optimizer.param_groups[0]["lr"])
        self._optimizer.step()
        self._schedule.step()
        self._masters.round_to_model()
        self._zero_gradients()
        return Update(
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            shares={name: total / num_trained for name, total in zip(names, sums, strict=True)},
            measured=part.measured,
            device_bytes=torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None,
        )

    def save(self, folder: Path) -> None:
        """Trained parameters in float32, optimiser, schedule and random state."""
        on_cuda = self._device.type == "cuda"
        rest = {
            "schedule": self._schedule.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self._device) if on_cuda else None,
        }
        self._sharding.save(folder, self._masters.by_name, self._optimizer, rest)

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote; raises ConfigurationError if it is of another model or other adapters."""
        rest = self._sharding.load(folder, self._masters.by_name, self._optimizer)
        self._masters.round_to_model()
        resume_schedule(self._schedule, rest["schedule"])
        torch.set_rng_state(rest["torch_rng"])
        if rest["cuda_rng"] is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(rest["cuda_rng"], self._device)

    def export(self, folder: Path) -> None:
        """The policy under the names and in the dtypes of the checkpoint that it came from; adapters are merged."""
        self.write(folder, self.policy_state())

    @torch.no_grad()
    def policy_state(self) -> dict[str, Tensor]:
        """The transformers model's state as it is exported: whole tensors, adapters merged, float32 where masters are.

        Every process of a sharded policy calls it; nothing of the training state changes.
        """
        state = merged_state(self._model)
        if not self._adapts:
            state |= self._masters.tensors_of(self._model)
            state |= {name: tensor for name, tensor in self._exact_buffers.items() if name in state}
        whole: dict[int, Tensor] = {}  # one for all names of a tied parameter, so that it is stored once
        for tensor in state.values():
            if id(tensor) not in whole:
                whole[id(tensor)] = self._sharding.whole(tensor)
        return {name: whole[id(tensor)] for name, tensor in state.items()}

    def write(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write what `policy_state` gave as a Hugging Face folder."""
        write_policy(folder, base_model(self._model), state, self._source)

    def close(self) -> None:
        """Nothing is held beside this process."""

    def _told(self, batches: Sequence[_Batch]) -> Iterator[_Batch]:
        """The micro-batches of one pass, each told when its work has been handed to the device."""
        for number, batch in enumerate(batches, start=1):
            yield batch
            if self._on_microbatch is not None:
                self._on_microbatch(number, len(batches))

    def _loss(
        self, scored: ScoredBatch, live: TokenScores, objective: Objective
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if not scored.batch.layout.num_trained:
            return live.logprobs.sum(), {}  # 0 with a graph: other ranks wait for this one's backward pass
        terms = objective(LiveTokens(live.logprobs, live.entropy), self._forward.trained_tokens(scored, live))
        return (terms.loss * self._forward.weights(scored.batch)).sum(), terms.shares

    def _measure_reference(self, batches: Sequence[PackedBatch]) -> Measured:
        if self._reference is None:
            raise ConfigurationError("no reference policy was loaded: the backend was made without needs_reference")
        forward, context = self._reference
        with context():
            return _measured(batches, [_Scored(forward(batch), RoutingReport) for batch in self._told(batches)])

    def _scored(self, batch: PackedBatch, *, replay: bool) -> _Scored:
        with self._routing(batch, replay=replay) as routing:
            scores = self._forward(batch)
        return _Scored(scores, self._seen(routing, batch))

    def _routing(self, batch: PackedBatch, *, replay: bool) -> AbstractContextManager[_Routing]:
        """The context of a forward: under the batch's rows, or live and compared with them."""
        rows = batch.layout.routing
        if self._replay is None or rows is None:
            return nullcontext()
        return self._replay.replaying(rows) if replay else self._replay.comparing(rows)

    def _seen(self, routing: _Routing, batch: PackedBatch) -> Callable[[], RoutingReport]:
        """The report: at once on CPU, where what it compares takes memory; later on a device, as it waits for it."""
        if isinstance(routing, RoutingCheck):
            report = routing.report
        else:
            counted = self._live(batch)
            report = partial(_compared, counted, routing)
        if self._device.type == "cpu":
            made = report()
            return lambda: made
        return report

    def _live(self, batch: PackedBatch) -> RoutingReport:
        """Of a forward whose routers all were live."""
        if self.routed is None:
            return RoutingReport()
        rows = batch.layout.routing
        num_positions = batch.layout.num_positions if rows is None else rows.num_real
        total = num_positions * len(self.routed.layers)
        return RoutingReport(total=total, fallback=total)

    def _zero_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def _load_reference(self) -> tuple[ModelForward, Callable[[], AbstractContextManager[None]]]:
        """The reference's forward, and the context in which it is that policy: adapters need no second copy."""
        if self._adapts and self._settings.reference is None:
            return self._forward, lambda: adapters_off(self._model)
        path = self._settings.reference or self._settings.path
        model = load_model(path, self._settings, dtype=self._dtype, device=self._device).requires_grad_(False)
        if model.config.get_text_config().vocab_size != base_model(self._model).config.get_text_config().vocab_size:
            raise ConfigurationError(f"model.reference {path} has another vocabulary than model.path")
        return ModelForward(self._sharding.shard(model), self._device), nullcontext

    def _exact_values(self) -> dict[str, Tensor]:
        """float32 values of a checkpoint that the compute dtype rounds; none where it loses nothing."""
        if self._dtype == torch.float32 or self._adapts or self._source.is_exact:
            return {}
        model = load_model(self._settings.path, self._settings, dtype=torch.float32, device=torch.device("cpu"))
        return dict(model.named_parameters()) | dict(model.named_buffers())


def _installed_replay(model: Any, mode: ReplayMode) -> RoutingReplay | None:
    if mode is ReplayMode.OFF:
        return None
    if is_dense(model):
        _log.info("%s has no experts: replay.mode %s has nothing to replay", type(model).__name__, mode.value)
        return None
    return RoutingReplay.install(model)


def _compared(live: RoutingReport, routing: Compared | None) -> RoutingReport:
    return live if routing is None else live + routing.report()


def _measured(batches: Sequence[PackedBatch], scored: Sequence[_Scored]) -> Measured:
    """On the host, in one transfer; not before all work has been handed to the device."""
    rollout = [batch.layout.rollout_logprobs[batch.layout.trained] for batch in batches]
    return Measured(
        logprobs=torch.cat([one.scores.logprobs for one in scored]).cpu(),
        rollout_logprobs=torch.from_numpy(np.concatenate(rollout)),
        entropy=torch.cat([one.scores.entropy for one in scored]).cpu(),
        routing=sum((one.routing() for one in scored), RoutingReport()),
    )
