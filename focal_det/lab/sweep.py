"""Many trials on Ray: on this machine, or on a cluster by its address, unchanged."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from focal_det.progress import bar_options

from .running import run_trial
from .trial_records import save_record
from .trials import Trial

OBJECT_STORE = 128 * 2**20  # bytes; records are small
RETRIES = 2  # of a worker that dies; it goes on from its last checkpoint
POLL_SECONDS = 1.0


class Board:
    """Where running trials say how far they are; a Ray actor."""

    def __init__(self) -> None:
        self.iterations: dict[str, int] = {}

    def put(self, key: str, iteration: int) -> None:
        """Iterations that a trial has finished."""
        self.iterations[key] = iteration

    def get(self) -> dict[str, int]:
        """Iterations by the key of the trial."""
        return self.iterations


class Progress:
    """Iterations of all trials of a sweep, as a bar.

    What an earlier try of a trial has done is done, but says nothing of the pace; what a trial that
    ends early leaves out need not be waited for. A trial of several processes is not looked into:
    it counts when it ends.

    Attributes:
        bar: with its own context.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        # Any: tqdm takes its total for something that may be None.
        self.bar: Any = tqdm(
            total=sum(trial.iterations for trial in trials), unit="step", **bar_options()
        )
        self._trials, self._ended = len(trials), 0
        self._seen: dict[str, int] = {}
        self._say()

    def see(self, trial: Trial, iterations: int) -> None:
        """A trial has finished so many; first of all those that it began with."""
        if trial.key in self._seen:
            self.bar.update(max(0, iterations - self._seen[trial.key]))
        elif not self.bar.disable:  # by TQDM_DISABLE: it has no such numbers then
            self.bar.initial += iterations
            self.bar.last_print_n += iterations
            self.bar.n += iterations
        self._seen[trial.key] = max(iterations, self._seen.get(trial.key, 0))

    def end(self, trial: Trial, complete: bool) -> None:
        """A trial has ended, after all of its iterations or not."""
        left = trial.iterations - self._seen.get(trial.key, 0)
        if complete:
            self.bar.update(left)
        else:
            self.bar.total -= left
        self._ended += 1
        self._say()

    def _say(self) -> None:
        self.bar.set_description(f"{self._ended} of {self._trials} trials", refresh=False)


