"""What files of others contain is read and never run."""

import contextlib
import inspect
import io
import json
import os
import pickle
import shlex
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from urllib.parse import urlparse

import detectron2
import numpy as np
import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig
from detectron2.layers import ShapeSpec
from fvcore.common.checkpoint import Checkpointer

from focal_det.engine.checkpoint import Checkpointer as OurCheckpointer
from focal_det.safe_loading import (
    UnsafeFileError,
    check_inside,
    convert,
    install,
    load_checkpoint,
    load_pickle,
    load_torch,
    load_yaml,
)

ROOT = Path(__file__).parent.parent


def unpickle(content):
    file = io.BytesIO(content)
    file.name = "crafted.pkl"
    return load_pickle(file)


# --------------------------------------------------------------------------------------------------
# Crafted files


class Call:
    """Is pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def crafted_pickles(command):
    """Pickles that run a shell command, by the global that their refusal must name."""
    code = f"__import__('os').system({command!r})"
    line = repr(command).encode()
    hidden = np.empty(2, object)
    hidden[1] = {"deep": [(Call(os.system, command),)]}
    return {
        **{f"posix.system {p}": pickle.dumps(Call(os.system, command), p) for p in range(6)},
        "posix.system in an array": pickle.dumps(hidden, 4),
        "__builtin__.eval": pickle.dumps({"model": Call(eval, code)}, 2),
        "builtins.exec": pickle.dumps({"model": Call(exec, code), "__author__": ""}, 4),
        "os.system by INST": b"(S" + line + b"\nios\nsystem\n.",
        "os.system by OBJ": b"(cos\nsystem\nS" + line + b"\no.",
        "logging.os.system": (
            b"\x80\x04\x8c\x07logging\x8c\x09os.system\x93(X"
            + struct.pack("<I", len(command)) + command.encode() + b"tR."
        ),
        "builtins.getattr": (
            b"cbuiltins\ngetattr\n(cimportlib\nimport_module\n(S'os'\ntRS'system'\ntR(S"
            + line + b"\ntR."
        ),
        "os.system for a dtype": (
            b"cnumpy.core.multiarray\nscalar\n(cos\nsystem\n(S" + line + b"\ntRtR."
        ),
    }  # fmt: skip


CRAFTED_YAML = {
    "!!python/object/apply:os.system": 'A: !!python/object/apply:os.system ["{}"]',
    "!!python/object/new:os.system": 'A: !!python/object/new:os.system ["{}"]',
    "!!python/object/apply:builtins.eval": (
        "A: !!python/object/apply:builtins.eval [\"__import__('os').system('{}')\"]"
    ),
    "!!python/object/apply:eval": (
        "A: !!python/object/apply:eval [\"__import__('os').system('{}')\"]"
    ),
    "!!python/object/apply:eval with a name": (
        "A: !!python/object/apply:eval {{args: [\"__import__('os').system('{}')\"]}}"
    ),
    "!!python/object/apply:os.system in another": (
        'A: !!python/object/apply:eval [!!python/object/apply:os.system ["{}"]]'
    ),
}


def write_torch(folder, command):
    """Files for ``torch.load``, by what their refusal must name."""
    evil = {"model": {"weight": Call(os.system, command)}}
    torch.save(evil, folder / "zip.pth")
    torch.save(evil, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"model_state": evil}, folder / "pycls.pyth")
    (folder / "pickle.pth").write_bytes(pickle.dumps(evil, 2))
    torch.save({"model": torch.nn.Linear(1, 1)}, folder / "module.pth")
    with zipfile.ZipFile(folder / "script.pth", "w") as archive:
        for name in ("version", "data.pkl", "constants.pkl"):
            archive.writestr(f"archive/{name}", "3")
    with tarfile.open(folder / "tar.pth", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            content = pickle.dumps(evil, 2)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    system = dict.fromkeys(("zip.pth", "legacy.pth", "pycls.pyth", "pickle.pth"), "posix.system")
    other = {
        "module.pth": "torch.nn.modules.linear.Linear",
        "script.pth": "a TorchScript program",
        "tar.pth": "an archive of PyTorch before 0.1.10",
    }
    return system | other


@pytest.fixture
def marker(tmp_path):
    """A file that crafted files try to make."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


PICKLES, TORCH = list(crafted_pickles("true")), [
    "zip.pth", "legacy.pth", "pycls.pyth", "pickle.pth", "module.pth", "script.pth", "tar.pth",
]  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_crafted_pickles_would_run(name, tmp_path):
    marker = tmp_path / "marker"
    with contextlib.suppress(TypeError):  # after it has run
        pickle.loads(crafted_pickles(f"touch {marker}")[name])
    assert marker.exists()


