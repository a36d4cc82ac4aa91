"""Make `data/calculations.jsonl.gz` from a GSM8K folder: `python -m trainer.recipes.make_calculations FOLDER`.

GSM8K marks each calculation of its answers: `48/2 = <<48/2=24>>24 clips`. A question here is one calculation, or two
that follow each other in one answer where the second uses the first's result, written x: `48/2`, then `48+x`.
Kept: calculations with at least one operator, short enough for a small model, whose stated result is exactly right.
No expression of a held-out question occurs in a training question.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.recipes.calculator_tool import calculate

OUTPUT_FILE = Path(__file__).parent / "data" / "calculations.jsonl.gz"
SPLITS = {"train": "train.jsonl", "heldout": "test.jsonl"}

_ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
_ARITHMETIC = re.compile(r"[0-9.()]+[-+*/][-0-9.+*/()]+")
_MAX_EXPRESSION = 7
_MAX_RESULT = 5
_HELD_OUT = 500


class Calculation(NamedTuple):
    """One `<<expression=result>>`; both as text."""

    expression: str
    result: str


Question = tuple[Calculation, ...]


def main(folder: Path) -> int:
    """Write the file and say how many questions it holds."""
    questions = {split: _unique(_questions(folder / name)) for split, name in SPLITS.items()}
    # A few, because every expression of theirs is taken from the training questions.
    questions["heldout"] = questions["heldout"][:_HELD_OUT]
    held_out = set().union(*map(_expressions, questions["heldout"]))
    questions["train"] = [question for question in questions["train"] if held_out.isdisjoint(_expressions(question))]
    lines = [_line(split, question) for split, rows in questions.items() for question in rows]
    # No time stamp inside: the same input gives the same bytes.
    OUTPUT_FILE.write_bytes(gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0))
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in questions.items())
    sys.stdout.write(f"{OUTPUT_FILE.name}: {counts}\n")
    return 0


def _questions(file: Path) -> Iterator[Question]:
    with file.open() as lines:
        for line in lines:
            steps = [Calculation(*pair) for pair in _ANNOTATION.findall(json.loads(line)["answer"])]
            kept = [step if _usable(step) else None for step in steps]
            yield from ((step,) for step in kept if step is not None)
            for first, second in itertools.pairwise(kept):
                if first is not None and second is not None and (linked := _with_x(first, second)) is not None:
                    yield first, linked


def _usable(step: Calculation) -> bool:
    return (
        _ARITHMETIC.fullmatch(step.expression) is not None
        and len(step.expression) <= _MAX_EXPRESSION
        and len(step.result) <= _MAX_RESULT
        and calculate(step.expression) == step.result
    )


def _with_x(first: Calculation, second: Calculation) -> Calculation | None:
    """`second` with the one operand that is `first`'s result written as x; None if there is no such single operand."""
    expression, count = re.subn(rf"(?<![0-9.]){re.escape(first.result)}(?![0-9.])", "x", second.expression)
    return Calculation(expression, second.result) if count == 1 else None


def _expressions(question: Question) -> set[str]:
    """Every expression of a question, with x and with its value."""
    written = {step.expression for step in question}
    return written | {expression.replace("x", question[0].result) for expression in written}


def _unique(questions: Iterable[Question]) -> list[Question]:
    return list(dict.fromkeys(questions))


def _line(split: str, question: Question) -> str:
    row = {
        "split": split,
        "expressions": [step.expression for step in question],
        "results": [step.result for step in question],
    }
    return json.dumps(row, separators=(",", ":")) + "\n"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
