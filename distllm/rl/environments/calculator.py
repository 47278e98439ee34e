"""A calculator: behind an `=` it writes the value of the expression before it, `12*(3+4)=` is answered with `84`."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from distllm.registry import register
from distllm.types import Prompt

MAX_DIGITS = 60
"""Of a result or an exponent's base times its exponent: what is larger is refused, for it could take forever."""

_EXPRESSION = re.compile(r"[\d.+\-*/() ]+$")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@register("environment")
class Calculator:
    """Adds, subtracts, multiplies and divides exactly; what it cannot read or compute is answered with `error`."""

    stop = ("=",)

    def reply(self, prompt: Prompt, said: Sequence[str]) -> str | None:
        """Write the value of the expression that the last turn ends with."""
        text = said[-1].rstrip()
        if not text.endswith("="):
            return None
        found = _EXPRESSION.search(text[:-1])
        return calculate(found[0]) if found else "error"


def calculate(expression: str) -> str:
    """Return the exact value of an arithmetic expression, as an integer or a decimal of six places, or `error`."""
    if len(expression) > 4 * MAX_DIGITS:
        return "error"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return "error"
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.6f}".rstrip("0").rstrip(".")


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number):
            value = Fraction(str(number))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            value = _OPERATORS[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand)
        case _:
            raise ValueError("no arithmetic")
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        raise ValueError("too large")
    return value