@pytest.mark.parametrize("name", PICKLES)
def test_crafted_pickles_are_refused(name, tmp_path, marker):
    file = tmp_path / "crafted.pkl"
    file.write_bytes(crafted_pickles(f"touch {marker}")[name])
    with pytest.raises(UnsafeFileError) as error:
        load_checkpoint(str(file))
    assert f"'{file}' is refused: it contains {name.split()[0]}, " in str(error.value)
    assert "convert it once, in an environment where it can do no harm: py" in str(error.value)


@pytest.mark.parametrize("name", TORCH)
def test_crafted_torch_files_are_refused(name, tmp_path, marker):
    expected = write_torch(tmp_path, f"touch {marker}")[name]
    with pytest.raises(UnsafeFileError) as error:
        load_checkpoint(str(tmp_path / name))
    assert f"'{tmp_path / name}' is refused: it contains {expected}, " in str(error.value)


@pytest.mark.parametrize("tag", CRAFTED_YAML)
def test_crafted_yaml_is_refused(tag, tmp_path, marker):
    file = tmp_path / "crafted.yaml"
    file.write_text("B: 1\n" + CRAFTED_YAML[tag].format(f"touch {marker}"))
    with file.open() as stream, pytest.raises(UnsafeFileError) as error:
        load_yaml(stream)
    assert f"'{file}' is refused: line 2 has the tag '{tag.split()[0]}'" in str(error.value)


