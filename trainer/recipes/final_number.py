r"""Reading the final number of a worked answer: the last `\boxed{…}`, else the last line `ANSWER: …`.

The rule of the grpo-gsm8k project, with which the gsm8k recipe is compared: of what stands in the box, thousands
separators taken out, the first number counts, and numbers are equal iff their texts are (`42` is not `42.0`). Beyond
that rule, nested braces in a box, LaTeX's separators and currency signs are read here and not there; `.5` is one half.

Everything is one pass over the text, so a reply of any length and form costs time in proportion to its length.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

# A box's beginning, an escaped character (`\{` is no brace), or a brace.
_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_NOT_SPACE = re.compile(r"\S")
_ANSWER_LINE = re.compile(r"[\s*_#]*answer[\s*_]*:(?P<answer>.*)", re.IGNORECASE)
# ASCII digits only: "٤٢" or "４２" is no spelling that anybody asked for.
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_SEPARATORS = re.compile(r"\{,\}|\\[,!;]|\\?\$|,")
_MINUS = "\N{MINUS SIGN}"
_MOST_COMPARED = 100
"""Characters of a number that is compared by value; a longer one is equal to its own text only."""


def final_answer(text: str) -> str | None:
    r"""What stands in the last closed `\boxed{…}` that holds anything, else behind the last `ANSWER:`; None if neither.

    >>> final_answer(r"so \boxed{1}, no: \boxed{\text{42 eggs}}")
    '\\text{42 eggs}'
    """
    boxed = _last_boxed(text)
    return boxed if boxed is not None else _last_answer_line(text)


def number_text(answer: str) -> str | None:
    r"""The first number of an answer as text, without separators and currency signs; None if there is none.

    >>> number_text(r"\$1{,}200.50 \text{ dollars}")
    '1200.50'
    """
    number = _NUMBER.search(_SEPARATORS.sub("", answer.replace(_MINUS, "-")))
    return None if number is None else number.group()


def equal_in_value(left: str, right: str) -> bool:
    """Whether two number texts write the same value (`42` and `42.0` do)."""
    if left == right or max(len(left), len(right)) > _MOST_COMPARED:
        return left == right
    try:
        return Decimal(left) == Decimal(right)
    except InvalidOperation:  # an exponent beyond all bounds
        return False


def _last_boxed(text: str) -> str | None:
    open_braces: list[int | None] = []  # of each brace that is open: where its content begins if it is a box's
    last: slice | None = None
    for brace in _BRACES.finditer(text):
        if brace["box"]:
            open_braces.append(brace.end())
        elif brace["open"]:
            open_braces.append(None)
        elif brace["close"] and open_braces:
            begin = open_braces.pop()
            if begin is not None and _NOT_SPACE.search(text, begin, brace.start()):
                last = slice(begin, brace.start())
    return None if last is None else text[last].strip()


def _last_answer_line(text: str) -> str | None:
    for line in reversed(text.split("\n")):
        found = _ANSWER_LINE.match(line)
        if found and (answer := found["answer"].strip(" \t\r*_")):
            return answer
    return None
