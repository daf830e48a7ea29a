"""Kill training runs with SIGKILL and see whether they end as if they had not been killed.

    python tests/kill_and_resume.py                 # 20 kills
    python tests/kill_and_resume.py --kills 4 --processes 1

Each trial starts ``tools/train_net.py``, kills it and all its processes once, at a random moment,
while it writes a checkpoint or while it evaluates in turn, and starts it again with ``--resume``.
Its end is compared bit for bit with that of a run that was left alone: weights, optimizer,
schedule, normalizer, random states and ``metrics.json`` (but for the times in it). Trials go
through the given numbers of data workers and processes. Exit status 1 if any trial differs.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from focal_det.analysis.records import environment, save
from focal_det.data import DigitsClutterSpec, generate
from focal_det.engine.resume import OF_THE_PROCESS

ROOT = Path(__file__).resolve().parent.parent
ITERATIONS, CHECKPOINT_PERIOD, EVAL_PERIOD = 30, 6, 15
TIMEOUT = 600.0  # seconds for one run
MOMENTS = ("at random", "writing a checkpoint", "writing the last checkpoint", "evaluating")
DATA = DigitsClutterSpec(train_images=24, val_images=12)


def main() -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="data workers")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--record", type=Path, help="JSON file for the outcome")
    args = parser.parse_args()
    trials = run_trials(args.kills, args.processes, args.workers, args.seed)
    same = sum(trial["difference"] is None for trial in trials)
    print(f"{len(trials)} kills, {len(trials)} resumes, {same} bit-identical ends")
    for trial in trials:
        if trial["difference"] is not None:
            print(f"  {trial}")
    if args.record:
        record = {
            "environment": environment("cpu"),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "seed": args.seed,
            "trials": trials,
        }
        save(record, args.record)
    return 0 if same == len(trials) else 1


def run_trials(
    kills: int, processes: list[int], workers: list[int], seed: int
) -> list[dict[str, Any]]:
    """One record a kill: when, what was resumed from, how the end differs (None: not at all)."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        generate(DATA, home / "digits")
        settings = itertools.cycle(itertools.product(processes, workers, MOMENTS))
        chosen = list(itertools.islice(settings, kills))
        whole = {}
        for number, data_workers in tqdm({x[:2]: None for x in chosen}, desc="undisturbed runs"):
            output = home / f"whole_{number}_{data_workers}"
            start(home, output, number, data_workers).wait_for_end()
            whole[number, data_workers] = output
        trials = []
        bar = tqdm(chosen, desc="killed runs")
        for number, data_workers, moment in bar:
            output = home / "killed"
            while True:
                run = start(home, output, number, data_workers)
                after = rng.uniform(0, training_seconds(whole[number, data_workers]))
                if run.kill_when(chance(moment, output, after)):
                    break
                shutil.rmtree(output)  # it was at its end before that moment came
            resumed_from = last_iteration(output)
            start(home, output, number, data_workers, resume=True).wait_for_end()
            trials.append(
                {
                    "processes": number,
                    "data_workers": data_workers,
                    "moment": moment,
                    "resumed_from": resumed_from,
                    "difference": difference(whole[number, data_workers], output),
                }
            )
            shutil.rmtree(output)
            bar.set_postfix(differ=sum(x["difference"] is not None for x in trials))
    return trials