WEIGHTS = {"weight": torch.full((1, 2), 2.0), "bias": torch.ones(1)}
ARRAYS = {name: x.numpy() for name, x in WEIGHTS.items()}
AUTHORS = {"__author__": "someone", "matching_heuristics": True}
REST = {"args": Namespace(lr=0.1)}
REFUSED = {
    "tensors.pkl": {"model": WEIGHTS, **AUTHORS},
    "arrays.pth": {"model": ARRAYS},
    "big_endian.pth": {"model": {k: x.astype(">f8") for k, x in ARRAYS.items()}},
    "model.pth": {"model": WEIGHTS, **REST},
    "state_dict.pth": {"state_dict": WEIGHTS, "epoch": 3, **REST},
    "model_state.pyth": {"model_state": WEIGHTS, **REST},
    "blobs.pkl": {"blobs": {**ARRAYS, "bias_momentum": np.zeros(1)}, **REST},
    "weights.pth": {**ARRAYS, "names": ["cat", "dog"]},
    "module.pth": torch.nn.Linear(2, 1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_refusal_says_to_type_converts_the_file(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = REFUSED[name]
    if name == "module.pth":
        content.load_state_dict(WEIGHTS)
    with open(name, "wb") as file:
        (pickle.dump if name.endswith(".pkl") else torch.save)(content, file)
    with pytest.raises(UnsafeFileError) as error:
        load_checkpoint(name)
    command = shlex.split(str(error.value).split("it can do no harm: ")[1])
    assert command[:3] == ["python", "-m", "focal_det.safe_loading.convert"]
    assert command[3:] == [name, "OUT.pth", "--trust"]
    convert.main(command[3:])
    # Heuristics match by the end of a name, so there the layer may lie deeper.
    plain = load_checkpoint("OUT.pth")
    linear = torch.nn.Linear(2, 1)
    deep = torch.nn.ModuleDict({"deep": linear}) if "matching_heuristics" in plain else linear
    OurCheckpointer(deep).load("OUT.pth")
    assert_same(dict(linear.state_dict()), dict(WEIGHTS))
    authors = {"tensors.pkl": "someone", "model_state.pyth": "pycls", "blobs.pkl": "Caffe2"}
    assert plain.get("__author__") == authors.get(name)
    assert plain.get("matching_heuristics", False) == (name in authors)
    said = capsys.readouterr().out
    assert "Written: OUT.pth, 2 weights" in said
    assert ("Left out: epoch, args" in said) == (name == "state_dict.pth")
    assert ("Left out: names" in said) == (name == "weights.pth")


def test_converting_executes_nothing_without_trust(tmp_path, marker, capsys):
    path = tmp_path / "in.pkl"
    path.write_bytes(pickle.dumps(Call(os.system, f"touch {marker}")))
    with pytest.raises(SystemExit, match="2"):
        convert.main([str(path), str(tmp_path / "out.pth")])
    assert "would be executed, with all that its author put into it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "output", "message"),
    [
        ({"args": REST}, "out.pth", "it has no weights, only args"),
        ([1], "out.pth", "it holds a list, no weights by name"),
        (WEIGHTS, "out.pkl", "OUT must end with .pth"),
    ],
)
def test_what_cannot_be_converted_is_named(content, output, message, tmp_path, capsys):
    torch.save(content, tmp_path / "in.pth")
    with pytest.raises(SystemExit, match="2"):
        convert.main([str(tmp_path / "in.pth"), str(tmp_path / output), "--trust"])
    assert message in capsys.readouterr().err
    assert not (tmp_path / output).exists()


LITTLE_ENDIAN = b"I0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
FLOAT = b"cnumpy\ndtype\n(S'f4'\n" + LITTLE_ENDIAN
OBJECT = b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR"
STRUCT = b"cnumpy\ndtype\n(S'V8'\nI0\nI1\ntR"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
BUFFER = b"cnumpy.core.numeric\n_frombuffer\n("
EIGHT = b"S'" + b"A" * 8 + b"'\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # Memory that the file could choose: a structure, an object made of bytes, an array's
        # objects seen as numbers, items written into an array.
        (STRUCT + b".", "a dtype 'V8'"),
        (b"cnumpy\ndtype\n(S'O8,f4'\nI0\nI1\ntR.", "a dtype 'O8,f4'"),
        (ARRAY + b"(I1\n(I1\nt" + OBJECT + b"I00\n" + EIGHT + b"tb.", "object out of a str"),
        (OBJECT + b"(I3\nS'|'\nNS'a'\n(lp0\nI8\nI8\nI0\ntb.", "the state"),
        (BUFFER + ARRAY + FLOAT + b"(I0\ntS'C'\ntR.", "float32 out of a ndarray"),
        (BUFFER + b"C\x08" + b"A" * 8 + OBJECT + b"(I1\ntS'C'\ntR.", "OBJECT array"),
        (BUFFER + b"C\x08" + b"A" * 8 + b"S'O'\n(I1\ntS'C'\ntR.", "a str for a dtype"),
        (b"cnumpy.core.multiarray\nscalar\n(" + OBJECT + EIGHT + b"tR.", "OBJECT array"),
        (ARRAY + b"I0\nI1\ns.", "items of a ndarray"),
        (ARRAY + b"(I0\nI1\nu.", "items of a ndarray"),
        (ARRAY + 2 * (b"(I1\n(I2\nt" + FLOAT + b"I00\n" + EIGHT + b"tb") + b".", "built twice"),
        # What is too long to be shown.
        (b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I1\n" + b"2\x86" * 99 + b"NNNNtb.", "the state (("),
        (ARRAY + b"(I1\nI1\n" + b"2\x86" * 99 + FLOAT + b"NNtb.", "an array of shape (("),
        # Attributes of what the unpickler is made of.
        (b"cnumpy\ndtype\n}S'__defaults__'\n(I1\ntsb.", "attributes of a function"),
        (b"cnumpy\ndtype\n(N}S'__defaults__'\n(I1\ntstb.", "attributes of a function"),
        (b"ccollections\nOrderedDict\n}S'x'\nI1\nsb.", "attributes of a type"),
        (b"ccollections\nOrderedDict\n(tR}S'items'\nI1\nsb.", "attributes of a OrderedDict"),
        # Calls of what is none of the functions that are known.
        (b"cnumpy\nndarray\n((I9\nttR.", "a call of a str"),
        (b"I1\n(tR.", "a call of a int"),
        (b"c_codecs\nencode\n(S'x'\nS'zip'\ntR.", "bytes encoded as 'zip'"),
        (b"cbuiltins\nbytes\n(I1000000000000\ntR.", "TypeError"),
        (b"ccollections\nOrderedDict\n)\x81.", "by other means"),
        (b"ccollections\nOrderedDict\n)}\x92.", "by other means"),
        (b"(ccollections\nOrderedDict\no.", "by other means"),
        (b"(icollections\nOrderedDict\n.", "contains collections.OrderedDict"),
        (b"P1\n.", "by other means"),
        (b"I1\nQ.", "by other means"),
        (b"\x82\x01.", "by other means"),
        (b"\x83\x01\0.", "by other means"),
        (b"\x84\x01\0\0\0.", "by other means"),
        (ARRAY + b"\x98.", "by other means"),
        (b"\x97.", "by other means"),
        # Damage.
        (b"", "EOFError"),
        (b"no pickle", "damaged or of another format"),
        (pickle.dumps(np.arange(9), 4)[:-20], "damaged or of another format"),
        (b"\xff", "KeyError"),
        (b"0.", "IndexError"),
    ],
)  # fmt: skip
def test_odd_pickles_are_refused(content, message):
    with pytest.raises(ValueError, match=r"'crafted\.pkl' (is refused|cannot be read)") as error:
        unpickle(content)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        ARRAY + b"(I1\n(I1000000000000\nt" + FLOAT + b"I00\n" + EIGHT + b"tb.",
        ARRAY + b"(I1\n(I1000000000000\nt" + OBJECT + b"I00\n(lp0\ntb.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(L10000000000L\ntS'd'\ntR)b.",
        BUFFER + b"C\x08" + b"A" * 8 + FLOAT + b"(I1000000000000\ntS'C'\ntR.",
        b"cnumpy\ndtype\n(S'S999999999'\nI0\nI1\ntR)b.",
        b"cnumpy.core.multiarray\nscalar\n(" + FLOAT + b"I1000000000\ntR.",
        b"cnumpy.core.multiarray\nscalar\n(" + FLOAT + EIGHT + b"tR.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b"x.",
        b"\x80\x05\x8e" + struct.pack("<Q", 2**33) + b"x.",
        b"\x80\x05\x95" + struct.pack("<Q", 2**33) + b"x.",
        b"I1\nr\xff\xff\xff\xff0.",
    ],
)
def test_a_small_file_takes_little_memory(content):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="cannot be read"):
            unpickle(content)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.pkl", pickle.dumps([1]), "is no checkpoint: it holds a list"),
        ("keys.pkl", pickle.dumps({1: 2}), "is no checkpoint: it has the key 1, which is no name"),
        ("blobs.pkl", pickle.dumps({"blobs": 1}), "is no checkpoint: its 'blobs' is a int"),
        ("text.pth", b"hello", "cannot be read: it is damaged"),
        ("zip.pth", b"PK\x03\x04hello", "cannot be read: it is damaged"),
        ("empty.pth", b"", "cannot be read: it is damaged"),
    ],
)
def test_what_is_no_checkpoint_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        load_checkpoint(str(tmp_path / name))
    assert message in str(error.value)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(str(tmp_path / f"missing_{name}"))


