"""Which markup a model uses, read from its template and its vocabulary."""

from __future__ import annotations

from gateway.tito.parsing.hermes import find_hermes
from gateway.tito.parsing.marked import MarkedParsing
from gateway.tito.parsing.reasoning import find_reasoning
from gateway.tito.parsing.reply import ReplyParsing
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer


def choose_parsing(template: ChatTemplate, tokenizer: ChatTokenizer) -> ReplyParsing:
    """The parsing that fits; a model without markup that we know gives text."""
    return MarkedParsing(
        tokenizer=tokenizer,
        reasoning=find_reasoning(template, tokenizer),
        calls=find_hermes(template, tokenizer),
    )
