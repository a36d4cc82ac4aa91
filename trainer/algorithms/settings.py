"""The `[advantage]` and `[loss]` tables of a recipe file: names, and what holds where a table does not say. No torch.

An open value (None) is the chosen algorithm's own default, because one default for all would be wrong by orders of
magnitude: GSPO's clip is a thousandth of PPO's. A value that the chosen algorithm does not use is refused, not ignored.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from gateway.contracts.errors import ConfigurationError


class Bounds(NamedTuple):
    """A lower and an upper one."""

    low: float
    high: float


class PolicyDefaults(NamedTuple):
    """What open settings are with a loss. clip: distances of the ratio's bounds from 1; None: it clips nothing."""

    clip: Bounds | None
    aggregation: str


class CorrectionDefaults(NamedTuple):
    """A correction's bounds of w, None where it has no such bound; weighs: whether what it keeps is multiplied by w."""

    low: float | None
    high: float | None
    weighs: bool


ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++-baseline")
AGGREGATIONS = ("token", "sequence", "constant")
KL_ESTIMATORS = ("k1", "k2", "k3")
POLICIES: Mapping[str, PolicyDefaults] = {
    "ppo": PolicyDefaults(Bounds(0.2, 0.28), "token"),  # DAPO's clip-higher, arXiv 2503.14476, section 3.1
    "gspo": PolicyDefaults(Bounds(3e-4, 4e-4), "sequence"),  # arXiv 2507.18071, section 5.1
    # arXiv 2506.13585 leaves out the lower bound and does not print the upper one: [0, 5] is what others use.
    "cispo": PolicyDefaults(Bounds(1.0, 4.0), "token"),
    "reinforce": PolicyDefaults(None, "token"),
}
CORRECTIONS: Mapping[str, CorrectionDefaults] = {
    "off": CorrectionDefaults(None, None, weighs=False),
    "mask": CorrectionDefaults(0.5, 2.0, weighs=False),
    "tis": CorrectionDefaults(None, 2.0, weighs=True),
    "tis-sequence": CorrectionDefaults(None, 5.0, weighs=True),
    "icepop": CorrectionDefaults(0.5, 5.0, weighs=True),
    "mis-sequence": CorrectionDefaults(0.0, 2.0, weighs=True),
    "mis-geometric": CorrectionDefaults(0.99, 1.01, weighs=False),
}


def is_reference(name: str) -> bool:
    """Whether `name` points at a function of the user's, as `FILE.py:NAME`."""
    return ".py:" in name


@dataclass(frozen=True, slots=True)
class AdvantageSettings:
    """`estimator`: grpo, dr_grpo, rloo, reinforce++, reinforce++-baseline, or a function of yours as `FILE.py:NAME`."""

    estimator: str = "grpo"

    def __post_init__(self) -> None:
        _require_known("advantage.estimator", self.estimator, ESTIMATORS)


class OldPolicy(StrEnum):
    """Whose log-probs stand below the ratio: the trainer's own before the step, or the engine's as recorded."""

    TRAIN = "train"
    ROLLOUT = "rollout"


