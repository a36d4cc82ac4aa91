"""Policy versions per token (I5): spans over a turn's output tokens, and their expansion to one integer a token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from gateway.contracts.errors import LengthMismatch
from gateway.contracts.frozen import frozen_dataclass

NOT_SAMPLED = -1
"""The version of a token that no policy sampled (prompts, tool results, closing tokens)."""


class CacheFlag(StrEnum):
    """What weights that changed under a turn did to the cache that it was sampled on.

    RECOMPUTED: what came before the change was computed anew under the later weights, and its later tokens stand on
    that. OLDER: its later tokens stand on keys and values of the weights before.
    """

    RECOMPUTED = "recomputed"
    OLDER = "older"


@frozen_dataclass(frozen=True, slots=True)
class VersionSpan:
    """Output tokens `[start, stop)` of one turn were sampled by `policy_version`.

    >>> VersionSpan(0, 39, 4)
    VersionSpan(start=0, stop=39, policy_version=4)
    """

    start: int
    stop: int
    policy_version: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise LengthMismatch(f"version span [{self.start}, {self.stop}) is not a range of tokens")
        if self.policy_version < 0:
            raise LengthMismatch(f"policy version {self.policy_version} of a sampled token is negative")


def check_spans(spans: Sequence[VersionSpan], num_tokens: int) -> None:
    """Raise LengthMismatch unless the spans cover `[0, num_tokens)` in order, without gap or overlap."""
    at = 0
    for span in spans:
        if span.start != at:
            raise LengthMismatch(f"version span starts at token {span.start}, expected {at}")
        at = span.stop
    if at != num_tokens:
        raise LengthMismatch(f"version spans cover {at} tokens of {num_tokens}")


def expand_spans(spans: Sequence[VersionSpan], num_tokens: int) -> npt.NDArray[np.int32]:
    """The policy version of each output token, int32[num_tokens]; raises LengthMismatch as `check_spans` does."""
    check_spans(spans, num_tokens)
    versions = np.full(num_tokens, NOT_SAMPLED, dtype=np.int32)
    for span in spans:
        versions[span.start : span.stop] = span.policy_version
    return versions


def shifted_spans(spans: Iterable[VersionSpan], by: int) -> list[VersionSpan]:
    """The same spans, `by` tokens later."""
    if not by:
        return list(spans)
    return [VersionSpan(span.start + by, span.stop + by, span.policy_version) for span in spans]


def join_spans(spans: Iterable[VersionSpan]) -> tuple[VersionSpan, ...]:
    """Drop empty spans and merge neighbours of one version; the covered range stays the same."""
    spans = tuple(spans)
    if len(spans) == 1 and spans[0].start != spans[0].stop:  # nearly always
        return spans
    joined: list[VersionSpan] = []
    for span in spans:
        if span.start == span.stop:
            continue
        last = joined[-1] if joined else None
        if last is not None and last.policy_version == span.policy_version and last.stop == span.start:
            joined[-1] = VersionSpan(last.start, span.stop, span.policy_version)
        else:
            joined.append(span)
    return tuple(joined)
