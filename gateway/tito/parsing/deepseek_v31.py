"""DeepSeek-V3.1 calls: `NAME<｜tool▁sep｜>{arguments}` between the markers of DeepSeek-V3."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.contracts.generation import JsonValue
from gateway.tito.parsing.calls import PROBE_NAME, CallFamily, CallFrame, WrittenCall, split_at
from gateway.tito.parsing.deepseek_v3 import SEPARATOR, deepseek_frame
from gateway.tito.parsing.json_text import object_text
from gateway.tito.parsing.markers import Marker, Scanned, marker
from gateway.tito.tokenizer import ChatTokenizer

_NAME = re.compile(r"\s*(\S+)\s*")


@dataclass(frozen=True, slots=True)
class DeepSeekV31Calls:
    """The syntax with this tokenizer's markers."""

    frame: CallFrame
    separator: Marker

    def read(self, body: Sequence[Scanned], tools: Sequence[JsonValue]) -> tuple[WrittenCall, ...] | None:
        """The name and JSON arguments as written."""
        parts = split_at(body, self.separator)
        name = _NAME.fullmatch(parts[0]) if parts is not None else None
        arguments = object_text(parts[1]) if parts is not None else None
        return None if name is None or arguments is None else (WrittenCall(name.group(1), arguments),)


def deepseek_v31_calls(tokenizer: ChatTokenizer) -> DeepSeekV31Calls:
    """The syntax with this tokenizer's markers."""
    return DeepSeekV31Calls(deepseek_frame(tokenizer), marker(tokenizer, SEPARATOR))


DEEPSEEK_V31 = CallFamily(
    name="deepseek_v31",
    written=re.compile(rf"<｜tool▁call▁begin｜>\s*{PROBE_NAME}{SEPARATOR}"),
    tokens=(),
    make=deepseek_v31_calls,
)
