"""What `verbatim doctor --model` says of routing replay: whether a model's routing can be replayed, proved on the spot.

The proof: the recorded routing, replayed, gives bitwise the logits of the untouched model; foreign random routing gives
finite logits, is what every router used, and leaves every router its gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from gateway.contracts.errors import ConfigurationError, ReplayUnsupported
from trainer.replay.inject import RoutingReplay
from trainer.replay.plan import DenseModel, ReplayPlan
from trainer.replay.reduced import small_model
from trainer.replay.rows import RoutingRows
from trainer.replay.slots import recorded_rows

_NUM_TOKENS = 12


def examine(folder: Path) -> Mapping[str, Any]:
    """A JSON object: `status` is supported, dense, unsupported or unknown, with `reason` unless it is supported; of a
    supported model also its routers, and how the proof was made."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        small = small_model(folder)
    except ConfigurationError as error:
        return {"status": "unknown", "reason": error.message}
    try:
        replay, failures = _proof(small.model)
    except DenseModel as error:
        return {"status": "dense", "reason": error.message, "proved_on": small.origin}
    except ReplayUnsupported as error:
        return {"status": "unsupported", "reason": error.message, "proved_on": small.origin}
    shape = replay.plan.shape
    per_token = small.num_layers * shape.top_k * shape.dtype.itemsize
    facts = _facts(replay.plan) | {
        "model_layers": small.num_layers,
        "bytes_per_token": per_token,
        "proved_on": small.origin,
    }
    if failures:
        return {"status": "unsupported", "reason": "; ".join(failures), **facts}
    return {"status": "supported", **facts}


def _facts(plan: ReplayPlan) -> dict[str, Any]:
    shape = plan.shape
    return {
        "routers": sorted({site.router for site in plan.routers}),
        "layers": len(plan.routers),
        "decoder_layers": shape.num_layers,
        "left_alone": {str(layer): reason for layer, reason in plan.left_alone.items()},
        "experts": shape.num_experts,
        "experts_per_token": shape.top_k,
        "dtype": str(shape.dtype),
        "selected_by": sorted({site.selection.function or site.override for site in plan.routers}),
        "witness": sorted({site.witness.value for site in plan.routers}),
        "override": sorted({site.override for site in plan.routers if site.override}),
    }


def _proof(model: Any) -> tuple[RoutingReplay, list[str]]:
    """The installed replay, and each part of the proof that failed in words."""
    vocabulary = min(model.config.get_text_config().vocab_size, 256)
    input_ids = (torch.arange(_NUM_TOKENS) * 7 % (vocabulary - 1) + 1)[None]

    def logits() -> torch.Tensor:
        return model(input_ids=input_ids, use_cache=False).logits

    with torch.no_grad():
        untouched = logits()
        replay = RoutingReplay.install(model)
        with replay.recording() as record:
            recorded = logits()
        with replay.replaying(record.rows()) as check:
            replayed = logits()
    failures = []
    if not (torch.equal(untouched, recorded) and torch.equal(untouched, replayed)):
        failures.append("replaying what was recorded changes its logits")
    if check.report().verified != check.report().total:
        failures.append("routers did not use the recorded experts")
    with replay.replaying(_foreign(replay)) as check:
        output = logits()
    output.log_softmax(dim=-1)[..., 1].sum().backward()
    if not bool(output.isfinite().all()):
        failures.append("foreign routing gives logits that are not finite")
    if check.report().verified != check.report().total:
        failures.append("routers did not use foreign experts that they were given")
    without = [site.path for site in replay.plan.routers if not _has_gradient(model.get_submodule(site.path))]
    if without:
        failures.append(f"routers without gradient under replay: {without}")
    return replay, failures


def _foreign(replay: RoutingReplay) -> RoutingRows:
    rng, shape = np.random.default_rng(0), replay.plan.shape
    ids_NLK = np.zeros((_NUM_TOKENS, shape.num_layers, shape.top_k), dtype=shape.dtype)
    for site in replay.plan.routers:
        order_NE = rng.random((_NUM_TOKENS, site.selection.num_scores)).argsort(axis=1)
        ids_NLK[:, site.layer, : site.selection.top_k] = order_NE[:, : site.selection.top_k]
    return recorded_rows(ids_NLK, replay.plan.routed)


def _has_gradient(router: torch.nn.Module) -> bool:
    return any(
        parameter.grad is not None and bool(parameter.grad.any())
        for name, parameter in router.named_parameters()
        if "expert" not in name
    )