def run_sweep(
    trials: Sequence[Trial],
    output: Path,
    *,
    timed: Collection[str] = (),
    address: str | None = None,
    cpus: int | None = None,
    gpus: int = 0,
) -> list[str]:
    """Run trials, as many at a time as fit; each writes ``output/records/<key>.json`` when done.

    Args:
        trials: what to run; no two of one key.
        output: folder of the sweep.
        timed: keys of those whose times are shown beside each other's.
        address: of a Ray cluster, whose nodes see the folders of this machine under the same
            paths; None starts Ray on this machine.
        cpus: CPU cores for each trial; None for all that Ray has on one machine where the trial is
            timed, so that it has the machine to itself, and one for the others.
        gpus: GPUs for each trial, a process on each.

    Returns:
        What went wrong, a line for each trial that has no record. A loss that diverges has one.

    Raises:
        ImportError: Ray is not installed.
        ValueError: no machine has what one trial asks for.
    """
    if not trials:
        return []
    ray = _import_ray()
    options: dict[str, Any] = {}
    if address is None:
        # Not None: Ray would take that for a cluster that happens to run on this machine.
        address = "local"
        options = {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
    # Workers' output is in each trial's log.txt.
    ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        turns = [
            (choose_cpus(machines, cores, gpus), part)
            for cores, part in in_turns(trials, timed, cpus)
        ]
        progress = Progress(trials)
        problems = []
        with progress.bar:
            for cores, part in turns:
                problems += _run(ray, part, output, cores, gpus, progress)
        return problems
    finally:
        ray.shutdown()


def in_turns(
    trials: Sequence[Trial], timed: Collection[str], cpus: int | None
) -> list[tuple[int | None, list[Trial]]]:
    """Trials by their number of cores, None for a whole machine; first those that are timed.

    Args:
        trials, timed, cpus: as of :func:`run_sweep`.
    """
    if cpus is not None:
        return [(cpus, list(trials))]
    alone = [trial for trial in trials if trial.key in timed]
    others = [trial for trial in trials if trial.key not in timed]
    return [turn for turn in ((None, alone), (1, others)) if turn[1]]


def choose_cpus(machines: Iterable[Mapping[str, float]], cpus: int | None, gpus: int) -> int:
    """How many cores a trial gets.

    Args:
        machines: the resources that Ray has on each.
        cpus, gpus: as of :func:`run_sweep`.

    Raises:
        ValueError: no machine has as much.
    """
    have = [(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in machines]
    fit = [cores for cores, cards in have if cores >= (cpus or 1) and cards >= gpus]
    if not fit:
        asked = f"--cpus {cpus or 1} --gpus {gpus}"
        there = "; ".join(f"{cores} CPU and {cards} GPU" for cores, cards in sorted(set(have)))
        raise ValueError(
            f"{asked} a trial, but no machine has both, so that none could ever start. Ray has "
            f"machines of {there or 'nothing'}"
        )
    return cpus or max(fit)


def worker_environment(cpus: int) -> dict[str, str]:
    """What a worker must know as this process does, wherever it runs: paths are made absolute.

    Args:
        cpus: threads of a worker.
    """
    made = {
        "OMP_NUM_THREADS": str(cpus),
        "DETECTRON2_DATASETS": os.path.abspath(os.environ.get("DETECTRON2_DATASETS", "datasets")),
    }
    data_sets = []
    for entry in filter(None, map(str.strip, os.environ.get("FOCAL_DET_DATASETS", "").split(","))):
        name, *paths = entry.split(":")
        data_sets.append(":".join([name, *(_absolute(path) for path in paths)]))
    plugins = []
    for entry in filter(None, map(str.strip, os.environ.get("FOCAL_DET_PLUGINS", "").split(","))):
        plugins.append(_absolute(entry) if entry.endswith(".py") else entry)
    if data_sets:
        made["FOCAL_DET_DATASETS"] = ",".join(data_sets)
    if plugins:
        made["FOCAL_DET_PLUGINS"] = ",".join(plugins)
    if "FOCAL_DET_ALLOW_OUTSIDE_IMAGES" in os.environ:
        made["FOCAL_DET_ALLOW_OUTSIDE_IMAGES"] = os.environ["FOCAL_DET_ALLOW_OUTSIDE_IMAGES"]
    return made


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path.strip()))


def _run(
    ray: Any,
    trials: Sequence[Trial],
    output: Path,
    cpus: int,
    gpus: int,
    progress: Progress,
) -> list[str]:
    board = ray.remote(num_cpus=0, max_restarts=-1)(Board).remote()
    # A fresh process for each: nothing of one trial is left for the next.
    environment = {"env_vars": worker_environment(cpus)}
    work = ray.remote(
        num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=RETRIES, runtime_env=environment
    )(_work)
    running = {
        work.remote(trial, str(output / "trials" / trial.key), gpus, board): trial
        for trial in trials
    }
    problems = []
    while running:
        ready, _ = ray.wait(list(running), timeout=POLL_SECONDS)
        under_way = _look_at(ray, board)
        for trial in running.values():
            if trial.key in under_way:
                progress.see(trial, under_way[trial.key])
        for reference in ready:
            trial, complete = running.pop(reference), False
            try:
                record = ray.get(reference)
                save_record(record, output)
                complete = record["error"] is None
            # OSError, ValueError: the record cannot be written.
            except (ray.exceptions.RayError, OSError, ValueError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                problems.append(f"{trial.label}, seed {trial.seed} ({trial.key}): {reason}")
                progress.bar.write(problems[-1])
            progress.end(trial, complete)
    return problems


def _look_at(ray: Any, board: Any) -> dict[str, int]:
    """What the board says; nothing while its node is lost, which must not end a sweep."""
    try:
        found: dict[str, int] = ray.get(board.get.remote())
    except ray.exceptions.RayError:
        return {}
    return found


def _work(trial: Trial, folder: str, gpus: int, board: Any) -> dict[str, Any]:
    """One trial in a worker of Ray."""
    return run_trial(
        trial, Path(folder), gpus, lambda iteration: board.put.remote(trial.key, iteration)
    )


def _import_ray() -> Any:
    # Nobody's training is reported to anybody, unless the user has said so.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            f"sweeps run on Ray, which cannot be imported ({error}): pip install 'ray>=2.9'"
        ) from error
    return ray