def test_a_pyth_file_of_something_else_is_named(tmp_path):
    torch.save({"model": {}}, tmp_path / "x.pyth")
    with pytest.raises(ValueError, match="has no 'model_state'"):
        load_checkpoint(str(tmp_path / "x.pyth"))


# --------------------------------------------------------------------------------------------------
# Good files


def assert_same(got, expected):
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        assert getattr(got, "_metadata", None) == getattr(expected, "_metadata", None)
        for key, value in expected.items():
            assert_same(got[key], value)
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, np.ndarray):
        assert (got.dtype, got.shape, got.strides) == (
            expected.dtype, expected.shape, expected.strides,
        )  # fmt: skip
        assert got.flags.writeable == expected.flags.writeable
        assert_same(got.tolist(), expected.tolist())
    elif isinstance(expected, torch.Tensor):
        assert (got.dtype, got.device) == (expected.dtype, expected.device)
        assert torch.equal(got, expected)
    else:
        assert got == expected


def python2(value):
    """What ``pickle.dumps(value, 2)`` gives in Python 2, which has no bytes."""

    def text(raw):
        return b"T" + struct.pack("<i", len(raw)) + raw

    if isinstance(value, dict):
        return b"}(" + b"".join(python2(x) for item in value.items() for x in item) + b"u"
    if isinstance(value, np.dtype):
        return b"cnumpy\ndtype\n(" + text(value.str[1:].encode()) + LITTLE_ENDIAN
    if isinstance(value, np.generic):
        head = b"cnumpy.core.multiarray\nscalar\n"
        return head + python2(value.dtype) + text(value.tobytes()) + b"\x86R"
    if isinstance(value, np.ndarray):
        shape = b"(" + b"".join(b"I%d\n" % size for size in value.shape) + b"t"
        raw = text(value.tobytes())
        return ARRAY + b"(I1\n" + shape + python2(value.dtype) + b"I00\n" + raw + b"tb"
    return text(value.encode("latin1"))


def arrays():
    rng = np.random.default_rng(0)
    return {
        "conv1_w": rng.standard_normal((4, 3, 3, 3), dtype=np.float32),
        "conv1_w_momentum": np.zeros((4, 3, 3, 3), np.float32),
        "big_w": rng.standard_normal((64, 32), dtype=np.float32),  # numpy shares memory above 1 kB
        "empty": np.zeros((0, 4), np.float32),
        "lr": np.float32(0.02),
    }


def zoo(**more):
    return {"model": arrays(), "__author__": "Zo\xeb", "matching_heuristics": True, **more}


def odd():
    return zoo(
        fortran=np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        turned=np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
        text=np.array(["a", "bcd"]),
        raw=np.array([b"ab"]),
        objects=np.array([1, None, "x", [2]], dtype=object),
        big_endian=np.arange(300, dtype=">f4"),
        scalars=[np.float64(1), np.int64(3), np.bool_(True), np.str_("abc"), np.dtype(">i8")],
        containers=({1}, frozenset([2]), (b"", b"\xff\x00"), 10**30, None, 1.5),
    )


