"""Training with several processes and machines, and what becomes of it when one of them dies.

Nobody is to wait for the dead: the others end with an error that names the cause, and leave no
process behind. Each case is a command in processes of its own, with a plugin whose loss ends its
worker.
"""

import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workers import ROOT, Job, write_squares

TRAIN = ROOT / "tools" / "train_net.py"
CONFIG = ROOT / "configs" / "Base-FocalRetinaNet.yaml"
TINY = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0",
    "MODEL.BACKBONE.NAME", "build_slim_resnet_fpn_backbone",
    "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "8", "MODEL.FPN.OUT_CHANNELS", "16",
    "MODEL.ANCHOR_GENERATOR.SIZES", "[[16],[32],[64]]",
    "MODEL.RETINANET.IN_FEATURES", "['p3','p4','p5']",
    "MODEL.RETINANET.NUM_CONVS", "1", "MODEL.RETINANET.NUM_CLASSES", "1",
    "DATASETS.TRAIN", "('squares',)", "DATASETS.TEST", "('squares',)",
    "SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.001", "SOLVER.STEPS", "()",
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SEED", "1",
]  # fmt: skip

MORTAL_LOSS = """
import multiprocessing, os, signal, time
from pathlib import Path

from detectron2.utils import comm

from focal_det.losses import LOSS_REGISTRY, FocalLoss


def end_data_workers():
    for worker in multiprocessing.active_children():
        worker.kill()


def fail():
    raise ValueError("no more")


DEATHS = {
    "": lambda: None,
    "exit": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "fail": fail,
    "data worker": end_data_workers,
    "stop answering": lambda: time.sleep(3600),
}


@LOSS_REGISTRY.register()
class MortalLoss(FocalLoss):
    def __init__(self, alpha=0.25, gamma=2.0, rank=1, death="", marker=""):
        super().__init__(alpha, gamma)
        self.rank, self.death, self.marker, self.steps = rank, death, marker, 0

    def per_image(self, *args, **kwargs):
        self.steps += 1
        if self.steps == 3 and comm.get_rank() == self.rank:
            if self.marker:
                Path(self.marker).touch()
            DEATHS[self.death]()
        return super().per_image(*args, **kwargs)
"""


@pytest.fixture
def squares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of four images in COCO format and of the plugin, named in the environment."""
    write_squares(tmp_path)
    (tmp_path / "mortal.py").write_text(MORTAL_LOSS)
    monkeypatch.setenv("FOCAL_DET_DATASETS", f"squares:{tmp_path}/squares.json:{tmp_path}")
    monkeypatch.setenv("FOCAL_DET_PLUGINS", str(tmp_path / "mortal.py"))
    return tmp_path


def start(folder: Path, name: str, *options: Any, flags: Any = ()) -> Job:
    """Start our script; its output folder is ``folder / name``."""
    return Job(
        folder / f"{name}.txt",
        TRAIN, "--config-file", CONFIG, *flags, *TINY,
        "OUTPUT_DIR", folder / name, *options,
    )  # fmt: skip


def start_machines(folder: Path, *options: Any) -> list[Job]:
    """Two machines of one process each, which find each other on this one."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{one.getsockname()[1]}"
    machines = ["--num-gpus", 1, "--num-machines", 2, "--dist-url", url, "--machine-rank"]
    return [start(folder, f"machine{rank}", *options, flags=[*machines, rank]) for rank in range(2)]


def last_step(folder: Path) -> dict[str, float]:
    """The record of the last step of training."""
    records = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [record for record in records if "total_loss" in record][-1]


@pytest.mark.parametrize(
    ("death", "rank", "cause"),
    [
        ("kill", 1, "process 1 terminated with signal SIGKILL"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("kill", 0, "process 0 terminated with signal SIGKILL"),
                ("exit", 1, "process 1 terminated with exit code 3"),
                ("fail", 1, "Process 1 terminated with the following error(.|\n)*no more"),
                ("fail", 0, "Process 0 terminated with the following error(.|\n)*no more"),
                ("data worker", 1, r"DataLoader worker \(pid.*\) is killed by signal: Killed"),
            ]
        ),
    ],
)
def test_when_a_worker_dies_the_others_end(
    squares: Path, death: str, rank: int, cause: str
) -> None:
    job = start(
        squares, "out", "SOLVER.MAX_ITER", 100_000, "DATALOADER.NUM_WORKERS", 1,
        "MODEL.FOCAL_DET.LOSS.NAME", "MortalLoss",
        "MODEL.FOCAL_DET.MORTAL_LOSS.RANK", rank, "MODEL.FOCAL_DET.MORTAL_LOSS.DEATH", death,
        flags=["--num-gpus", 2, "--dist-url", "auto"],
    )  # fmt: skip
    assert job.wait(timeout=180) != 0
    assert re.search(cause, job.output), job.output
    # Workers that read data look every five seconds whether they are still wanted.
    job.wait_until_none_is_left(timeout=30)
    assert not (squares / "out" / "model_final.pth").exists()


