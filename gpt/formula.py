"""Formulas for values that depend on depth, as in a placement's yaml.

    alpha: (2*L)**(1/4)            a number; l = 1 … L is the block, L = model.n_layer
    in: l > L/4                    whether a slot holds the run's norm
    out: rms if l == 1 else layer  which norm a slot holds

Formulas have arithmetic, comparisons, and, or, not, `… if … else …`, sqrt and log. Anything else is
refused and never run.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,  # of floats, so that 9**9**9 overflows at once
    ast.Mod: operator.mod,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
LONGEST = 200  # characters; Python's parser runs out of memory on deep nesting
FUNCTIONS: dict[str, Callable[[float], float]] = {"sqrt": math.sqrt, "log": math.log}


def calculate(formula: Any, l: int, L: int) -> float | bool | str:  # noqa: E741
    """The value of `formula` at block `l` of `L`; a name other than l and L stands for itself.

    Numbers are floats. ValueError if it is not a formula or has no value at that block.
    """

    def number(node: ast.AST) -> float:
        result = value(node)
        if not isinstance(result, float):
            raise ValueError(f"{ast.unparse(node)!r} is not a number")
        return result

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=bool() as constant):
                return constant
            case ast.Constant(value=int() | float() as constant):
                return float(constant)
            case ast.Name(id=name):
                return {"l": float(l), "L": float(L), "true": True, "false": False}.get(name, name)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not value(operand)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -number(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](number(left), number(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in OPERATORS:
                return OPERATORS[type(op)](number(left), number(right))
            case ast.BoolOp(op=ast.And(), values=values):
                return all(value(v) for v in values)
            case ast.BoolOp(op=ast.Or(), values=values):
                return any(value(v) for v in values)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return value(body) if value(test) else value(orelse)
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if (
                name in FUNCTIONS
            ):
                return FUNCTIONS[name](number(argument))
        raise ValueError(f"{ast.unparse(node)!r} is not understood")

    if len(str(formula)) > LONGEST:
        raise ValueError(f"longer than {LONGEST} characters")
    try:
        return value(ast.parse(str(formula), mode="eval").body)
    except (SyntaxError, TypeError, ArithmeticError, RecursionError) as error:
        raise ValueError(str(error)) from error