def state_dict():
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    torch.nn.init.normal_(module[0].weight, generator=generator)
    return module.state_dict()


def trained():
    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "iteration": 7}


def numpy_state_dict():
    state = state_dict()
    metadata = state._metadata
    state = OrderedDict((key, value.numpy()) for key, value in state.items())
    state._metadata = metadata
    return {"model": state, "__author__": "someone"}


def pickled(protocol, content):
    return lambda path: path.write_bytes(pickle.dumps(content, protocol))


def python2_pickled(content):
    return lambda path: path.write_bytes(b"\x80\x02" + python2(content) + b".")


def saved(content, **options):
    return lambda path: torch.save(content, path, **options)


GOOD = {
    **{f"zoo_{protocol}.pkl": pickled(protocol, zoo()) for protocol in range(6)},
    "odd_4.pkl": pickled(4, odd()),
    "odd_5.pkl": pickled(5, odd()),
    "numpy_state_dict.pkl": pickled(2, numpy_state_dict()),
    "python2_zoo.pkl": python2_pickled(zoo(matching_heuristics="yes")),
    "python2_blobs.pkl": python2_pickled({"blobs": arrays(), "cfg": "NUM_GPUS: 8\xb5"}),
    "python2_imagenet.pkl": python2_pickled(arrays()),
    "blobs.pkl": pickled(2, {"blobs": arrays(), "cfg": "NUM_GPUS: 8"}),
    "pycls.pyth": saved({"model_state": state_dict(), "epoch": 3}),
    "state_dict.pth": saved(state_dict()),
    "legacy.pth": saved(state_dict(), _use_new_zipfile_serialization=False),
    "trained.pth": saved(trained()),
}


def read_by_detectron2(path):
    """What Detectron2's own, unchanged method reads."""
    checkpointer = DetectionCheckpointer(torch.nn.Linear(1, 1))
    checkpointer._parsed_url_during_load = urlparse(str(path))
    checkpointer._torch_load = lambda f: torch.load(f, map_location="cpu", weights_only=False)
    theirs = inspect.unwrap(DetectionCheckpointer._load_file)
    assert Path(theirs.__code__.co_filename).parts[-3:-1] == ("detectron2", "checkpoint")
    return theirs(checkpointer, str(path))


@pytest.mark.parametrize("name", GOOD)
def test_good_files_give_what_detectron2_gives(name, tmp_path):
    path = tmp_path / name
    GOOD[name](path)
    loaded = load_checkpoint(str(path))
    assert_same(loaded, read_by_detectron2(path))
    assert len(loaded["model"]) >= 2
    if "model" in loaded and "conv1_w" in loaded["model"]:
        assert loaded["model"]["conv1_w"].tolist() == arrays()["conv1_w"].tolist()


class Recorder(OurCheckpointer):
    """Keeps what it is to load into its model."""

    def _load_model(self, checkpoint):
        self.loaded = dict(checkpoint)


@pytest.mark.parametrize("name", ["zoo_2.pkl", "pycls.pyth", "state_dict.pth"])
@pytest.mark.parametrize("version", ["installed", "0.6"])
def test_checkpointer_loads(name, version, tmp_path, monkeypatch):
    if version == "0.6":  # which has no such method and leaves the reading to fvcore
        monkeypatch.delattr(DetectionCheckpointer, "_torch_load", raising=False)
        monkeypatch.delattr(DetectionCheckpointer, "_load_file")
        monkeypatch.delattr(Checkpointer, "_load_file")
    GOOD[name](tmp_path / name)
    checkpointer = Recorder(torch.nn.Linear(1, 1))
    checkpointer.load(str(tmp_path / name))
    assert_same(checkpointer.loaded, load_checkpoint(str(tmp_path / name)))


@pytest.mark.skipif(
    not hasattr(DetectionCheckpointer, "_torch_load"), reason="Detectron2 0.6 knows no queries"
)
def test_checkpointer_leaves_queries_to_detectron2(tmp_path):
    saved(state_dict())(tmp_path / "x.pth")
    checkpointer = Recorder(torch.nn.Linear(1, 1))
    checkpointer.load(f"{tmp_path}/x.pth?matching_heuristics=True")
    assert checkpointer.loaded["matching_heuristics"] is True
    with pytest.raises(ValueError, match="Unsupported query"):
        Recorder(torch.nn.Linear(1, 1)).load(f"{tmp_path}/x.pth?other=1")


