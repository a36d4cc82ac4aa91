"""Policy versions and the engines' weight labels: ours is `policy-000012`; others are translated where known."""

from __future__ import annotations

import re
from collections.abc import Mapping

from gateway.contracts.errors import UnknownWeights

_OUR_LABEL = re.compile(r"policy-(\d{6,})")
LOADING = "-loading"
"""Ends the label of an engine that holds some tensors of the next weights and some of those before."""
_INITIAL_LABEL = "default"
"""What SGLang calls weights that nobody labelled: those it was started with."""


def weight_label(policy_version: int) -> str:
    """The label of a policy version.

    >>> weight_label(12)
    'policy-000012'
    """
    if policy_version < 0:
        raise ValueError(f"policy version {policy_version} is negative")
    return f"policy-{policy_version:06d}"


def policy_version_of(label: str, known: Mapping[str, int]) -> int:
    """The version of an engine's label: as remembered in `known`, else of our form, a plain number, or "default" (0).

    Raises UnknownWeights for any other label, and that of an engine in the middle of taking weights: a version is never
    guessed (I5, I9).
    """
    if label in known:
        return known[label]
    ours = _OUR_LABEL.fullmatch(label)
    if ours is not None:
        return int(ours[1])
    if label.isdecimal() and label.isascii():
        return int(label)
    if label == _INITIAL_LABEL:
        return 0
    if label.endswith(LOADING):
        raise UnknownWeights(
            f"the engine holds a part of the weights {label.removesuffix(LOADING)}: publish again, or restart it"
        )
    raise UnknownWeights(f"weight version {label!r} of the engine stands for no policy version that is known")
