"""Memory of the process or the GPU: how much a call takes, how much is left.

*cold* and *warm*: by default, glibc takes each large buffer fresh from the operating system and
gives it back at once, so that every use of it begins with page faults ("cold"). After
:func:`warm_allocator` pages are reused ("warm"), as PyTorch's CUDA allocator does anyway.
"""

import ctypes
import json
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


def peak_mib(call: Callable[[], object], device: str = "cpu") -> float | None:
    """Memory that a call takes above what was allocated before it, in MiB.

    On the CPU it is the growth of the process's peak resident size, which Linux alone can reset;
    None elsewhere (the call is made all the same).
    """
    if on_cuda(device):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before) / MIB
    _malloc("malloc_trim", 0)  # what free() kept would hide memory that the call takes
    try:
        Path("/proc/self/clear_refs").write_text("5")
        start = _resident("VmRSS")
    except OSError:
        call()
        return None
    call()
    return max(0.0, _resident("VmHWM") - start)


def tensors_mib(call: Callable[[], object]) -> float:
    """Memory that a call's tensors on the CPU take at their most, in MiB.

    What PyTorch's allocator hands out, as ``max_memory_allocated`` counts it on a GPU, and so the
    same in every run; :func:`peak_mib` is that and what the C library makes of it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [x for x in events if x.get("name") == "[memory]" and x["args"]["Device Type"] == 0]
    changes.sort(key=lambda event: event["ts"])
    return max(accumulate((x["args"]["Bytes"] for x in changes), initial=0)) / MIB


def _resident(field: str) -> float:
    """A field of /proc/self/status, which counts in kB, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(match.group(1)) / 1024


def warm_allocator() -> bool:
    """Let glibc reuse pages from here on, for the rest of the process.

    Returns:
        Whether that worked; it does not without glibc.
    """
    no_mmap = _malloc("mallopt", -4, 0)  # M_MMAP_MAX
    no_trim = _malloc("mallopt", -1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return no_mmap and no_trim


def allocators(device: str) -> Iterator[str]:
    """``"cold"``, then ``"warm"``, which sets the process so; a GPU's allocator is warm only."""
    if not on_cuda(device):
        yield "cold"
        if not warm_allocator():
            print("no glibc: warm memory is not measured", file=sys.stderr)
            return
    yield "warm"


def _malloc(function: str, *arguments: int) -> bool:
    """Call one of glibc's own functions; False where there is none, or it refuses."""
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    return bool(getattr(ctypes.CDLL(None), function)(*arguments))


def available_gib(device: str = "cpu") -> float:
    """Memory that could be had now, in GiB; infinite where that is not known."""
    if on_cuda(device):
        return float(torch.cuda.mem_get_info(device)[0]) / 2**30
    free = float("inf")
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
        free = int(match.group(1)) / 2**20 if match else free
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{x}").read_text().strip() for x in ("max", "current"))
        free = free if limit == "max" else min(free, (int(limit) - int(used)) / 2**30)
    except (OSError, ValueError):
        pass
    return free


def on_cuda(device: str) -> bool:
    """Whether a device such as ``"cuda:0"`` is a GPU."""
    return torch.device(device).type == "cuda"
