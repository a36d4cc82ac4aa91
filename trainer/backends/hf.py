"""HFBackend: a transformers causal language model in float32 on one device, AdamW, routing replay.

The model stays in evaluation mode while it trains: dropout and router jitter would make its log-probs those of another
distribution than the engine sampled from. Deterministic on CPU with one thread: no operation draws random numbers.
Logits are computed at trained positions only, where the model can (`logits_to_keep`): they are the largest activation.

Shape letters: N = input positions of a micro-batch, S = its trained positions, V = vocabulary.
"""

from __future__ import annotations

import inspect
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor

from gateway.contracts.errors import ConfigurationError, NonFiniteLoss, TrainingError
from trainer.algorithms.objective import LiveTokens, Objective, TrainedTokens
from trainer.backends.protocol import Measured, Policy, Update
from trainer.backends.settings import ModelSettings, OptimizerSettings
from trainer.data.packing import PackedBatch, ScoredBatch
from trainer.replay.inject import RoutingReplay
from trainer.replay.validate import RoutedLayers
from trainer.replay.verify import RoutingReport
from trainer.settings import ReplayMode

_STATE_FILE = "backend.pt"
_PACKING_TOLERANCE = 1e-4
_CARRIED_OVER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")


class _Forward(NamedTuple):
    """One micro-batch's result: float32[S] each; entropy has no gradient."""

    logprobs: Tensor
    entropy: Tensor
    routing: RoutingReport