class Run:
    """A training run and all processes it starts.

    Args:
        command: what to run.
        environment: its environment variables.
        log: file for what it prints.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                env=environment,
                cwd=log.parent,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for_end(self) -> None:
        """Wait until it has ended well.

        Raises:
            RuntimeError: it failed.
        """
        if self.process.wait(TIMEOUT) != 0:
            raise RuntimeError(f"a run failed:\n{self.log.read_text()[-3000:]}")

    def kill_when(self, is_time: Callable[[], bool]) -> bool:
        """SIGKILL to all of it at the first moment that `is_time`; whether that killed it."""
        end = time.monotonic() + TIMEOUT
        while self.process.poll() is None and not is_time():
            if time.monotonic() > end:
                break
            time.sleep(0.0005)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait() == -signal.SIGKILL


def start(home: Path, output: Path, processes: int, workers: int, resume: bool = False) -> Run:
    """Start (or go on with) the run that all trials make."""
    data = home / "digits"
    sets = [f"{name}:{data / name}.json:{data / 'images' / name}" for name in ("train", "val")]
    environment = {
        **os.environ,
        "FOCAL_DET_DATASETS": ",".join(f"small_{entry}" for entry in sets),
        "OMP_NUM_THREADS": "1",  # the order of additions is part of the result
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "tools" / "train_net.py")]
    command += ["--config-file", str(ROOT / "configs/demo/focal_retinanet_digits.yaml")]
    command += ["--num-gpus", str(processes), "--dist-url", "auto"]
    command += ["--resume"] if resume else []
    options = {
        "DATASETS.TRAIN": "('small_train',)",
        "DATASETS.TEST": "('small_val',)",
        "DATALOADER.NUM_WORKERS": workers,
        # An augmentation that draws random numbers.
        "INPUT.MIN_SIZE_TRAIN": "(96, 112, 128)",
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.MAX_ITER": ITERATIONS,
        "SOLVER.WARMUP_ITERS": 10,
        "SOLVER.CHECKPOINT_PERIOD": CHECKPOINT_PERIOD,
        "TEST.EVAL_PERIOD": EVAL_PERIOD,
        "OUTPUT_DIR": output,
    }
    command += [str(x) for pair in options.items() for x in pair]
    return Run(command, environment, home / f"{output.name}.log")


def chance(moment: str, output: Path, after: float) -> Callable[[], bool]:
    """Tells when it is the moment: `after` seconds of training, or what begins first after them."""
    log = output / "log.txt"
    began: list[float] = []
    evaluations: list[int] = []

    def is_time() -> bool:
        if not began:
            if log.is_file() and "Starting training" in log.read_text():
                began.append(time.monotonic())
            return False
        if moment != "writing the last checkpoint" and time.monotonic() - began[0] < after:
            return False
        if moment == "writing a checkpoint":
            return any(output.glob("*.partial"))
        if moment == "writing the last checkpoint":
            return (output / "model_final.pth.partial").exists()
        if moment == "evaluating":
            seen = log.read_text().count("Start inference")
            evaluations.append(seen)
            return seen > evaluations[0]
        return True

    return is_time


def training_seconds(output: Path) -> float:
    """How long a finished run trained and evaluated."""
    metrics = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    per_iteration = [line["time"] for line in metrics if "time" in line]
    return ITERATIONS * sum(per_iteration) / len(per_iteration)


def last_iteration(output: Path) -> int | None:
    """The iteration of the checkpoint that will be resumed from."""
    tag = output / "last_checkpoint"
    if not tag.is_file():
        return None
    return int(torch.load(output / tag.read_text(), weights_only=True)["iteration"])


def difference(whole: Path, resumed: Path) -> str | None:
    """Where two finished runs differ; None where they are the same bit for bit."""
    ends = [torch.load(x / "model_final.pth", weights_only=True) for x in (whole, resumed)]
    for end in ends:
        del end["trainer"]["hooks"]["RunState"]["metrics_size"]  # times are of different lengths
    where = first_difference(*ends)
    if where is not None:
        return f"model_final.pth{where}"
    lines = [
        [
            {key: value for key, value in json.loads(line).items() if key not in OF_THE_PROCESS}
            for line in (folder / "metrics.json").read_text().splitlines()
        ]
        for folder in (whole, resumed)
    ]
    where = first_difference(*lines)
    return None if where is None else f"metrics.json{where}"


def first_difference(a: Any, b: Any) -> str | None:
    """The path to the first difference of two nested structures; None where they are equal."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = (
            a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        )
        return None if same else ": tensors differ"
    if type(a) is not type(b):
        return f": {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f": keys {sorted(map(str, a.keys() ^ b.keys()))}"
        pairs = [(f"[{key!r}]", a[key], b[key]) for key in a]
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            return f": {len(a)} and {len(b)} entries"
        pairs = [(f"[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return None if a == b or (a != a and b != b) else f": {a!r} and {b!r}"
    for name, x, y in pairs:
        where = first_difference(x, y)
        if where is not None:
            return name + where
    return None


if __name__ == "__main__":
    sys.exit(main())
