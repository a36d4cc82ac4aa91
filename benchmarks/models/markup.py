"""How models of a family write what their template shows: calls, reasoning, and the token they stop at."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Call:
    """One call as a model means it."""

    name: str
    arguments: Mapping[str, Any]

    @property
    def json(self) -> str:
        """The arguments as JSON text."""
        return json.dumps(self.arguments, ensure_ascii=False)


WriteCalls: TypeAlias = Callable[[Sequence[Call]], str]


def hermes_calls(calls: Sequence[Call]) -> str:
    """JSON between `<tool_call>` tags."""
    return "\n".join(f'<tool_call>\n{{"name": "{c.name}", "arguments": {c.json}}}\n</tool_call>' for c in calls)


def xml_calls(calls: Sequence[Call]) -> str:
    """One element a parameter."""
    written = []
    for call in calls:
        parameters = "".join(f"<parameter={k}>\n{_plain(v)}\n</parameter>\n" for k, v in call.arguments.items())
        written.append(f"<tool_call>\n<function={call.name}>\n{parameters}</function>\n</tool_call>")
    return "\n".join(written)


def key_value_calls(calls: Sequence[Call]) -> str:
    """The name, then tagged keys and values."""
    written = []
    for call in calls:
        pairs = "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{_plain(value)}</arg_value>\n"
            for key, value in call.arguments.items()
        )
        written.append(f"\n<tool_call>{call.name}\n{pairs}</tool_call>")
    return "".join(written)


def list_calls(calls: Sequence[Call]) -> str:
    """One JSON list behind a token."""
    return "[TOOL_CALLS] " + json.dumps([{"name": c.name, "arguments": c.arguments} for c in calls], ensure_ascii=False)


def named_calls(calls: Sequence[Call]) -> str:
    """A token, the name, a token, the arguments; again for each call."""
    return "".join(f"[TOOL_CALLS]{call.name}[ARGS]{call.json}" for call in calls)


def section_calls(calls: Sequence[Call]) -> str:
    """A section of numbered calls."""
    inside = "".join(
        f"<|tool_call_begin|>functions.{call.name}:{i}<|tool_call_argument_begin|>{call.json}<|tool_call_end|>"
        for i, call in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inside}<|tool_calls_section_end|>"


def separated_calls(calls: Sequence[Call]) -> str:
    """A section of calls, name and arguments separated by a token."""
    inside = "".join(f"<｜tool▁call▁begin｜>{c.name}<｜tool▁sep｜>{c.json}<｜tool▁call▁end｜>" for c in calls)
    return f"<｜tool▁calls▁begin｜>{inside}<｜tool▁calls▁end｜>"


def braced_calls(calls: Sequence[Call]) -> str:
    """`call:name{…}` between tokens."""
    return "".join(f"<|tool_call>call:{call.name}{call.json}<tool_call|>" for call in calls)


def bare_calls(calls: Sequence[Call]) -> str:
    """The whole reply is one JSON object; more than one call cannot be said."""
    return f'{{"name": "{calls[0].name}", "parameters": {calls[0].json}}}'


def line_calls(calls: Sequence[Call]) -> str:
    """One JSON object a line."""
    lines = "".join("\n" + json.dumps({"name": c.name, "arguments": c.arguments}, ensure_ascii=False) for c in calls)
    return f"<calls>{lines}\n</calls>"


def channel_calls(calls: Sequence[Call]) -> str:
    """A message to a function; one a turn."""
    return f"<|channel|>commentary to=functions.{calls[0].name} <|constrain|>json<|message|>{calls[0].json}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
