"""Whether a new turn's full render still shows the history that the last prompt was made of, and if not, why."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from gateway.contracts.errors import TemplateRaised
from gateway.contracts.generation import JsonValue, TokenIds
from gateway.tito.conversation import Conversation
from gateway.tito.parsing.reasoning import ReasoningMarkers
from gateway.tito.template import REASONING_KEYS, ChatTemplate


class History(Enum):
    """KEPT: the render starts with the last prompt's. Else it would rewrite it, by its reasoning alone or not."""

    KEPT = "kept"
    REASONING_DROPPED = "reasoning_dropped"
    REWRITTEN = "rewritten"


@dataclass(frozen=True, slots=True)
class _Prefix:
    length: int
    digest: bytes


class RenderedPrompts:
    """For prompts given out, what the template's render of them was: its length and digest, not its text.

    A cache that saves one render a turn: what it forgets, or never saw (a restart), is rendered again. Bounded.
    """

    def __init__(self, *, max_entries: int = 16_384) -> None:
        self._max_entries = max_entries
        self._prefixes: OrderedDict[bytes, _Prefix] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, prompt_ids: TokenIds, text: str) -> None:
        """Note that `text` was the full render when `prompt_ids`, int32[T], was the prompt."""
        prefix = _Prefix(len(text), _digest(text.encode(errors="surrogatepass")))
        with self._lock:
            self._prefixes[_digest(prompt_ids.tobytes())] = prefix
            if len(self._prefixes) > self._max_entries:
                self._prefixes.popitem(last=False)

    def starts(self, prompt_ids: TokenIds, text: str) -> bool:
        """Whether `text` is known to start with the render of `prompt_ids`; False where unknown."""
        with self._lock:
            prefix = self._prefixes.get(_digest(prompt_ids.tobytes()))
        if prefix is None or len(text) < prefix.length:
            return False
        return _digest(text[: prefix.length].encode(errors="surrogatepass")) == prefix.digest


def compare_history(
    template: ChatTemplate,
    conversation: Conversation,
    *,
    num_messages: int,
    full_text: str,
    reasoning: ReasoningMarkers | None,
) -> History:
    """Hold the full render against a render of the messages before reply `num_messages - 1`.

    The rewrite is by reasoning alone if it vanishes when nobody has any. The opening of the sampled turn itself
    (`<think>` by the generation prompt, gone in history) counts as reasoning: recorded tokens stand there in any case.
    """
    past = replace(conversation, messages=conversation.messages[: num_messages - 1])
    try:
        if full_text.startswith(template.render(past)):
            return History.KEPT
        if reasoning is None:
            bare_past = template.render(past, add_generation_prompt=False)
            return History.REASONING_DROPPED if full_text.startswith(bare_past) else History.REWRITTEN
        without = _without_reasoning(conversation, reasoning)
        past = replace(without, messages=without.messages[: num_messages - 1])
        bare_past = _without_empty_blocks(template.render(past, add_generation_prompt=False), reasoning)
        bare_full = _without_empty_blocks(template.render(without), reasoning)
    except TemplateRaised:
        return History.REWRITTEN
    return History.REASONING_DROPPED if bare_full.startswith(bare_past) else History.REWRITTEN


def _without_reasoning(conversation: Conversation, reasoning: ReasoningMarkers) -> Conversation:
    return replace(
        conversation, messages=tuple(_message_without_reasoning(m, reasoning) for m in conversation.messages)
    )


def _message_without_reasoning(message: JsonValue, reasoning: ReasoningMarkers) -> JsonValue:
    if not isinstance(message, Mapping) or message.get("role") != "assistant":
        return message
    bare = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    content = bare.get("content")
    if isinstance(content, str) and reasoning.closer.text in content:
        bare["content"] = content.rpartition(reasoning.closer.text)[2].lstrip("\n")
    return bare


def _without_empty_blocks(text: str, reasoning: ReasoningMarkers) -> str:
    """Some templates write an empty block where there is no reasoning, and only in some turns; with it go newlines."""
    block = rf"{re.escape(reasoning.opening)}\s*{re.escape(reasoning.closer.text)}\n*"
    return re.sub(r"\n+", "\n", re.sub(block, "", text))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
