"""Fields that agents may not set: the engines' own, those that the operator denies, and those that the session pins.

By default they are ignored: the turn's record names them, and the pinned value counts. With `answer = "refuse"` the
call is a 400 that names the field. What the gateway itself must ask for never depends on a field (I7).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from msgspec.structs import replace

from gateway.contracts.errors import ConfigurationError, InvalidRequest
from gateway.contracts.generation import JsonValue
from gateway.wire.fields import inside
from gateway.wire.request import PROTECTED, TurnRequest
from gateway.wire.sampling import ALIASES, DEFAULT_LENGTH, SAMPLING_EXTRA, TYPED_SAMPLING, UNKNOWN, sampling_fields

_SAME = {**ALIASES, "extra_args": "custom_params", "response_format": "json_schema", "vllm_xargs": "custom_params"}
"""Names → the one name of what they all set."""

_GRAMMARS = frozenset(("ebnf", "json_schema", "regex", "structural_tag", "structured_outputs"))
"""Of which an engine takes one: a pinned one leaves no room for another."""

_NEEDED = frozenset(
    (
        "chat_template_kwargs", "input", "logprobs", "messages", "model", "n", "parallel_tool_calls", "prompt",
        "return_routed_experts", "return_token_ids", "stream", "stream_options", "tool_choice", "tools", "top_logprobs",
    )
)  # fmt: skip
"""What a call means, or shows; no engine gets these as they are."""

_PINNABLE = TYPED_SAMPLING | SAMPLING_EXTRA | {"response_format"}


class FieldAnswer(StrEnum):
    """What an agent hears that sets a field it may not set."""

    IGNORE = "ignore"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class FieldSettings:
    """denied: names that agents may not set, besides the engines' own: sampling fields under any of their names, fields
    that nobody here knows, arguments of the chat template."""

    denied: tuple[str, ...] = ()
    answer: FieldAnswer = FieldAnswer.IGNORE

    def __post_init__(self) -> None:
        if needed := sorted(_NEEDED & set(self.denied)):
            raise ConfigurationError(f"fields.denied: {', '.join(needed)} cannot be denied; the gateway needs it")


class FieldRules:
    """Holds requests against the settings."""

    def __init__(self, settings: FieldSettings) -> None:
        self._denied = frozenset(_SAME.get(name, name) for name in settings.denied)
        self._refuses = settings.answer is FieldAnswer.REFUSE

    def applied(self, request: TurnRequest, pinned: Mapping[str, JsonValue]) -> TurnRequest:
        """The request without what it may not set, each of that named in `ignored_fields`.

        pinned: the session's sampling as the operator wrote it. Raises InvalidRequest naming the field where such
        fields are refused; a value that equals the pinned one is none of them.
        """
        if not (pinned or self._denied or self._refuses):
            return request
        pins = sampling_fields(pinned) if pinned else {}
        overruled = [name for name in request.sampling if _is_overruled(name, request.sampling[name], pins)]
        denied = [name for name in _names(request) if _SAME.get(name, name) in self._denied]
        if self._refuses:
            _refuse_any(_protected(request.ignored_fields), denied, overruled, pins)
        if not denied and not overruled:
            return request
        gone = {*denied, *overruled}
        sampling = _without(request.sampling, gone)
        if UNKNOWN in sampling:
            sampling[UNKNOWN] = _without(sampling[UNKNOWN], gone)
        return replace(
            request,
            sampling=sampling,
            passthrough=_without(request.passthrough, gone),
            template_arguments=_without(request.template_arguments, gone),
            ignored_fields=tuple(sorted({*request.ignored_fields, *gone})),
        )


def check_pins(sampling: Mapping[str, JsonValue]) -> None:
    """Raise InvalidRequest for what a session cannot pin: an unknown name, with the nearest one, or a wrong value."""
    for name in sampling:
        if name not in _PINNABLE:
            near = difflib.get_close_matches(name, _PINNABLE, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(_PINNABLE))}"
            raise InvalidRequest(f"sampling.{name}: unknown field{hint}")
    with inside("sampling"):
        sampling_fields(sampling)


def _names(request: TurnRequest) -> list[str]:
    """Of all that would reach the engine or the template, as far as an agent chose it."""
    sampling = [name for name in request.sampling if name not in (UNKNOWN, DEFAULT_LENGTH)]
    return [*sampling, *request.sampling.get(UNKNOWN, ()), *request.passthrough, *request.template_arguments]


def _is_overruled(name: str, value: JsonValue, pins: Mapping[str, JsonValue]) -> bool:
    if name in _GRAMMARS and name not in pins:
        return not _GRAMMARS.isdisjoint(pins)
    return name in pins and pins[name] != value


def _protected(ignored: Iterable[str]) -> list[str]:
    """Dialects leave out fields for other reasons too, which are nobody's fault."""
    return [name for name in ignored if name.removeprefix("sampling_params.") in PROTECTED]


def _refuse_any(protected: list[str], denied: list[str], overruled: list[str], pins: Mapping[str, JsonValue]) -> None:
    for name in protected:
        raise InvalidRequest(f"{name}: only the gateway sets this field (setting fields.answer is refuse)")
    for name in denied:
        raise InvalidRequest(f"{_spelt(name)}: agents may not set this field here (setting fields.denied)")
    for name in overruled:
        pin = f"to {pins[name]!r}" if name in pins else f"by its {', '.join(sorted(_GRAMMARS & pins.keys()))}"
        raise InvalidRequest(f"{_spelt(name)}: this session pins it {pin} (setting fields.answer is refuse)")


def _spelt(name: str) -> str:
    """With the other names that an agent may have used."""
    others = sorted(alias for alias, same in _SAME.items() if same == name)
    return f"{name} ({', '.join(others)})" if others else name


def _without(fields: Mapping[str, JsonValue], names: Iterable[str]) -> dict[str, JsonValue]:
    return {name: value for name, value in fields.items() if name not in names}
