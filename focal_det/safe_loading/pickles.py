"""An unpickler that knows numpy's arrays and Python's own containers, and nothing else."""

import io
import math
import pickle
import re
import reprlib
import shlex
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, ClassVar

import numpy as np
from numpy.typing import NDArray


class UnsafeFileError(ValueError):
    """A file that asks for more than plain data; nothing of what it asks for was done."""


def refusal(filename: str, what: str) -> UnsafeFileError:
    """The error for a file that contains something else than plain data.

    Args:
        filename: the file.
        what: what it contains, a global as ``module.name``.
    """
    command = "python -m focal_det.safe_loading.convert"
    return UnsafeFileError(
        f"{filename!r} is refused: it contains {what}, which is not plain data, and loading that "
        "could run any code. If it is a checkpoint whose author you trust, convert it once, in an "
        f"environment where it can do no harm: {command} {shlex.quote(filename)} OUT.pth --trust"
    )


def damage(filename: str, error: Exception) -> ValueError:
    """The error for a file that cannot be read at all, and why."""
    return ValueError(
        f"{filename!r} cannot be read: it is damaged or of another format "
        f"({type(error).__name__}: {error})"
    )


def load_pickle(file: IO[bytes]) -> Any:
    """``pickle.load(file, encoding="latin1")`` for files that hold nothing but plain data.

    Known are what pickle builds without naming anything, sets, ``OrderedDict``, and numpy's arrays,
    scalars and dtypes of bool, numbers, text and objects (which must be plain data too). What an
    array claims to hold must be in the file, so a small file cannot take much memory.

    Args:
        file: opened in binary mode; read to its end.

    Returns:
        What was pickled.

    Raises:
        UnsafeFileError: the file names anything else; the name is in the message.
        ValueError: the file is damaged or no pickle.
    """
    filename = str(getattr(file, "name", file))
    try:
        return _PlainUnpickler(file.read(), filename).load()
    except UnsafeFileError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise damage(filename, error) from error


def _dtype(text: str, align: Any, copy: Any) -> np.dtype[Any]:
    # No structures: their layout is up to the file, and one that has numpy take objects for numbers
    # would have it follow pointers that the file makes up.
    if not re.fullmatch(r"[biufcSUO][1-9][0-9]{0,8}", text):
        raise ValueError(f"a dtype {reprlib.repr(text)}")
    return np.dtype(text, align=False, copy=True)  # a copy, for its byte order will be set


def _set_byte_order(dtype: np.dtype[Any], state: Any) -> None:
    version, order, *structure = state[:5]
    if version != 3 or order not in ("<", ">", "=", "|") or structure != [None, None, None]:
        raise ValueError(f"the state {reprlib.repr(state)} of a {dtype}")
    # The rest of the state is taken from numpy and not from the file, whose flags could have
    # objects pass for numbers.
    own = (dtype.itemsize, dtype.alignment, dtype.flags)
    order = "|" if dtype.byteorder == "|" else order
    dtype.__setstate__((3, order, None, None, None, *own))  # type: ignore[attr-defined]


def _check_dtype(dtype: Any) -> None:
    # Those that are dtypes are of _dtype(); numpy would make some of many other things.
    if not isinstance(dtype, np.dtype):
        raise TypeError(f"a {type(dtype).__name__} for a dtype")


def _empty_array(kind: Any, shape: Any, typecode: Any) -> NDArray[Any]:
    # The arguments are of no account: all that the array is follows in its state.
    return np.empty(0, np.uint8)


def _fill_array(array: NDArray[Any], state: Any) -> None:
    _, shape, dtype, fortran, data = state
    _check_dtype(dtype)
    if array.size:
        raise ValueError("an array that is built twice")
    if type(shape) is not tuple or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"an array of shape {reprlib.repr(shape)}")
    objects = dtype.kind == "O"
    if type(data) not in ((list,) if objects else (bytes, str)):
        raise TypeError(f"an array of {dtype} out of a {type(data).__name__}")
    claimed = math.prod(shape) * (1 if objects else dtype.itemsize)
    if claimed != len(data):
        unit = "objects" if objects else "bytes"
        raise ValueError(f"an array of {claimed} {unit}, of which the file has {len(data)}")
    array.__setstate__((1, shape, dtype, bool(fortran), data))  # type: ignore[arg-type]


