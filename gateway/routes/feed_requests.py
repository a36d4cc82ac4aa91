"""Bodies of the feed's calls, checked: `LeaseRequest` and `ExtendRequest`; what is wrong names its field."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import JsonValue

MAX_LEASE_ID_CHARACTERS = 128


class Wanted(NamedTuple):
    """What a consumer waits for; who wants the same can wait together. labels: sorted pairs."""

    consumer: str
    whole_groups: bool
    labels: tuple[tuple[str, str], ...]
    group_deadline_seconds: float | None

    def may_be_served_by(self, labels: Mapping[str, str]) -> bool:
        """Whether a session with these labels can be part of it."""
        return all(labels.get(name) == value for name, value in self.labels)


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """Body of `POST /feed/leases`.

    wait_seconds: how long to wait for a first rollout (at most 60 s at a time). group_deadline_seconds: when a group is
    lent in part, counted from the end of its first rollout; None: never. lease_id: the caller's own, so that a call
    whose reply was lost can be repeated.
    """

    consumer: str
    limit: int
    wait_seconds: float = 0.0
    lease_seconds: float = 600.0
    whole_groups: bool = True
    labels: Mapping[str, str] | None = None
    group_deadline_seconds: float | None = None
    lease_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        _require(isinstance(self.consumer, str) and self.consumer != "", "consumer: expected a non-empty string")
        _require(_is_integer(self.limit) and 1 <= self.limit < 2**63, "limit: expected a whole number of at least 1")
        _require(_is_seconds(self.wait_seconds), "wait_seconds: expected a number of seconds, 0 or more")
        _require(_is_duration(self.lease_seconds), "lease_seconds: expected seconds above 0")
        _require(isinstance(self.whole_groups, bool), "whole_groups: expected true or false")
        _require(self.labels is None or _is_labels(self.labels), "labels: expected an object of strings")
        _require(
            self.group_deadline_seconds is None or _is_seconds(self.group_deadline_seconds),
            "group_deadline_seconds: expected a number of seconds, 0 or more, or null",
        )
        _require(
            isinstance(self.lease_id, str) and 1 <= len(self.lease_id) <= MAX_LEASE_ID_CHARACTERS,
            f"lease_id: expected a string of 1 to {MAX_LEASE_ID_CHARACTERS} characters",
        )

    @classmethod
    def of_body(cls, body: Mapping[str, JsonValue]) -> LeaseRequest:
        """From the fields of a body; raises InvalidRequest."""
        missing = [name for name in ("consumer", "limit") if name not in body]
        _require(not missing, f"{', '.join(missing)}: is required")
        return cls(**_fields(body))

    @property
    def wanted(self) -> Wanted:
        """What it waits for."""
        labels = tuple(sorted((self.labels or {}).items()))
        return Wanted(self.consumer, self.whole_groups, labels, self.group_deadline_seconds)


@dataclass(frozen=True, slots=True)
class ExtendRequest:
    """Body of `POST /feed/leases/{lease_id}/extend`: how long the lease is to run from now."""

    lease_seconds: float = 600.0

    def __post_init__(self) -> None:
        _require(_is_duration(self.lease_seconds), "lease_seconds: expected seconds above 0")

    @classmethod
    def of_body(cls, body: Mapping[str, JsonValue]) -> ExtendRequest:
        """From the fields of a body; raises InvalidRequest."""
        return cls(**_fields(body))


def field_names(kind: type[LeaseRequest] | type[ExtendRequest]) -> tuple[str, ...]:
    """What its body may have."""
    return tuple(known.name for known in fields(kind))


def _fields(body: Mapping[str, JsonValue]) -> dict[str, Any]:
    """A lease id that is null is absent; no other field of these bodies has a null of its own."""
    return {name: value for name, value in body.items() if not (name == "lease_id" and value is None)}


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvalidRequest(message)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9


def _is_duration(value: object) -> bool:
    return _is_seconds(value) and value != 0


def _is_labels(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