def test_checkpointer_refuses(tmp_path, marker):
    write_torch(tmp_path, f"touch {marker}")
    with pytest.raises(UnsafeFileError, match=r"posix\.system"):
        OurCheckpointer(torch.nn.Linear(1, 1)).load(str(tmp_path / "zip.pth"))


def test_torch_cannot_be_talked_out_of_it(tmp_path, marker, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    write_torch(tmp_path, f"touch {marker}")
    with pytest.raises(UnsafeFileError):
        load_torch(str(tmp_path / "zip.pth"))


def test_detectron2s_and_our_configs_are_read_as_before():
    zoo_files = Path(detectron2.__file__).parent / "model_zoo" / "configs"
    files = [*ROOT.glob("configs/**/*.yaml"), *zoo_files.glob("*.yaml")]
    files += zoo_files.glob("COCO-Detection/*retinanet*.yaml")
    assert len(files) > 10
    tags = 0
    for file in files:
        with file.open() as stream:
            got = load_yaml(stream)
        assert_same(got, yaml.unsafe_load(file.read_text()))
        assert_same(yaml.safe_load(yaml.safe_dump(got, sort_keys=False)), got)
        tags += "!!python" in file.read_text()
    assert tags == 1  # Base-RetinaNet.yaml


@pytest.mark.parametrize(
    "expression",
    ["[1, -2.5, [3]]", " 2**3 + 4 * 5 - 6 / 7", "[[x * y for y in [1, 2]] for x in [3, 4]]", "[]"],
)
def test_arithmetic_is_worked_out(expression):
    file = io.StringIO(f'A: !!python/object/apply:eval ["{expression}"]')
    assert_same(load_yaml(file), {"A": eval(expression)})


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9", "1.1**65", "10**10", "1e999", "1/0", "(-8)**0.5", "1 << 9", "1 < 2", "x", "True",
        "'a' * 3", "f'{1}'", "[[0] * 10**9]", "[1][0]", "(1).real", "int(1)", "lambda: 0", "1, 2",
        "", "{1: 2}", "1 if 1 else 2", "(y := 1)", "[x for x in 3]", "[x for x in [1] if x]",
        "[x for x, y in [[1, 2]]]", "[" + "1, " * 200 + "]",
        "[[[[[1 for e in l] for d in l] for c in l] for b in l] for l in [[1,1,1,1,1,1,1,1,1,1]]]",
    ],
)  # fmt: skip
def test_everything_else_is_no_arithmetic(expression):
    file = io.StringIO(f'A: !!python/object/apply:eval ["{expression}"]')
    with pytest.raises(UnsafeFileError, match="line 1 has the tag '!!python/object/apply:eval'"):
        load_yaml(file)


def test_tuples_are_plain_data():
    text = yaml.dump({"A": (1, [2, (3,)]), "B": ()})
    assert "!!python/tuple" in text
    assert_same(load_yaml(io.StringIO(text)), {"A": (1, [2, (3,)]), "B": ()})
    with pytest.raises(UnsafeFileError, match=r"os\.system"):
        load_yaml(io.StringIO("A: !!python/tuple [!!python/object/apply:os.system [ls]]"))


def test_a_config_that_is_its_own_base_is_named(tmp_path):
    install()
    (tmp_path / "a.yaml").write_text("_BASE_: b.yaml\n")
    (tmp_path / "b.yaml").write_text(f"_BASE_: [c.yaml, ../{tmp_path.name}/a.yaml]\n")
    (tmp_path / "c.yaml").write_text("VERSION: 2\n")
    names = [str(tmp_path / name) for name in ("a.yaml", "b.yaml", "a.yaml")]
    for _ in range(2):
        with pytest.raises(ValueError, match="is its own _BASE_") as error:
            CfgNode.load_yaml_with_base(names[0])
        assert str(error.value) == f"{names[0]!r} is its own _BASE_: {' -> '.join(names)}"
    (tmp_path / "b.yaml").write_text("_BASE_: [c.yaml, c.yaml]\n")  # twice is no circle
    assert CfgNode.load_yaml_with_base(names[0]) == {"VERSION": 2}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a config must map keys to values, got 'None'"),
        ("- 1\n- 2\n", r"a config must map keys to values, got '\[1, 2\]'"),
        ("import torch\n", "a config must map keys to values, got 'import torch'"),
        ("MODEL: {A: 1\n", "no YAML: while parsing a flow mapping"),
    ],
)
@pytest.mark.parametrize("base", [False, True])
def test_a_file_that_is_no_config_is_named(tmp_path, text, says, base):
    install()
    (tmp_path / "bad.yaml").write_text(text)
    (tmp_path / "good.yaml").write_text("_BASE_: bad.yaml\n")
    with pytest.raises(ValueError, match=f"bad.yaml: {says}"):
        CfgNode().merge_from_file(str(tmp_path / ("good.yaml" if base else "bad.yaml")))


