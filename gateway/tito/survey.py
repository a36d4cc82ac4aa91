"""A survey of one model's chat template: which turns only append, where a turn ends, which switches would help.

What `verbatim doctor --model` prints; nothing here serves a turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gateway.contracts.errors import TemplateRaised
from gateway.contracts.generation import JsonValue
from gateway.tito.certificate import ShapeCertificate, Verdict
from gateway.tito.conversation import Conversation
from gateway.tito.junction import Junction, learn_junction
from gateway.tito.prompt import PromptBuilder
from gateway.tito.shapes import Shape, conversations, standard_shapes
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class ThinkingSwitch:
    """A template argument that makes more shapes append-only. `num_append_only`: with it; the survey has the number
    without."""

    name: str
    value: bool
    num_append_only: int


@dataclass(frozen=True, slots=True)
class Survey:
    """certificates: one a shape. num_append_only: shapes that the full render only appends to, by any conversation.

    text_close, reasoning_close: what the template writes between a reply's text and its stop token, and between
    reasoning and text; a turn that was cut is closed so. token_check: how many made-up turns were spelled in tokens the
    short way and the long way, and how many of them differed.
    """

    certificates: tuple[ShapeCertificate, ...]
    num_append_only: int
    text_close: str
    reasoning_close: str
    switches: tuple[ThinkingSwitch, ...]
    token_check: tuple[int, int]


def survey(
    prompts: PromptBuilder, template: ChatTemplate, tokenizer: ChatTokenizer, arguments: Mapping[str, JsonValue]
) -> Survey:
    """Try the standard shapes under template arguments, then under each switch; some seconds."""
    shapes = _shapes(template, arguments)
    certificates = tuple(prompts.certificate(shape, arguments) for shape in shapes)
    num_append_only = _count(certificates)
    return Survey(
        certificates=certificates,
        num_append_only=num_append_only,
        text_close=prompts.text_close,
        reasoning_close=prompts.reasoning_close,
        switches=_switches(prompts, template, arguments, shapes, num_append_only),
        token_check=_check_tokens(prompts, template, tokenizer, shapes, arguments),
    )


def _shapes(template: ChatTemplate, arguments: Mapping[str, JsonValue]) -> Sequence[Shape]:
    """The standard ones, with a system message unless the template refuses those."""
    messages = ({"role": "system", "content": "s"}, {"role": "user", "content": "q"})
    try:
        template.render(Conversation(messages, (), arguments))
    except TemplateRaised:
        return standard_shapes(starts_with_system=False)
    return standard_shapes()


def _switches(
    prompts: PromptBuilder,
    template: ChatTemplate,
    arguments: Mapping[str, JsonValue],
    shapes: Sequence[Shape],
    num_append_only: int,
) -> tuple[ThinkingSwitch, ...]:
    found: list[ThinkingSwitch] = []
    for name in template.undeclared_variables:
        for value in (True, False):
            if arguments.get(name) is value:
                continue
            switched = {**arguments, name: value}
            count = _count(tuple(prompts.certificate(shape, switched) for shape in shapes))
            if count > num_append_only:
                found.append(ThinkingSwitch(name, value, count))
    return tuple(sorted(found, key=lambda switch: -switch.num_append_only))


def _check_tokens(
    prompts: PromptBuilder,
    template: ChatTemplate,
    tokenizer: ChatTokenizer,
    shapes: Sequence[Shape],
    arguments: Mapping[str, JsonValue],
) -> tuple[int, int]:
    num_checked = num_different = 0
    for shape in shapes:
        for conversation, num_messages in conversations(shape, arguments):
            try:
                full_text = template.render(conversation)
            except TemplateRaised:
                continue
            junction = learn_junction(
                template, conversation, num_messages=num_messages, full_text=full_text, tokens=prompts.turn_tokens
            )
            if not isinstance(junction, Junction):
                continue
            whole, end = tokenizer.encode(full_text), tokenizer.encode(junction.stop + junction.suffix)
            # Where a reply's text stands among the suffix (`junction`), only what is behind it can be compared.
            if full_text.endswith(junction.stop + junction.suffix):
                num_checked += 1
                num_different += not np.array_equal(whole[len(whole) - len(end) :], end)
    return num_checked, num_different


def _count(certificates: Sequence[ShapeCertificate]) -> int:
    return sum(certificate.verdict is Verdict.APPENDS for certificate in certificates)
