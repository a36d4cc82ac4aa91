"""Reasoning between two markers, `<think>` style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gateway.contracts.generation import TokenIds
from gateway.tito.parsing.markers import Marker, marker
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

_LOOK_BACK = 1024
"""Ids of a prompt that are looked at in one step, from its end."""

_NUM_LAST_IDS = 32
"""In which an opener that is no token of its own must end the prompt; and which are looked at first."""


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """What opens and what closes a model's reasoning.

    label: text right behind the opener that belongs to the markup. always: replies begin inside reasoning, whatever
    the prompt shows.
    """

    opener: Marker
    closer: Marker
    label: str = ""
    always: bool = False

    @property
    def opening(self) -> str:
        """All of the text that opens reasoning."""
        return self.opener.text + self.label


@dataclass(frozen=True, slots=True)
class ReasoningFamily:
    """A style that can be chosen."""

    name: str
    opener: str
    closer: str
    label: str = ""

    def markers(self, tokenizer: ChatTokenizer, *, always: bool = False) -> ReasoningMarkers:
        """The style with this tokenizer's markers."""
        return ReasoningMarkers(marker(tokenizer, self.opener), marker(tokenizer, self.closer), self.label, always)


THINK = ReasoningFamily("think", "<think>", "</think>")
REASONING_FAMILIES = (
    THINK,
    ReasoningFamily("mistral", "[THINK]", "[/THINK]"),
    ReasoningFamily("seed_oss", "<seed:think>", "</seed:think>"),
    ReasoningFamily("gemma4", "<|channel>", "<channel|>", label="thought"),
)


def find_reasoning(template: ChatTemplate, tokenizer: ChatTokenizer) -> ReasoningMarkers | None:
    """The markers that this model uses, or None if it shows no reasoning.

    A pair counts when the template writes it, else when the vocabulary has both as tokens.
    """
    pairs = [family.markers(tokenizer) for family in REASONING_FAMILIES]
    written = [p for p in pairs if p.opener.text in template.source and p.closer.text in template.source]
    tokens = [p for p in pairs if p.opener.token_id is not None and p.closer.token_id is not None]
    # Templates that only open it (for the reply) or look for its end (to strip old reasoning) still name the style.
    halves = [p for p in pairs if p.opener.text in template.source or p.closer.text in template.source]
    return next(iter([*written, *tokens, *halves]), None)


class ReasoningOpening:
    """Tells from a prompt whether a reply begins inside reasoning; looks back to the last marker or end token only."""

    def __init__(self, tokenizer: ChatTokenizer, reasoning: ReasoningMarkers) -> None:
        self._tokenizer = tokenizer
        self._reasoning = reasoning
        ids = (reasoning.opener.token_id, reasoning.closer.token_id)
        self._edges = frozenset(token_id for token_id in ids if token_id is not None) | set(tokenizer.eos_token_ids)
        self._sorted_edges = np.array(sorted(self._edges), dtype=np.int64)

    def is_open(self, prompt_ids: Sequence[int] | TokenIds) -> bool:
        """prompt_ids: the whole prompt, int32[P]."""
        opener, closer = self._reasoning.opener, self._reasoning.closer
        if self._reasoning.always:
            return True
        if opener.token_id is None or closer.token_id is None:
            end = self._tokenizer.decode(prompt_ids[-_NUM_LAST_IDS:]).rstrip()
            return end.endswith((opener.text, self._reasoning.opening))
        # An end token stands near the end of nearly every prompt: a few ids are looked at one by one.
        last = prompt_ids[-_NUM_LAST_IDS:]
        for token_id in reversed(last.tolist() if isinstance(last, np.ndarray) else last):
            if token_id in self._edges:
                return bool(token_id == opener.token_id)
        for stop in range(len(prompt_ids) - len(last), 0, -_LOOK_BACK):
            chunk = np.asarray(prompt_ids[max(0, stop - _LOOK_BACK) : stop])
            found = np.flatnonzero(np.isin(chunk, self._sorted_edges))
            if len(found):
                return int(chunk[found[-1]]) == opener.token_id
        return False
