"""A loss, stated in PyTorch, as a Triton device function.

The formula is traced once with tensors, its derivative by autograd included where the loss states
only a value, and each traced operation becomes a line of Triton. So a loss of a user's own runs in
the same kernel as ours, and nothing is stated twice.
"""

import functools
import hashlib
import linecache
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import Node

from .terms import Terms


@triton.jit
def exp(x):
    """``e^x``, 0 where it is below the normal numbers; off by up to ``2 + |x|`` roundings."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def log1p(x):
    """``log(1 + x)`` for x > -1, accurate near 0 too, where 1 + x would round x away."""
    # The series x - x^2 / 2 + x^3 / 3 - ...: below 1/4 the terms dropped are less than a rounding.
    series = 1 / 9 - x * (1 / 10 - x * (1 / 11))
    series = 1 / 5 - x * (1 / 6 - x * (1 / 7 - x * (1 / 8 - x * series)))
    series = x * (1 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x * series))))
    return tl.where(tl.abs(x) < 0.25, series, tl.log(1.0 + x))


@triton.jit
def softplus(x):
    """``log(1 + e^x)``, without a logarithm.

    ``max(x, 0) + log(1 + u)`` with ``u = e^-|x| <= 1``, where a polynomial gives ``log(1 + u) / u``
    to 4e-8 of itself (degree 9): less than a rounding.
    """
    u = exp(-tl.abs(x))
    series = 0.10603655 - u * (0.0569595322 - u * (0.0198514629 - u * 0.00324402517))
    series = 0.333299637 - u * (0.249541342 - u * (0.196759388 - u * (0.153055921 - u * series)))
    return tl.maximum(x, 0.0) + u * (1.0 - u * (0.499999017 - u * series))


@triton.jit
def expm1(x):
    """``exp(x) - 1``, accurate near 0 too."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(tl.abs(x) < 0.25, series, exp(x) - 1.0)


@triton.jit
def tanh(x):
    """Hyperbolic tangent."""
    m = expm1(-2.0 * tl.abs(x))
    return tl.where(x < 0, m, -m) / (2.0 + m)


@triton.jit
def sign(x):
    """-1, 0 or 1."""
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)


def _add(a: str, b: str, alpha: float = 1) -> str:
    return f"{a} + {b}" if alpha == 1 else f"{a} + {b} * {alpha!r}"


def _sub(a: str, b: str, alpha: float = 1) -> str:
    return f"{a} - {b}" if alpha == 1 else f"{a} - {b} * {alpha!r}"


def _clamp(x: str, low: str | None = None, high: str | None = None) -> str:
    # tl.clamp wants both ends. NaN passes through, as in torch.
    if low is not None:
        x = EXPRESSIONS["maximum"](x, low)
    if high is not None:
        x = EXPRESSIONS["minimum"](x, high)
    return x


def _power(x: str, exponent: str) -> str:
    try:
        number = float(exponent)
    except ValueError:  # a tensor
        return f"exp({exponent} * tl.log({x}))"
    if number == 0.5:
        return f"tl.sqrt({x})"
    if number != int(number):
        return f"exp({exponent} * tl.log({x}))"
    if abs(number) > 16:
        raise RuntimeError(f"the loss uses a power of {exponent}, which has no translation")
    product = " * ".join([x] * int(abs(number))) or "1.0"
    return product if number >= 0 else f"1.0 / ({product})"


def _same(x: str, *_: Any, **__: Any) -> str:
    return x


def _call(function: str) -> Callable[..., str]:
    return lambda *arguments: f"{function}({', '.join(arguments)})"


def _infix(operator: str) -> Callable[[str, str], str]:
    return lambda a, b: f"{a} {operator} {b}"


