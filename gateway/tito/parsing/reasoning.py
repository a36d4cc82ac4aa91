"""Reasoning between two markers, `<think>` style."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.tito.parsing.markers import Marker, marker
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

# Pairs that model families use; one counts when the template writes it or the vocabulary has both as tokens.
_PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
)


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """What opens and what closes a model's reasoning."""

    opener: Marker
    closer: Marker


def find_reasoning(template: ChatTemplate, tokenizer: ChatTokenizer) -> ReasoningMarkers | None:
    """The markers that this model uses, or None if it shows no reasoning."""
    pairs = [ReasoningMarkers(marker(tokenizer, opener), marker(tokenizer, closer)) for opener, closer in _PAIRS]
    written = [p for p in pairs if p.opener.text in template.source and p.closer.text in template.source]
    tokens = [p for p in pairs if p.opener.token_id is not None and p.closer.token_id is not None]
    # Templates that only look for the closer (to strip old reasoning) still name the style.
    closed = [p for p in pairs if p.closer.text in template.source]
    return next(iter([*written, *tokens, *closed]), None)