@pytest.mark.slow
def test_an_image_that_cannot_be_read_ends_all_workers(squares: Path) -> None:
    for path in squares.glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    job = start(
        squares, "out", "SOLVER.MAX_ITER", 100_000, "DATALOADER.NUM_WORKERS", 1,
        flags=["--num-gpus", 2, "--dist-url", "auto"],
    )  # fmt: skip
    assert job.wait(timeout=180) != 0
    assert re.search(r"image '.*/\d\.png' \(image_id \d\) cannot be used: ", job.output), job.output
    job.wait_until_none_is_left(timeout=30)


@pytest.mark.slow
def test_images_that_any_process_skips_are_counted(squares: Path) -> None:
    """Of 16 images that two processes read, each fourth is broken."""
    (squares / "2.png").write_text("no image")
    job = start(
        squares, "out", "SOLVER.MAX_ITER", 4, "SOLVER.IMS_PER_BATCH", 4,
        "DATALOADER.NUM_WORKERS", 0, "DATALOADER.ON_BAD_IMAGE", "skip", "DATASETS.TEST", "()",
        flags=["--num-gpus", 2, "--dist-url", "auto"],
    )  # fmt: skip
    assert job.wait(timeout=180) == 0, job.output
    assert last_step(squares / "out")["skipped_images"] >= 4
    assert re.search(r"were skipped: \d+ x UnidentifiedImageError", job.output)


def test_two_machines_train_as_one(squares: Path) -> None:
    machines = start_machines(squares, "SOLVER.MAX_ITER", 3, "DATALOADER.NUM_WORKERS", 0)
    for machine in machines:
        assert machine.wait(timeout=240) == 0, machine.output
        machine.wait_until_none_is_left(timeout=30)
    first, second = squares / "machine0", squares / "machine1"
    assert (first / "model_final.pth").is_file()
    assert not (second / "model_final.pth").exists()
    record = last_step(first)
    assert record["iteration"] == 2
    assert np.isfinite([record["loss_cls"], record["loss_box_reg"]]).all()
    # Both machines evaluate, and the first has all results.
    assert "Evaluation results for bbox" in machines[0].output


@pytest.mark.slow
def test_two_machines_take_the_steps_of_one_with_two_processes(squares: Path) -> None:
    options = ["SOLVER.MAX_ITER", 3, "DATALOADER.NUM_WORKERS", 0, "DATASETS.TEST", "()"]
    jobs = start_machines(squares, *options)
    jobs.append(start(squares, "one", *options, flags=["--num-gpus", 2, "--dist-url", "auto"]))
    for job in jobs:
        assert job.wait(timeout=300) == 0, job.output
    two, one = (last_step(squares / name) for name in ("machine0", "one"))
    for name in ("loss_cls", "loss_box_reg", "total_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_when_a_machine_dies_the_other_ends(squares: Path, dead: int) -> None:
    marker = squares / "trains"
    machines = start_machines(
        squares, "SOLVER.MAX_ITER", 100_000, "DATALOADER.NUM_WORKERS", 1,
        "MODEL.FOCAL_DET.LOSS.NAME", "MortalLoss",
        "MODEL.FOCAL_DET.MORTAL_LOSS.MARKER", str(marker),
    )  # fmt: skip
    deadline = time.monotonic() + 180
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    machines[dead].kill()
    left = machines[1 - dead]
    assert marker.exists(), left.output
    assert left.wait(timeout=60) != 0
    assert re.search(
        "Process 0 terminated with the following error(.|\n)*RuntimeError", left.output
    )
    left.wait_until_none_is_left(timeout=30)


# The timeout is an argument of launch, and no flag of a script.
IMPATIENT = """
import functools, sys
from datetime import timedelta

sys.path.insert(0, sys.argv.pop(1))
import train_net

train_net.launch = functools.partial(train_net.launch, timeout=timedelta(seconds=20))

if __name__ == "__main__":
    train_net.invoke_main()
"""


@pytest.mark.slow
def test_a_worker_that_stops_answering_ends_all_within_the_timeout(squares: Path) -> None:
    script = squares / "impatient.py"
    script.write_text(IMPATIENT)
    job = Job(
        squares / "out.txt", script, TRAIN.parent, "--config-file", CONFIG,
        "--num-gpus", 2, "--dist-url", "auto", *TINY,
        "OUTPUT_DIR", squares / "out", "SOLVER.MAX_ITER", 100_000, "DATALOADER.NUM_WORKERS", 1,
        "MODEL.FOCAL_DET.LOSS.NAME", "MortalLoss",
        "MODEL.FOCAL_DET.MORTAL_LOSS.DEATH", "stop answering",
    )  # fmt: skip
    assert job.wait(timeout=180) != 0
    cause = "Process 0 terminated with the following error(.|\n)*Timed out waiting 20000ms"
    assert re.search(cause, job.output), job.output
    job.wait_until_none_is_left(timeout=30)