# --------------------------------------------------------------------------------------------------
# Detectron2's own classes, in a process that chose an environment module with install()

ENVIRONMENT = """
def setup_environment():
    from focal_det import env
    from focal_det.safe_loading import install

    env.setup_environment()
    install()
    install()
"""

SCRIPT = """
import json, sys
from pathlib import Path

import detectron2
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg
from detectron2.data.build import load_proposals_into_dataset
from detectron2.model_zoo import get_config_file

folder, results = Path(sys.argv[1]), {}

class Recorder(DetectionCheckpointer):
    def _load_model(self, checkpoint):
        self.loaded = list(checkpoint["model"])
        self.heuristics = checkpoint.get("matching_heuristics")

def load(path, what="loaded"):
    checkpointer = Recorder(torch.nn.Linear(1, 1))
    checkpointer.load(path)
    return getattr(checkpointer, what)

def merge(path, **options):
    cfg = get_cfg()
    cfg.merge_from_file(path, **options)
    return cfg.MODEL.ANCHOR_GENERATOR.SIZES, cfg.MODEL.META_ARCHITECTURE

def attempt(name, function, *arguments, **options):
    try:
        results[name] = function(*map(str, arguments), **options)
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"

for path in sorted(folder.iterdir()):
    if path.suffix in (".pkl", ".pth", ".pyth"):
        attempt(path.name, load, path)
    if path.suffix == ".yaml":
        attempt(path.name, merge, path)
        attempt(path.name + " unsafe", merge, path, allow_unsafe=True)
        attempt(path.name + " lazy", LazyConfig.load, path)
attempt("proposals", lambda path: load_proposals_into_dataset([], path), folder / "crafted.pkl")
attempt("good proposals", lambda path: load_proposals_into_dataset(
    [{"image_id": 1}], path)[0]["proposal_boxes"].tolist(), folder / "proposals.pkl.good")
if hasattr(DetectionCheckpointer, "_torch_load"):  # 0.6 knows no queries
    query = f"{folder / 'state_dict.pth'}?matching_heuristics=True"
    attempt("query", load, query, what="heuristics")
attempt("zoo", lambda: merge(get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")))
attempt("lazy keys", lambda: [
    LazyConfig.load(str(folder / "good.yaml"), "MODEL").META_ARCHITECTURE,
    LazyConfig.load(str(folder / "good.yaml"), ("VERSION", "MODEL"))[0],
    LazyConfig.load(str(folder / "good.yaml")).VERSION,
    LazyConfig.load(str(folder / "lazy.py")).answer.value])
(folder / "results.json").write_text(json.dumps(results, default=str))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder of files, and what Detectron2's classes gave for each."""
    folder = tmp_path_factory.mktemp("installed")
    command = f"touch {folder / 'marker'}"
    write_torch(folder, command)
    (folder / "crafted.pkl").write_bytes(crafted_pickles(command)["builtins.exec"])
    for name in ("zoo_2.pkl", "state_dict.pth"):
        GOOD[name](folder / name)
    boxes = {"ids": [1], "boxes": [np.ones((1, 4))], "objectness_logits": [np.ones(1)]}
    (folder / "proposals.pkl.good").write_bytes(pickle.dumps(boxes, 2))
    tag = CRAFTED_YAML["!!python/object/apply:os.system"].format(command)
    (folder / "crafted.yaml").write_text(tag)
    (folder / "leaf.yaml").write_text("_BASE_: middle.yaml\nVERSION: 2\n")
    (folder / "middle.yaml").write_text("_BASE_: [good.yaml, crafted.yaml]\n")
    (folder / "good.yaml").write_text('VERSION: 2\nMODEL: {META_ARCHITECTURE: "RetinaNet"}\n')
    (folder / "lazy.py").write_text("answer = dict(value=42)\n")
    (folder / "environment.py").write_text(ENVIRONMENT)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DETECTRON2_ENV_MODULE": str(folder / "environment.py"),
        },
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, json.loads((folder / "results.json").read_text())


def test_detectron2s_own_classes_run_nothing(installed):
    folder, _ = installed
    assert not (folder / "marker").exists()


@pytest.mark.parametrize("name", [*TORCH, "crafted.pkl", "proposals"])
def test_detectron2s_own_classes_refuse_pickles(name, installed):
    folder, results = installed
    file = "crafted.pkl" if name == "proposals" else name
    assert results[name].startswith(f"UnsafeFileError: '{folder / file}' is refused: it contains ")


