"""Counting over workers: two processes with half a batch each are one with all of it."""

import os
import subprocess
import sys

import pytest

WORKER = """
import sys
import torch
from detectron2.engine import launch
from detectron2.utils import comm
from focal_det.compat import leave_process_group
from focal_det.modeling import NORMALIZER_REGISTRY

COUNTS = torch.tensor([[10, 0], [3, 30]])
LOSSES = torch.tensor([[5.0, 1.0], [2.0, 7.0]])


def step(normalizer, counts, losses):
    return (losses / normalizer(counts)).sum()


def main(name):
    rank = comm.get_rank()
    kind = NORMALIZER_REGISTRY.get(name)
    synced, alone = kind(sync=True), kind(sync=False)
    for _ in range(3):  # the moving average is a state
        local = step(synced, COUNTS[rank], LOSSES[rank])
        mean = sum(comm.all_gather(local)) / 2
        whole = step(alone, COUNTS.flatten(), LOSSES.flatten())
        torch.testing.assert_close(mean, whole)
        torch.testing.assert_close(synced.value, alone.value)
    unsynced = kind(sync=False)
    torch.testing.assert_close(unsynced(COUNTS[rank]), kind(sync=False)(COUNTS[rank]))
    unsynced(COUNTS[rank])
    values = comm.all_gather(unsynced.value.item())
    assert values[0] != values[1], "each worker counts alone without SYNC"
    leave_process_group()


if __name__ == "__main__":
    launch(main, 2, dist_url="auto", args=(sys.argv[1],))
"""


@pytest.mark.parametrize("name", ["EMANormalizer", "BatchNormalizer", "ImageNormalizer"])
def test_two_workers_with_half_a_batch_are_one_with_all_of_it(tmp_path, name):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    result = subprocess.run(
        [sys.executable, str(script), name],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
