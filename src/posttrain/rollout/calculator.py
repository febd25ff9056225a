"""Arithmetic for a model: an expression in, a number as short text out. Nothing else can be computed, and nothing large."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable

_MOST_CHARACTERS = 1000
_MOST_BITS = 4096  # of a whole number; about 1,200 digits

Number = int | float


def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: What to compute, with numbers, + - * / // % ** and parentheses, such as (3 + 4) * 12.
    """
    if len(expression) > _MOST_CHARACTERS:
        raise ValueError(f"the expression is longer than {_MOST_CHARACTERS} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, MemoryError, RecursionError, ValueError):
        raise ValueError("this is not an arithmetic expression") from None
    try:
        return _as_text(_value(tree.body))
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except (OverflowError, RecursionError):
        raise ValueError("the numbers are too large") from None


def _value(node: ast.AST) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _SIGNS:
            return _SIGNS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _bounded(_OPERATIONS[type(op)](_value(left), _value(right)))
        case ast.BinOp(op=ast.BitXor()):
            raise ValueError("powers are written with **")
        case ast.Tuple():
            raise ValueError("numbers are written without commas")
    raise ValueError("only numbers, + - * / // % ** and parentheses are known")


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and abs(exponent) * base.bit_length() > _MOST_BITS:
        raise OverflowError
    result = base**exponent
    if isinstance(result, complex):
        raise ValueError("the root of a negative number is not real")
    return result


def _bounded(value: Number) -> Number:
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise OverflowError
    if isinstance(value, float) and not math.isfinite(value):
        raise OverflowError
    return value


def _as_text(value: Number) -> str:
    """Without the digits that binary fractions add: 0.3 for 0.1 + 0.2, 7 for 14 / 2."""
    if isinstance(value, int):
        return str(value)
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.12g}"


_SIGNS: dict[type[ast.AST], Callable[[Number], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_OPERATIONS: dict[type[ast.AST], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