EXPRESSIONS: dict[str, Callable[..., str]] = {
    "abs": _call("tl.abs"),
    "add": _add,
    "bitwise_and": _infix("&"),
    "bitwise_not": lambda x: f"({x} == 0)",
    "bitwise_or": _infix("|"),
    "clamp": _clamp,
    "clone": _same,
    "cos": _call("tl.cos"),
    "div": _infix("/"),
    "eq": _infix("=="),
    "exp": _call("exp"),
    "expm1": _call("expm1"),
    "copy": lambda _, source: source,
    "full": lambda _, value: value,
    "full_like": lambda _, value: value,
    "ge": _infix(">="),
    "gt": _infix(">"),
    "le": _infix("<="),
    "log": _call("tl.log"),
    "log1p": _call("log1p"),
    "logical_and": _infix("&"),
    "logical_not": lambda x: f"({x} == 0)",
    "logical_or": _infix("|"),
    "lt": _infix("<"),
    "maximum": lambda a, b: f"tl.maximum({a}, {b}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": lambda a, b: f"tl.minimum({a}, {b}, propagate_nan=tl.PropagateNan.ALL)",
    "mul": _infix("*"),
    "ne": _infix("!="),
    "neg": lambda x: f"-{x}",
    "pow": _power,
    "reciprocal": lambda x: f"1.0 / {x}",
    "relu": lambda x: _clamp(x, low="0.0"),
    "rsqrt": lambda x: f"1.0 / tl.sqrt({x})",
    "scalar_tensor": _same,
    "sigmoid": lambda x: f"1.0 / (1.0 + exp(-{x}))",
    "sign": _call("sign"),
    "sin": _call("tl.sin"),
    "sqrt": _call("tl.sqrt"),
    "sub": _sub,
    "tanh": _call("tanh"),
    "where": _call("tl.where"),
    "_to_copy": _same,
}
"""Triton for each ATen operation (core operator set) that can stand in a formula."""

ARITHMETIC = ("add", "sub", "mul", "div", "neg", "maximum", "minimum", "abs", "_to_copy")
LOGICAL = ("bitwise_and", "bitwise_not", "bitwise_or", "logical_and", "logical_not", "logical_or")
MAKERS = ("full", "full_like", "scalar_tensor", "_to_copy")
"""Whose keyword arguments say where and in what dtype a tensor is made."""

HELPERS = {
    "exp": exp,
    "log1p": log1p,
    "softplus": softplus,
    "expm1": expm1,
    "tanh": tanh,
    "sign": sign,
}


def device_function(terms: Terms) -> Any:
    """Translate ``terms.value_and_slope`` into ``(z, FOREGROUND: constexpr) -> (value, slope)``.

    Args:
        terms: the loss.

    Returns:
        A ``triton.jit`` function on float32 blocks.

    Raises:
        RuntimeError: an operation that has no translation, or control flow that depends on values.
    """
    sides = {side: _statements(terms, side) for side in (True, False)}
    body = "\n".join(
        [
            "    if FOREGROUND:",
            *(f"        {line}" for line in sides[True]),
            "    else:",
            *(f"        {line}" for line in sides[False]),
            "    return value, slope",
        ]
    )
    # Triton keeps compiled kernels on disk by the names of the functions they are made of: a name
    # that says what is inside keeps two losses apart.
    name = "terms_" + hashlib.sha256(body.encode()).hexdigest()[:16]
    source = f"def {name}(z, FOREGROUND: tl.constexpr):\n{body}\n"
    filename = f"<focal_det {name}>"
    # Triton reads the source of a function; this is where Python looks for what has no file.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"tl": tl, "__name__": __name__, **HELPERS}
    exec(compile(source, filename, "exec"), namespace)
    return triton.jit(namespace[name])


