"""Which markup a model uses: read from its template and its vocabulary, or chosen by name."""

from __future__ import annotations

from gateway.contracts.errors import ConfigurationError
from gateway.tito.parsing.call_ids import learn_call_ids, show_call
from gateway.tito.parsing.calls import CallFamily
from gateway.tito.parsing.deepseek_v3 import DEEPSEEK_V3
from gateway.tito.parsing.deepseek_v31 import DEEPSEEK_V31
from gateway.tito.parsing.glm45 import GLM45
from gateway.tito.parsing.harmony import HARMONY, HarmonyParsing, writes_harmony
from gateway.tito.parsing.hermes import HERMES
from gateway.tito.parsing.kimi_k2 import KIMI_K2
from gateway.tito.parsing.llama3_json import LLAMA3_JSON
from gateway.tito.parsing.marked import MarkedParsing
from gateway.tito.parsing.minimax_m2 import MINIMAX_M2
from gateway.tito.parsing.mistral import MISTRAL
from gateway.tito.parsing.qwen3_coder import QWEN3_CODER, SEED_OSS
from gateway.tito.parsing.reasoning import REASONING_FAMILIES, THINK, ReasoningMarkers, find_reasoning
from gateway.tito.parsing.reply import ReplyParsing
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

AUTO, NONE, ALWAYS_THINK = "auto", "none", "think_from_start"

# Looked for in this order, by the text that a template writes; then, in the same order, by the vocabulary's tokens.
_FAMILIES: tuple[CallFamily, ...] = (
    QWEN3_CODER,
    SEED_OSS,
    MINIMAX_M2,
    GLM45,
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    KIMI_K2,
    MISTRAL,
    HERMES,
    LLAMA3_JSON,
)

CALL_SYNTAXES = (AUTO, NONE, HARMONY, *sorted(family.name for family in _FAMILIES))
"""Names that `choose_parsing` takes for calls."""

REASONING_STYLES = (AUTO, NONE, ALWAYS_THINK, *(family.name for family in REASONING_FAMILIES))
"""Names that `choose_parsing` takes for reasoning."""


def choose_parsing(
    template: ChatTemplate, tokenizer: ChatTokenizer, *, calls: str = AUTO, reasoning: str = AUTO
) -> ReplyParsing:
    """The parsing of one model's replies; a model without markup that we know gives text.

    calls, reasoning: a name, `none`, or `auto`: what the template writes for a call, else what the vocabulary has
    tokens for. `harmony` is both. Raises ConfigurationError, with the known names, for an unknown one.
    """
    check_names(calls=calls, reasoning=reasoning)
    shown = show_call(template)
    if calls == HARMONY or (calls == AUTO and writes_harmony(shown, tokenizer)):
        return HarmonyParsing(tokenizer)
    family = _find_family(calls, shown, template, tokenizer)
    markers = _find_markers(reasoning, template, tokenizer)
    return MarkedParsing(
        name=" + ".join([family.name if family is not None else "text", *([markers.opener.text] if markers else [])]),
        tokenizer=tokenizer,
        reasoning=markers,
        calls=family.make(tokenizer) if family is not None else None,
        call_ids=learn_call_ids(template),
    )


def check_names(*, calls: str, reasoning: str) -> None:
    """Raise ConfigurationError, with the names that there are, for one that `choose_parsing` does not know."""
    for name, known, what in (
        (calls, CALL_SYNTAXES, "tool-call parser"),
        (reasoning, REASONING_STYLES, "reasoning parser"),
    ):
        if name not in known:
            raise ConfigurationError(f"{what} {name!r} is none of {', '.join(known)}")


def _find_family(calls: str, shown: str, template: ChatTemplate, tokenizer: ChatTokenizer) -> CallFamily | None:
    if calls != AUTO:
        return next((family for family in _FAMILIES if family.name == calls), None)
    # A template that shows no calls may still describe their syntax to the model.
    described = template.source.replace("\\n", "\n").replace('\\"', '"')
    for text in (shown, described):
        for family in _FAMILIES:
            if family.written.search(text):
                return family
    for family in _FAMILIES:
        if family.tokens and all(tokenizer.token_id(text) is not None for text in family.tokens):
            return family
    return None


def _find_markers(reasoning: str, template: ChatTemplate, tokenizer: ChatTokenizer) -> ReasoningMarkers | None:
    if reasoning == AUTO:
        return find_reasoning(template, tokenizer)
    if reasoning == ALWAYS_THINK:
        return THINK.markers(tokenizer, always=True)
    return next((family.markers(tokenizer) for family in REASONING_FAMILIES if family.name == reasoning), None)