class HFBackend:
    """A `TrainBackend` in this process."""

    def __init__(self, model: ModelSettings, optimizer: OptimizerSettings, *, replay: ReplayMode, seed: int) -> None:
        """Load the checkpoint and install replay.

        Raises ConfigurationError for a folder that holds no causal language model, ReplayUnsupported where `replay` is
        not off and the model's routing cannot be replayed.
        """
        torch.manual_seed(seed)
        self._path = model.path
        self._model = _load_model(model)
        self._replay = None if replay is ReplayMode.OFF else RoutingReplay.install(self._model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._packs_samples = _packing_holds(self._model)
        self._grad_clip = optimizer.grad_clip
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=optimizer.learning_rate,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            weight_decay=optimizer.weight_decay,
        )

    @property
    def routed(self) -> RoutedLayers | None:
        """The model's routing, None with replay off."""
        return None if self._replay is None else self._replay.plan.routed

    @property
    def packs_samples(self) -> bool:
        """Measured at load: whether packed samples keep the log-probs that they have alone."""
        return self._packs_samples

    def measure(self, batches: Sequence[PackedBatch], *, replay: bool, policy: Policy = Policy.ACTOR) -> Measured:
        """Log-probs, entropy and routing of all trained tokens, without gradient."""
        if policy is Policy.REFERENCE:
            raise ConfigurationError("this backend holds no reference policy")
        with torch.no_grad():
            return _measured(batches, [self._forward(batch, replay=replay) for batch in batches])

    def record(self, batches: Sequence[PackedBatch]) -> tuple[tuple[PackedBatch, ...], Measured]:
        """The batches with the live router's choices as their rows."""
        if self._replay is None:
            raise ConfigurationError("routing is recorded only where replay is on")
        recorded, forwards = [], []
        for batch in batches:
            with torch.no_grad(), self._replay.recording() as record:
                forwards.append(self._forward(batch, replay=False))
            recorded.append(replace(batch, layout=replace(batch.layout, routing=record.rows())))
        return tuple(recorded), _measured(batches, forwards)

    def update(self, batches: Sequence[ScoredBatch], objective: Objective) -> Update:
        """Accumulate gradients over the micro-batches under replay, clip them, and step.

        Raises NonFiniteLoss, TrainingError without a trained token; parameters are then as before.
        """
        num_trained = sum(scored.batch.layout.num_trained for scored in batches)
        if not num_trained:
            raise TrainingError("no token of this batch may be trained")
        self._optimizer.zero_grad(set_to_none=True)
        forwards, loss, shares = [], 0.0, Counter[str]()
        for scored in batches:
            forward = self._forward(scored.batch, replay=True)
            terms = objective(LiveTokens(forward.logprobs, forward.entropy), _trained_tokens(scored, forward))
            part = (terms.loss * _weights(scored.batch)).sum()
            part.backward()
            loss += float(part.detach())
            shares.update({name: float(values.double().sum()) for name, values in terms.shares.items()})
            forwards.append(forward._replace(logprobs=forward.logprobs.detach()))
        grad_norm = self._clipped_grad_norm()
        if not np.isfinite(loss) or not np.isfinite(grad_norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise NonFiniteLoss(f"loss {loss}, gradient norm {grad_norm}: the step was not made")
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return Update(
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=float(self._optimizer.param_groups[0]["lr"]),
            shares={name: total / num_trained for name, total in shares.items()},
            measured=_measured([scored.batch for scored in batches], forwards),
        )

    def save(self, folder: Path) -> None:
        """Parameters, optimiser and random state in one file."""
        state = {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "torch_rng": torch.get_rng_state(),
        }
        torch.save(state, folder / _STATE_FILE)

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote; raises ConfigurationError if it is of another model."""
        state = torch.load(folder / _STATE_FILE, weights_only=True)
        try:
            self._model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ConfigurationError(f"checkpoint {folder} is not of the model {self._path}: {error}") from error
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"])

    def export(self, folder: Path) -> None:
        """Weights and config by transformers; tokenizer and template files are copied, never written anew."""
        self._model.save_pretrained(folder)
        for pattern in _CARRIED_OVER:
            for file in self._path.glob(pattern):
                if file.is_file():
                    shutil.copy2(file, folder / file.name)

    def close(self) -> None:
        """Nothing is held beside this process."""

    def _forward(self, batch: PackedBatch, *, replay: bool) -> _Forward:
        layout = batch.layout
        positions_S = torch.from_numpy(np.flatnonzero(layout.trained))
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(layout.input_ids.astype(np.int64))[None],
            "position_ids": torch.from_numpy(layout.position_ids.astype(np.int64))[None],
            "use_cache": False,
        }
        if self._keeps_logits:
            inputs["logits_to_keep"] = positions_S
        if replay and self._replay is not None and layout.routing is not None:
            with self._replay.replaying(layout.routing) as check:
                logits_NV = self._model(**inputs).logits[0]
            routing = check.report()
        else:
            logits_NV = self._model(**inputs).logits[0]
            rows = layout.num_positions * len(self.routed.layers) if self.routed is not None else 0
            routing = RoutingReport(total=rows, fallback=rows)
        logits_SV = logits_NV if self._keeps_logits else logits_NV[positions_S]
        logits_SV = logits_SV.float() / torch.from_numpy(layout.temperature)[positions_S, None]
        all_logprobs_SV = torch.log_softmax(logits_SV, dim=-1)
        labels_S = torch.from_numpy(layout.labels).to(torch.int64)[positions_S]
        logprobs_S = all_logprobs_SV.gather(1, labels_S[:, None])[:, 0]
        return _Forward(logprobs_S, _entropy(all_logprobs_SV.detach()), routing)

    def _clipped_grad_norm(self) -> float:
        limit = self._grad_clip if self._grad_clip > 0 else float("inf")
        return float(torch.nn.utils.clip_grad_norm_(self._model.parameters(), limit))


def _load_model(settings: ModelSettings) -> Any:
    if not (settings.path / "config.json").is_file():
        raise ConfigurationError(f"model.path {settings.path} is not a Hugging Face folder (no config.json in it)")
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            settings.path, dtype=torch.float32, experts_implementation=settings.experts, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"model.path {settings.path} cannot be loaded: {error}") from error
    return model.eval()


def _packing_holds(model: Any) -> bool:
    """Whether two short samples in one row get the logits that they get alone (not so with a recurrent state)."""
    first, second = torch.arange(1, 6)[None], torch.arange(2, 9)[None]
    position_ids = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        packed = model(input_ids=torch.cat([first, second], 1), position_ids=position_ids, use_cache=False).logits[0]
        alone = [
            model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False).logits[0]
            for ids in (first, second)
        ]
    return bool(torch.allclose(packed, torch.cat(alone), atol=_PACKING_TOLERANCE, rtol=0.0))


def _trained_tokens(scored: ScoredBatch, forward: _Forward) -> TrainedTokens:
    batch = scored.batch
    trained = batch.layout.trained
    old, ref = scored.old_logprobs, scored.ref_logprobs
    return TrainedTokens(
        rollout_logprobs=_rollout_logprobs(batch),
        old_logprobs=forward.logprobs.detach() if old is None else torch.from_numpy(old),
        ref_logprobs=None if ref is None else torch.from_numpy(ref),
        advantages=torch.from_numpy(batch.advantages[trained]),
        sample_index=torch.from_numpy(batch.sample_index[trained].astype(np.int64)),
        num_samples=len(batch.sample_starts),
    )


def _rollout_logprobs(batch: PackedBatch) -> Tensor:
    return torch.from_numpy(batch.layout.rollout_logprobs[batch.layout.trained])


def _weights(batch: PackedBatch) -> Tensor:
    return torch.from_numpy(batch.weights[batch.layout.trained])


def _measured(batches: Sequence[PackedBatch], forwards: Sequence[_Forward]) -> Measured:
    return Measured(
        logprobs=torch.cat([forward.logprobs for forward in forwards]),
        rollout_logprobs=torch.cat([_rollout_logprobs(batch) for batch in batches]),
        entropy=torch.cat([forward.entropy for forward in forwards]),
        routing=sum((forward.routing for forward in forwards), RoutingReport()),
    )


def _entropy(logprobs_SV: Tensor) -> Tensor:
    """float32[S], nats."""
    return -(logprobs_SV.exp() * logprobs_SV).sum(dim=-1)
