"""DeepSeek-V3 and R1 calls: `function<｜tool▁sep｜>NAME`, then the arguments as a fenced JSON block.

All calls of a reply stand in one section. DeepSeek-V3.1 kept the markers and changed what is between (`deepseek_v31`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.contracts.generation import JsonValue
from gateway.tito.parsing.calls import PROBE_NAME, CallFamily, CallFrame, Section, WrittenCall, split_at
from gateway.tito.parsing.json_text import object_text
from gateway.tito.parsing.markers import Marker, Scanned, marker
from gateway.tito.tokenizer import ChatTokenizer

SEPARATOR = "<｜tool▁sep｜>"
_HEAD = re.compile(r"\s*(\S+)[ \t]*\n```(?:json)?")
_FENCE = "```"


@dataclass(frozen=True, slots=True)
class DeepSeekV3Calls:
    """The syntax with this tokenizer's markers."""

    frame: CallFrame
    separator: Marker

    def read(self, body: Sequence[Scanned], tools: Sequence[JsonValue]) -> tuple[WrittenCall, ...] | None:
        """The kind of call (always `function`), the name, and JSON arguments as written."""
        parts = split_at(body, self.separator)
        head = _HEAD.match(parts[1]) if parts is not None and parts[0].strip() == "function" else None
        if parts is None or head is None:
            return None
        block = parts[1][head.end() :].rstrip()
        arguments = object_text(block.removesuffix(_FENCE)) if block.endswith(_FENCE) else None
        return None if arguments is None else (WrittenCall(head.group(1), arguments),)


def deepseek_frame(tokenizer: ChatTokenizer) -> CallFrame:
    """The markers that all DeepSeek models of this generation share."""
    return CallFrame(
        opener=marker(tokenizer, "<｜tool▁call▁begin｜>"),
        closer=marker(tokenizer, "<｜tool▁call▁end｜>"),
        inner=(marker(tokenizer, SEPARATOR),),
        section=Section(marker(tokenizer, "<｜tool▁calls▁begin｜>"), marker(tokenizer, "<｜tool▁calls▁end｜>")),
    )


def deepseek_v3_calls(tokenizer: ChatTokenizer) -> DeepSeekV3Calls:
    """The syntax with this tokenizer's markers."""
    return DeepSeekV3Calls(deepseek_frame(tokenizer), marker(tokenizer, SEPARATOR))


DEEPSEEK_V3 = CallFamily(
    name="deepseek_v3",
    written=re.compile(rf"function{SEPARATOR}{PROBE_NAME}\s*```json"),
    tokens=("<｜tool▁calls▁begin｜>", SEPARATOR),
    make=deepseek_v3_calls,
)