@pytest.mark.parametrize("name", ["crafted", "leaf", "middle"])
@pytest.mark.parametrize("how", ["", " unsafe"])
def test_detectron2s_own_configs_refuse_tags(name, how, installed):
    folder, results = installed
    expected = f"UnsafeFileError: '{folder / 'crafted.yaml'}' is refused: line 1 has the tag"
    assert results[f"{name}.yaml{how}"].startswith(expected)


def test_detectron2s_lazy_config_refuses_tags(installed):
    folder, results = installed
    assert results["crafted.yaml lazy"].startswith(f"UnsafeFileError: '{folder / 'crafted.yaml'}'")


def test_detectron2s_own_classes_read_good_files(installed):
    _, results = installed
    assert results["zoo_2.pkl"] == list(arrays())
    assert results["state_dict.pth"] == list(state_dict())
    assert results.get("query", True) is True
    assert results["good proposals"] == [[1.0] * 4]
    assert results["good.yaml"][1] == results["good.yaml unsafe"][1] == "RetinaNet"
    assert results["lazy keys"] == ["RetinaNet", 2, 2, 42]
    sizes = [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in (32, 64, 128, 256, 512)]
    assert results["zoo"] == [sizes, "RetinaNet"]


# --------------------------------------------------------------------------------------------------
# Paths


@pytest.mark.parametrize(
    ("file_name", "path"),
    [
        ("a.png", "/data/images/a.png"),
        ("deep/a.png", "/data/images/deep/a.png"),
        ("./deep/../a.png", "/data/images/a.png"),
        ("../images/a.png", "/data/images/a.png"),
        ("/data/images/a.png", "/data/images/a.png"),
        ("..a/...png", "/data/images/..a/...png"),
        ("https://host/a.png", "/data/images/https:/host/a.png"),
    ],
)
def test_paths_inside_are_normalised(file_name, path):
    assert check_inside("/data/images", file_name) == path
    assert check_inside("/data/x/../images/", file_name) == path


@pytest.mark.parametrize(
    "file_name",
    [
        "../a.png", "deep/../../a.png", "/etc/passwd", "/data/images/../a.png", "..", ".", "",
        "/data/images", "/data/images2/a.png", "../images2/a.png", "//etc/passwd",
    ],
)  # fmt: skip
def test_paths_outside_are_refused_unless_allowed(file_name, monkeypatch):
    for value in (None, "", "0"):
        if value is not None:
            monkeypatch.setenv("FOCAL_DET_ALLOW_OUTSIDE_IMAGES", value)
        with pytest.raises(ValueError, match="FOCAL_DET_ALLOW_OUTSIDE_IMAGES=1 allows it") as error:
            check_inside("/data/images", file_name)
        assert f"file_name {file_name!r} in the annotations" in str(error.value)
        assert "not inside the image root '/data/images'" in str(error.value)
    monkeypatch.setenv("FOCAL_DET_ALLOW_OUTSIDE_IMAGES", "1")
    expected = os.path.normpath(os.path.join("/data/images", file_name))
    assert check_inside("/data/images", file_name) == expected


def test_a_link_may_lead_out_but_nothing_climbs_from_where_it_leads(tmp_path):
    (tmp_path / "elsewhere" / "photos").mkdir(parents=True)
    (tmp_path / "elsewhere" / "secret").write_text("secret")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link").symlink_to(tmp_path / "elsewhere" / "photos")
    root = str(tmp_path / "images")
    assert check_inside(root, "link/a.png") == f"{root}/link/a.png"
    assert Path(f"{root}/link/../secret").read_text() == "secret"  # as the system reads it
    assert not Path(check_inside(root, "link/../secret")).exists()


def test_a_relative_root_is_meant_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_inside("images", "a.png") == str(tmp_path / "images" / "a.png")
    assert check_inside("", "a.png") == str(tmp_path / "a.png")
    with pytest.raises(ValueError, match="not inside"):
        check_inside("images", "../a.png")


def test_a_saved_lazy_config_loads_again(tmp_path):
    """It has ShapeSpecs, the one kind of object that is known, if they hold numbers."""
    lazy = Path(__file__).parents[1] / "configs/lazy/focal_retinanet_R_50_FPN_1x.py"
    config = LazyConfig.load(str(lazy))
    path = tmp_path / "config.yaml"
    LazyConfig.save(config, str(path))
    text = path.read_text()
    loaded = load_yaml(io.StringIO(text))
    assert loaded["model"]["head"]["input_shape"] == [ShapeSpec(channels=256)] * 5
    assert loaded["model"]["cls_loss"]["gamma"] == 2.0
    for value in ("['a']", "'os'", "1, depth: 2"):
        with pytest.raises(UnsafeFileError, match="ShapeSpec"):
            load_yaml(io.StringIO(text.replace("{channels: 256", f"{{channels: {value}")))
