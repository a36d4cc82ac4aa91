"""The calculator that runs inside a sandbox: `python3 calculator.py "48/2"` prints 24, or a line that begins "error:".

Standard library only and no other file of the project, because a sandbox has neither. Exact arithmetic on fractions:
+ - * / % (remainder), parentheses and decimals; nothing else of Python is evaluated. The exit code is always 0, because
a wrong expression is an answer for the agent to read, not a failure of the tool.
"""

from __future__ import annotations

import ast
import operator
import sys
from fractions import Fraction

MAX_EXPRESSION_LENGTH = 200
"""Characters; with numbers this short no result can grow large enough to cost time."""

_DECIMALS = 6
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str:
    """The result as decimal text with at most six decimals ("24", "0.2"), or "error: …"."""
    if len(expression) > MAX_EXPRESSION_LENGTH:
        return f"error: expression is longer than {MAX_EXPRESSION_LENGTH} characters"
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return _decimal_text(_value(tree.body, expression.strip()))
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError):
        return "error: not an expression of numbers and + - * / % ( )"


def _value(node: ast.expr, source: str) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        result: Fraction = _OPERATORS[type(node.op)](_value(node.left, source), _value(node.right, source))
        return result
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, source)
    if isinstance(node, ast.Constant):
        # From the text, not from the parsed float: 0.1 is one tenth here. No exponents: 1e999999999 would never end.
        text = ast.get_source_segment(source, node) or ""
        if text.strip("0123456789.") == "":
            return Fraction(text)
    raise ValueError("not arithmetic")


def _decimal_text(value: Fraction) -> str:
    scaled = round(value * 10**_DECIMALS)
    sign = "-" if scaled < 0 else ""
    whole, decimals = divmod(abs(scaled), 10**_DECIMALS)
    return f"{sign}{whole}.{decimals:0{_DECIMALS}d}".rstrip("0").rstrip(".")


if __name__ == "__main__":
    sys.stdout.write(calculate(" ".join(sys.argv[1:])) + "\n")