def _statements(terms: Terms, foreground: bool) -> list[str]:
    """Lines that assign `value` and `slope` from `z`."""
    graph = _trace(terms, foreground)
    names: dict[Node, str] = {}
    exponents: dict[str, str] = {}  # of the variables that are an exponential
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = "z"
        elif node.op == "output":
            results = [_operand(x, names) for x in node.args[0]]
            # Constants (no loss at all on one side) are spread over the block.
            lines += [
                f"{n} = tl.zeros_like(z) + {x}"
                for n, x in zip(("value", "slope"), results, strict=True)
            ]
        elif node.op != "call_function":
            raise RuntimeError("the loss holds a tensor, which has no translation to Triton")
        elif _operation(node) == "alias":  # one tensor, whoever changes it
            names[node] = names[node.args[0]]
        else:
            name = f"t{len(lines)}"
            operation = _operation(node).rstrip("_")
            if operation == "exp":
                exponents[name] = names[node.args[0]]
            if operation == "log1p" and names[node.args[0]] in exponents:
                lines.append(f"{name} = softplus({exponents[names[node.args[0]]]})")
            else:
                lines.append(f"{name} = {_expression(node, names)}")
            if _operation(node).endswith("_"):  # in place: whoever holds the tensor sees it
                changed = names[node.args[0]]
                names.update({other: name for other, n in names.items() if n == changed})
            names[node] = name
    return lines


@functools.cache
def _decompositions() -> dict[Any, Any]:
    return dict(core_aten_decompositions())


def _trace(terms: Terms, foreground: bool) -> torch.fx.Graph:
    def formula(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return terms.value_and_slope(z, foreground)

    try:
        # Whatever the mode of the first call, the derivative is wanted.
        with torch.inference_mode(False), torch.enable_grad():
            tracer = make_fx(formula, _decompositions(), tracing_mode="fake")
            traced = tracer(torch.zeros(2, 3))
    except Exception as error:  # whatever a formula of a user's does to a tracer
        raise RuntimeError(f"the loss cannot be traced for Triton: {error}") from error
    traced.graph.eliminate_dead_code()
    return traced.graph


def _expression(node: Node, names: dict[Node, str]) -> str:
    name = _operation(node)
    name = name.rstrip("_") if name not in EXPRESSIONS else name
    if name == "expand":  # a constant, of which one number stands for all
        return _operand(node.args[0], names)
    if name not in EXPRESSIONS:
        raise RuntimeError(f"the loss uses {node.target}, which has no translation to Triton")
    arguments = [_operand(x, names) for x in node.args]
    if name in ARITHMETIC:
        arguments = [_number(x, argument) for x, argument in zip(node.args, arguments, strict=True)]
    if name in LOGICAL:
        arguments = [_mask(x, argument) for x, argument in zip(node.args, arguments, strict=True)]
    if name in MAKERS:
        return _made(node, EXPRESSIONS[name](*arguments))
    return EXPRESSIONS[name](*arguments, **node.kwargs)


def _operation(node: Node) -> str:
    return str(node.target).split(".")[1]  # aten.<operation>.<overload>


def _operand(x: Any, names: dict[Node, str]) -> Any:
    if isinstance(x, Node):
        return names[x]
    if isinstance(x, int | float):
        return repr(float(x)) if math.isfinite(x) else f'float("{x}")'
    return x


def _made(node: Node, expression: str) -> str:
    """A constant, or a copy: everything is float32 or a mask."""
    dtype = node.meta["val"].dtype
    if _operation(node) != "_to_copy":
        is_true = dtype == torch.bool and float(expression) != 0
        mask = f"tl.zeros_like(z) {'==' if is_true else '!='} 0"
        return mask if dtype == torch.bool else expression
    if dtype not in (torch.float32, torch.bool):
        raise RuntimeError(f"the loss converts to {dtype}, which has no translation to Triton")
    return expression if dtype == torch.float32 else f"{expression} != 0"


def _mask(x: Any, argument: str) -> str:
    is_mask = isinstance(x, Node) and x.meta["val"].dtype == torch.bool
    return argument if is_mask else f"({argument} != 0)"


def _number(x: Any, argument: str) -> str:
    """Masks take part in arithmetic as 0 and 1."""
    is_mask = isinstance(x, Node) and x.meta["val"].dtype == torch.bool
    return f"tl.where({argument}, 1.0, 0.0)" if is_mask else argument
