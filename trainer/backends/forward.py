"""One micro-batch through a model: arrays to the device, one forward, log-probs of the trained tokens.

Logits are computed at trained positions only, where the model can (`logits_to_keep`): they are the largest activation.
Nothing here waits for the device.

Shape letters: N = input positions of a micro-batch, S = its trained positions, V = vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.algorithms.objective import TrainedTokens
from trainer.backends.logprobs import Sampled, TokenScores, token_scores
from trainer.data.layout import TokenLayout
from trainer.data.packing import PackedBatch, ScoredBatch


class ModelForward:
    """The forward of one model on one device."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self._device = device
        self._keeps_logits = "logits_to_keep" in inspect.signature(_innermost(model).forward).parameters

    def __call__(self, batch: PackedBatch, *, entropy_gradient: bool = False) -> TokenScores:
        """Scores of the S trained tokens, in order of their positions."""
        layout = batch.layout
        positions_S = self.to_device(np.flatnonzero(layout.trained))
        inputs: dict[str, Any] = {
            "input_ids": self.to_device(layout.input_ids, np.int64)[None],
            "position_ids": self.to_device(layout.position_ids, np.int64)[None],
            "use_cache": False,
        }
        if self._keeps_logits:
            inputs["logits_to_keep"] = positions_S
        logits_NV = self.model(**inputs).logits[0]
        logits_SV = logits_NV if self._keeps_logits else logits_NV[positions_S]
        return token_scores(logits_SV, self._sampled(layout), entropy_gradient=entropy_gradient)

    def trained_tokens(self, scored: ScoredBatch, live: TokenScores) -> TrainedTokens:
        """What the objective is told besides the live forward."""
        batch, trained = scored.batch, scored.batch.layout.trained
        old, ref = scored.old_logprobs, scored.ref_logprobs
        return TrainedTokens(
            rollout_logprobs=self.to_device(batch.layout.rollout_logprobs[trained]),
            old_logprobs=live.logprobs.detach() if old is None else self.to_device(old),
            ref_logprobs=None if ref is None else self.to_device(ref),
            advantages=self.to_device(batch.advantages[trained]),
            sample_index=self.to_device(batch.sample_index[trained], np.int64),
            num_samples=len(batch.sample_starts),
        )

    def weights(self, batch: PackedBatch) -> Tensor:
        """float32[S]."""
        return self.to_device(batch.weights[batch.layout.trained])

    def to_device(self, values: npt.NDArray[Any], dtype: npt.DTypeLike | None = None) -> Tensor:
        """A copy of an array; to a GPU through pinned memory, so that it travels while the device computes."""
        tensor = torch.from_numpy(np.array(values, dtype=dtype))
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _sampled(self, layout: TokenLayout) -> Sampled:
        """What all positions have in common with plain sampling is left out, and costs nothing."""
        trained = layout.trained
        temperature, top_p, top_k = layout.temperature[trained], layout.top_p[trained], layout.top_k[trained]
        return Sampled(
            labels=self.to_device(layout.labels[trained], np.int64),
            temperature=self.to_device(temperature) if (temperature != 1.0).any() else None,
            top_p=self.to_device(top_p) if (top_p < 1.0).any() else None,
            top_k=self.to_device(top_k, np.int64) if (top_k > 0).any() else None,
        )


def _innermost(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
