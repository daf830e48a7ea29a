"""Checkpoints are whole or not there."""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from focal_det.engine.checkpoint import Checkpointer
from focal_det.files import write_whole


class Broken:
    """A part whose state no file can hold."""

    def state_dict(self):
        return {"function": lambda: None}

    def load_state_dict(self, state):
        raise NotImplementedError


def test_saves_and_loads_as_detectron2_does(tmp_path):
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    Checkpointer(model, str(tmp_path), optimizer=optimizer).save("model_0000007", iteration=7)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["last_checkpoint", "model_0000007.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000007.pth"
    other = nn.Linear(2, 3)
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    checkpointer = Checkpointer(other, str(tmp_path), optimizer=other_optimizer)
    assert checkpointer.resume_or_load("", resume=True) == {"iteration": 7}
    assert torch.equal(other.weight, model.weight)
    assert other_optimizer.param_groups[0]["lr"] == 0.5


def test_what_cannot_be_written_leaves_the_last_checkpoint(tmp_path):
    model = nn.Linear(2, 3)
    Checkpointer(model, str(tmp_path)).save("good")
    with pytest.raises(Exception, match=r"lambda|pickle"):
        Checkpointer(model, str(tmp_path), broken=Broken()).save("bad")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["good.pth", "last_checkpoint"]
    assert Checkpointer(model, str(tmp_path)).get_checkpoint_file() == str(tmp_path / "good.pth")


def test_a_full_disk_is_an_error_that_names_the_last_checkpoint(tmp_path):
    """In a process whose files may not grow beyond 64 KiB, which the system reports alike."""
    code = f"""
        import resource, signal, torch
        from torch import nn
        from focal_det.engine.checkpoint import Checkpointer
        Checkpointer(nn.Linear(2, 3), {str(tmp_path)!r}).save("good")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try:
            Checkpointer(nn.Linear(512, 512), {str(tmp_path)!r}).save("large")
        except OSError as error:
            print(error)
    """
    assert hasattr(resource, "RLIMIT_FSIZE")
    assert hasattr(signal, "SIGXFSZ")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "large.pth could not be written" in done.stdout
    assert f"The last one is untouched: {tmp_path}/good.pth" in done.stdout
    assert sorted(x.name for x in tmp_path.iterdir()) == ["good.pth", "last_checkpoint"]
    assert torch.load(tmp_path / "good.pth", weights_only=True)["model"]["weight"].shape == (3, 2)


def test_other_processes_write_nothing(tmp_path):
    checkpointer = Checkpointer(nn.Linear(2, 3), str(tmp_path), save_to_disk=False)
    checkpointer.save("model")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / "model_final.pth.partial").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    Checkpointer(nn.Linear(2, 3), str(tmp_path)).remove_partial_files()
    assert [x.name for x in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_has_its_old_content_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        assert Path(file.name).read_bytes() == b"new"

    write_whole(path, write)
    assert path.read_bytes() == b"new"

    def fail(file):
        file.write(b"worse")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_last_checkpoint_that_is_not_there_is_named(tmp_path):
    checkpointer = Checkpointer(nn.Linear(2, 3), str(tmp_path))
    checkpointer.save("model_0000004")
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(FileNotFoundError, match=r"names 'model_0000009.pth'.*model_0000004\.pth"):
        checkpointer.resume_or_load("", resume=True)


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    """Some network disks: the file itself is flushed and in its place."""
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "cannot")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_whole(tmp_path / "file", lambda file: file.write(b"x"))
    assert (tmp_path / "file").read_bytes() == b"x"
