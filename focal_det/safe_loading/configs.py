"""YAML as plain data."""

import ast
import itertools
import operator
from collections.abc import Callable
from typing import IO, Any

import yaml
from detectron2.layers import ShapeSpec

from .pickles import UnsafeFileError

# Bounds of what is worked out, far above the anchors of any config.
_MAX_TEXT, _MAX_STEPS, _MAX_NUMBER, _MAX_EXPONENT = 500, 10_000, 1e9, 64


def load_yaml(file: IO[str]) -> Any:
    """``yaml.safe_load``, tuples, and anchor sizes as Detectron2 writes them.

    Its ``Base-RetinaNet.yaml`` has ``!!python/object/apply:eval ["[[x, x * 2**(1.0/3)] for x in
    [32, 64]]"]``. Such lists of numbers are worked out here by arithmetic; nothing is evaluated as
    Python.

    Args:
        file: opened in text mode.

    Returns:
        What it holds.

    Raises:
        UnsafeFileError: another tag of Python's, or one of that kind with anything but numbers,
            lists, ``+ - * / **`` and ``for``; file, line and tag are named.
        yaml.YAMLError: it is no YAML, or no text.
    """
    try:
        return yaml.load(file, Loader=_PlainLoader)
    except UnicodeDecodeError as error:
        raise yaml.YAMLError(str(error)) from error


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with constructors of its own."""


def _refusal(node: yaml.Node) -> UnsafeFileError:
    tag = node.tag.replace("tag:yaml.org,2002:", "!!")
    mark = node.start_mark
    return UnsafeFileError(
        f"{mark.name!r} is refused: line {mark.line + 1} has the tag {tag!r}, which could run any "
        "code. A config is plain data: write the value that it stands for"
    )


def _construct_unknown(loader: _PlainLoader, node: yaml.Node) -> Any:
    raise _refusal(node)


def _construct_numbers(loader: _PlainLoader, node: yaml.SequenceNode) -> Any:
    try:
        (text,) = loader.construct_sequence(node, deep=True)
        return _work_out(text)
    except UnsafeFileError:
        raise
    except Exception as error:  # whatever the text is, it is not what is meant here
        raise _refusal(node) from error


def _construct_tuple(loader: _PlainLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


def _construct_shape(loader: _PlainLoader, node: yaml.MappingNode) -> ShapeSpec:
    """The one class of Detectron2 that ``LazyConfig.save`` writes out of its own configs."""
    numbers = loader.construct_mapping(node)
    if any(type(value) not in (int, type(None)) for value in numbers.values()):
        raise _refusal(node)
    try:
        return ShapeSpec(**{str(name): value for name, value in numbers.items()})
    except TypeError as error:  # another field than a shape has
        raise _refusal(node) from error


_PlainLoader.add_constructor(
    "tag:yaml.org,2002:python/object:detectron2.layers.shape_spec.ShapeSpec", _construct_shape
)
_PlainLoader.add_constructor(None, _construct_unknown)
_PlainLoader.add_constructor("tag:yaml.org,2002:python/tuple", _construct_tuple)
_PlainLoader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _construct_numbers)


def _number(value: Any) -> int | float:
    if type(value) not in (int, float) or not abs(value) <= _MAX_NUMBER:
        raise ValueError(f"{value!r} is no number of at most {_MAX_NUMBER:g}")
    number: int | float = value
    return number


def _power(base: int | float, exponent: int | float) -> Any:
    if abs(exponent) > _MAX_EXPONENT:
        raise ValueError(f"the exponent {exponent} is above {_MAX_EXPONENT}")
    return base**exponent


_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: _power,
}


def _work_out(text: str) -> Any:
    """The number or nested list of numbers that an arithmetic expression stands for.

    Raises:
        ValueError: it contains something else, or too much.
    """
    if len(text) > _MAX_TEXT:
        raise ValueError(f"{len(text)} characters, at most {_MAX_TEXT} are allowed")
    steps = itertools.count(1)

    def value(node: ast.expr, names: dict[str, Any]) -> Any:
        if next(steps) > _MAX_STEPS:
            raise ValueError(f"more than {_MAX_STEPS} steps")
        match node:
            case ast.Constant(value=number):
                return _number(number)
            case ast.Name(id=name):
                return names[name]
            case ast.List(elts=elements):
                return [value(element, names) for element in elements]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -_number(value(operand, names))
            case ast.BinOp(left=left, op=symbol, right=right):
                operands = (_number(value(side, names)) for side in (left, right))
                return _number(_OPERATORS[type(symbol)](*operands))
            case ast.ListComp(
                elt=element,
                generators=[ast.comprehension(target=ast.Name(id=name), iter=source, ifs=[])],
            ):
                return [value(element, {**names, name: x}) for x in value(source, names)]
        raise ValueError(f"{ast.unparse(node)!r} is no arithmetic")

    return value(ast.parse(text.strip(), mode="eval").body, {})