@dataclass(frozen=True, slots=True)
class LossSettings:
    """`policy`: ppo, gspo, cispo, reinforce, or a loss of yours as `FILE.py:NAME`.

    clip_low, clip_high: distances of the ratio's bounds from 1; None: the loss's own (ppo 0.2 and 0.28, gspo 3e-4 and
    4e-4, cispo 1 and 4). clip_dual: PPO's upper bound of the ratio where the advantage is negative; 0 is off.
    aggregation: token, sequence, constant or `FILE.py:NAME`; None: the loss's own (gspo sequence, all others token).
    constant_tokens: the denominator of a rollout in `constant`. kl_coefficient: of `kl_estimator` (k1, k2, k3) against
    the reference policy; 0 needs none. entropy_coefficient: of the entropy bonus.
    correction: of the gap between engine and trainer, over w = exp(old - rollout): off, tis, tis-sequence, mask (tokens
    outside [correction_low, correction_high] do not train), icepop, mis-sequence, mis-geometric, or `FILE.py:NAME`;
    correction_low, correction_high: bounds of w; None: the correction's own.
    """

    policy: str = "ppo"
    clip_low: float | None = None
    clip_high: float | None = None
    clip_dual: float = 0.0
    aggregation: str | None = None
    constant_tokens: int = 0
    old_policy: OldPolicy = OldPolicy.TRAIN
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"
    entropy_coefficient: float = 0.0
    correction: str = "mask"
    correction_low: float | None = None
    correction_high: float | None = None

    def __post_init__(self) -> None:
        _require_known("loss.policy", self.policy, POLICIES)
        _require_known("loss.correction", self.correction, CORRECTIONS)
        _require_known("loss.kl_estimator", self.kl_estimator, KL_ESTIMATORS, own=False)
        if self.aggregation is not None:
            _require_known("loss.aggregation", self.aggregation, AGGREGATIONS)
        self._check_clip()
        self._check_correction()
        constant = self.aggregation == "constant"
        _require(
            self.constant_tokens >= 1 if constant else self.constant_tokens == 0,
            f"loss.constant_tokens is {self.constant_tokens}; it must be at least 1 with aggregation = constant, "
            "and belongs to no other",
        )
        for name, value in (("kl", self.kl_coefficient), ("entropy", self.entropy_coefficient)):
            _require(0 <= value < math.inf, f"loss.{name}_coefficient is {value}; it must be finite and not negative")

    @property
    def clip(self) -> Bounds | None:
        """The clip in force, None where the policy loss has none (or has its own, in a file of yours)."""
        own = POLICIES[self.policy].clip if self.policy in POLICIES else None
        if own is None:
            return None
        return Bounds(
            own.low if self.clip_low is None else self.clip_low,
            own.high if self.clip_high is None else self.clip_high,
        )

    @property
    def correction_bounds(self) -> Bounds:
        """The bounds of w in force; 0 and infinity where the correction has none."""
        own = CORRECTIONS.get(self.correction, CORRECTIONS["off"])
        low = own.low if self.correction_low is None else self.correction_low
        high = own.high if self.correction_high is None else self.correction_high
        return Bounds(0.0 if low is None else low, math.inf if high is None else high)

    @property
    def aggregation_in_force(self) -> str:
        """`aggregation`, or the policy loss's own."""
        if self.aggregation is not None:
            return self.aggregation
        return POLICIES[self.policy].aggregation if self.policy in POLICIES else "token"

    def _check_clip(self) -> None:
        clip = self.clip
        if clip is None:
            unused = [name for name in ("clip_low", "clip_high") if getattr(self, name) is not None]
            _require(not unused, f"loss.{' and loss.'.join(unused)} would have no effect: {self.policy} does not clip")
        else:
            _require(0 < clip.low <= 1, f"loss.clip_low is {clip.low}; it must be in (0, 1]")
            _require(0 < clip.high < math.inf, f"loss.clip_high is {clip.high}; it must be positive and finite")
        dual = self.clip_dual
        _require(dual == 0 or 1 < dual < math.inf, f"loss.clip_dual is {dual}; it must be 0 or above 1")
        _require(dual == 0 or self.policy == "ppo", f"loss.clip_dual belongs to ppo; loss.policy is {self.policy}")

    def _check_correction(self) -> None:
        own = CORRECTIONS.get(self.correction, CORRECTIONS["off"])
        for name, value, default in (
            ("correction_low", self.correction_low, own.low),
            ("correction_high", self.correction_high, own.high),
        ):
            _require(value is None or default is not None, f"loss.{name} would have no effect on {self.correction}")
        low, high = self.correction_bounds
        _require(
            0 <= low <= 1 <= high and low < high,
            f"loss.correction_low {low} and loss.correction_high {high} must have 1 between them: w is 1 without a gap",
        )
        twice = own.weighs and self.old_policy is OldPolicy.ROLLOUT and self.policy != "reinforce"
        _require(
            not twice,
            f"loss.correction {self.correction} weighs by exp(old - rollout), which the ratio holds already with "
            "old_policy = rollout; choose mask, mis-geometric or off",
        )


def _require_known(key: str, name: str, known: Iterable[str], *, own: bool = True) -> None:
    if name in known or (own and is_reference(name)):
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}{', or FILE.py:NAME' if own else ''}"
    raise ConfigurationError(f"{key} {name!r} is unknown; {hint}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigurationError(message)
