"""Segment: a root-to-leaf run of turns as aligned arrays; the one type that crosses from gateway to trainer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gateway.contracts.errors import LengthMismatch
from gateway.contracts.experts import ExpertIds
from gateway.contracts.generation import LogprobKind, TokenIds
from gateway.contracts.versions import NOT_SAMPLED


@dataclass(frozen=True, slots=True)
class TurnSpan:
    """Where one turn lies in its segment: prompt tokens [start, output_start), sampled tokens [output_start, stop).

    `trained`: its sampled tokens carry loss here (a shared prefix trains in one segment only, I3).
    `temperature`, `top_p`, `top_k`: of the sampling distribution that the log-probs belong to.
    `cache_flags`: values of `versions.CacheFlag`, where weights changed under the turn.
    """

    turn_id: str
    start: int
    output_start: int
    stop: int
    trained: bool
    finish_reason: str
    temperature: float
    top_p: float
    top_k: int
    cache_flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Aligned arrays of T tokens (I2); checked at construction.

    token_ids int32[T] · loss_mask bool[T] (True = trained) · rollout_logprobs float32[T] (NaN where not sampled)
    policy_version int32[T] (-1 where not sampled) · routed_experts uint8/uint16[T-1, L, K] or None
    routed_valid bool[T-1]: which rows were really recorded (all False without routing).

    Example with T = 5, two prompt tokens and three sampled ones: loss_mask is F F T T T, the log-prob of token 2 was
    computed from input token 1, whose experts are row 1; token 4 was never an input, so there is no row 4.
    """

    segment_id: str
    turns: tuple[TurnSpan, ...]
    token_ids: TokenIds
    loss_mask: npt.NDArray[np.bool_]
    rollout_logprobs: npt.NDArray[np.float32]
    policy_version: npt.NDArray[np.int32]
    routed_experts: ExpertIds | None
    routed_valid: npt.NDArray[np.bool_]
    logprob_kind: LogprobKind

    def __post_init__(self) -> None:
        num_tokens = len(self.token_ids)
        lengths = {
            "loss_mask": len(self.loss_mask),
            "rollout_logprobs": len(self.rollout_logprobs),
            "policy_version": len(self.policy_version),
            "routed_valid + 1": len(self.routed_valid) + 1,
        }
        if self.routed_experts is not None:
            lengths["routed_experts + 1"] = len(self.routed_experts) + 1
        for name, length in lengths.items():
            if length != num_tokens:
                raise LengthMismatch(f"segment {self.segment_id}: {name} is {length}, token_ids {num_tokens} (I2)")
        if bool((self.loss_mask & np.isnan(self.rollout_logprobs)).any()):
            raise LengthMismatch(f"segment {self.segment_id}: a trained token has no log-prob (I9)")
        if bool((self.loss_mask & (self.policy_version == NOT_SAMPLED)).any()):
            raise LengthMismatch(f"segment {self.segment_id}: a trained token has no policy version (I5)")

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)