def _array_from_buffer(
    data: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None
) -> NDArray[Any]:
    _check_dtype(dtype)
    if type(data) not in (bytes, bytearray):  # not another array, whose memory would be shared
        raise TypeError(f"an array of {dtype} out of a {type(data).__name__}")
    array = np.frombuffer(data, dtype)
    if order == "K" and axis_order is not None:
        return array.reshape(shape, order="C").transpose(axis_order)
    return array.reshape(shape, order=order)


def _scalar(dtype: Any, data: Any) -> Any:
    array = _array_from_buffer(data.encode("latin1") if type(data) is str else data, dtype, (), "C")
    return array[()]


def _bytes_from_latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes encoded as {reprlib.repr(encoding)}")
    return str.encode(text, "latin1")


def _empty_bytes() -> bytes:
    return b""


# All that a pickle can have called.
_KNOWN: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _bytes_from_latin1,  # bytes, before protocol 3
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): _dtype,
    ("numpy", "ndarray"): "numpy.ndarray",  # an argument and never called
}
for _module in ("builtins", "__builtin__"):
    _KNOWN[_module, "bytes"] = _empty_bytes
    _KNOWN[_module, "set"] = set
    _KNOWN[_module, "frozenset"] = frozenset
for _module in ("numpy.core", "numpy._core"):
    _KNOWN[f"{_module}.multiarray", "_reconstruct"] = _empty_array
    _KNOWN[f"{_module}.multiarray", "scalar"] = _scalar
    _KNOWN[f"{_module}.numeric", "_frombuffer"] = _array_from_buffer


class _PlainUnpickler(pickle._Unpickler):
    """Python's own unpickler; that of C lets no one override REDUCE and BUILD.

    Args:
        content: of the file.
        filename: for messages.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]

    def __init__(self, content: bytes, filename: str) -> None:
        # From memory, where a read of more bytes than there are makes no room for them.
        super().__init__(io.BytesIO(content), encoding="latin1")
        self.filename = filename

    def refusal(self, what: str) -> UnsafeFileError:
        return refusal(self.filename, what)

    def find_class(self, module: str, name: str) -> Any:
        # Nothing is imported and no attribute is asked for, so a dotted name leads nowhere.
        if (module, name) not in _KNOWN:
            raise self.refusal(f"{module}.{name}")
        return _KNOWN[module, name]

    def load_inst(self) -> None:
        module, name = self.readline(), self.readline()
        raise self.refusal(f"{module[:-1].decode()}.{name[:-1].decode()}")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not callable(function):  # what can be called is of _KNOWN
            raise self.refusal(f"a call of a {type(function).__name__}")
        self.stack[-1] = function(*arguments)

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is np.ndarray:
            _fill_array(target, state)
        elif isinstance(target, np.dtype):
            _set_byte_order(target, state)
        elif type(target) is OrderedDict and list(state) == ["_metadata"]:  # of a state_dict()
            target._metadata = state["_metadata"]  # type: ignore[attr-defined]
        else:
            raise self.refusal(f"attributes of a {type(target).__name__}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):  # not into the memory of an array
            raise self.refusal(f"items of a {type(target).__name__}")
        target.update(zip(items[::2], items[1::2], strict=True))

    def load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.stack.append(bytearray(self.read(length)))  # pickle's own makes room first

    def load_other(self) -> None:
        raise self.refusal("an object that pickle builds by other means than numpy's arrays")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.INST[0]: load_inst,
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.OBJ[0]: load_other,
        pickle.NEWOBJ[0]: load_other,
        pickle.NEWOBJ_EX[0]: load_other,
        pickle.PERSID[0]: load_other,
        pickle.BINPERSID[0]: load_other,
        pickle.EXT1[0]: load_other,
        pickle.EXT2[0]: load_other,
        pickle.EXT4[0]: load_other,
        pickle.NEXT_BUFFER[0]: load_other,
        pickle.READONLY_BUFFER[0]: load_other,
    }
