"""Example records: what a small one looks like, for documentation, tools and tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from gateway.contracts.generation import Finish, FinishReason, LogprobKind
from gateway.contracts.records import Attachment, MatchTier, RootContext, SegmentReason, TurnRecord
from gateway.contracts.versions import VersionSpan


def example_turn(index: int = 0, **fields: Any) -> TurnRecord:
    """A turn of session "s" named `t{index}`: three prompt tokens, two sampled by policy 0, no routing, not delivered.

    fields: of the record, in place of the example's. A turn whose `attachment` names a parent needs `root=None`.
    """
    example: dict[str, Any] = {
        "session_id": "s",
        "turn_id": f"t{index}",
        "index": index,
        "attachment": Attachment(None, None, MatchTier.NONE, SegmentReason.FIRST),
        "root": RootContext((), {}),
        "added_messages": (),
        "reply": {},
        "prompt_token_ids": np.array([1, 2, 3], dtype=np.int32),
        "output_token_ids": np.array([4, 5], dtype=np.int32),
        "output_logprobs": np.array([-0.5, -0.25], dtype=np.float32),
        "version_spans": (VersionSpan(0, 2, 0),),
        "finish": Finish(FinishReason.STOP),
        "logprob_kind": LogprobKind.TEMPERATURE_SCALED,
        "sampling": {},
        "num_layers": 0,
        "num_experts": 0,
        "top_k": 0,
        "experts_start": 0,
        "experts_stop": 0,
        "engine_id": "e",
        "model": "m",
        "request_digest": "",
        "cached_tokens": 0,
        "num_retractions": 0,
        "meta": {},
        "untrainable_reason": None,
        "created_at": 0.0,
        "delivered_at": None,
    }
    return TurnRecord(**(example | fields))
