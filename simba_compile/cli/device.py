"""What a benchmark asks of a device: run on it, wait for it, time it, and say what it is.

The CPU answers too, so that all of the GPU benchmark but the calls in this file, and those of mamba-ssm, runs where there is
no GPU.
"""

import contextlib
import importlib
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from simba_compile.cli import machine
from simba_compile.cli.timing import Timing

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH", "Memcpy HtoD")
PEERS = ("mamba_ssm", "causal_conv1d")  # whose kernels transformers runs where it can import them
RANGE = "simba bench"  # what is profiled
WARM_SECONDS = 0.3  # of work before anything is timed: an idle GPU clocks itself down


def _imports(name: str) -> bool:
    """Whether a package is there and works: those for another torch fail in ways of their own."""
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True


class Device:
    """One device.

    Parameters
    ----------
    name : {"cuda", "cpu"}
        Its type in torch; ROCm's is "cuda", too.
    """

    def __init__(self, name: str) -> None:
        self.name, self.is_gpu = name, name == "cuda"
        self.lost = False  # a failed capture keeps its stream and memory; a profiler stays, and slows launches down

    def describe(self) -> dict[str, Any]:
        """What a measurement depends on."""
        about: dict[str, Any] = dict(machine.describe()) | {"device": machine.cpu_name()}
        if self.is_gpu:
            properties = torch.cuda.get_device_properties(0)
            about |= {
                "device": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
                "cache_bytes": properties.L2_cache_size,
                "cuda": torch.version.cuda or torch.version.hip,
                "peers": [name for name in PEERS if _imports(name)],
            }
        return about

    def wait(self) -> None:
        """Return when all that was started on the device is done."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def is_usable(self) -> bool:
        """Whether this process can still use it: after a bad address, torch raises the same error at every further call."""
        try:
            self.wait()
        except RuntimeError:
            return False
        return not self.lost

    def seconds(self, call: Callable[[], object]) -> float:
        """How long a call takes, by the host's clock, with all that it starts on the device."""
        self.wait()
        begin = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - begin

    def time(self, call: Callable[[], object], runs: int, most: float) -> Timing:
        """Runs of a call that was called before.

        Parameters
        ----------
        call : callable
        runs : int
            How many; fewer once they took `most` seconds. A call that is shorter than a millisecond is repeated within a
            run, so that starting it is not what is measured.
        most : float
            Seconds.
        """
        once = spent = self.seconds(call)
        while self.is_gpu and spent < WARM_SECONDS:
            once = self.seconds(call)
            spent += once
        within = max(1, min(1000, int(1e-3 / max(once, 1e-6))))
        taken = [once] if within == 1 else []
        while len(taken) < runs and (not taken or sum(taken) * within < most):
            taken.append(self.seconds(lambda: [call() for _ in range(within)]) / within)
        return Timing(tuple(taken))

    def peak_mib(self, call: Callable[[], object]) -> float | None:
        """How much the memory of the device grows during a call; None where nobody counts it."""
        if not self.is_gpu:
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def free(self) -> None:
        """Give back memory that nothing holds any more."""
        if self.is_gpu:
            torch.cuda.empty_cache()

    def time_on_it(self, call: Callable[[], object], runs: int, most: float) -> Timing:
        """`time` of what a call has the device do alone: to start a short kernel takes the host longer than the kernel runs.

        The call is repeated within a CUDA graph, for a millisecond or so.
        """
        repeats = max(1, min(100, int(1e-3 / max(self.seconds(call), 1e-6))))
        graph = self.captured(call, repeats)
        graph()
        once = self.seconds(graph)
        if once < 5e-4:  # what was repeated takes the host longer than the device: now its own time is known
            repeats = min(1000, int(repeats * 1e-3 / max(once, 1e-6)))
            graph = self.captured(call, repeats)
        taken = self.time(graph, runs, most)
        return Timing(tuple(run / repeats for run in taken.runs))

    def captured(self, call: Callable[[], object], repeats: int = 1) -> Callable[[], object]:
        """So many calls as one CUDA graph, which starts all their kernels at once; the CPU has none, and runs the calls."""

        def every() -> None:
            for _ in range(repeats):
                call()

        if not self.is_gpu:
            return every
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warmed up beside what is captured, as torch asks for
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self.lost = True
        with torch.cuda.graph(graph):
            every()
        self.lost = False
        return graph.replay

    def profiled(self, call: Callable[[], object]) -> tuple[dict[str, float], dict[str, int]]:
        """The microseconds that each operator of a call takes on the device, and how often the call waits for the device.

        Returns
        -------
        dict of str to float
            By the operator's name, with all that it calls; `RANGE` is the whole call.
        dict of str to int
            Of `WAITS`, those that occurred within the call. A wait is one of the host, or a copy to or from its memory.
        """
        self.lost = self.is_gpu
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler announces itself each time
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.is_gpu else [])]
        self.wait()
        with profile(activities=activities) as taken:
            with record_function(RANGE):
                call()
            self.wait()
        spent = "device_time_total" if self.is_gpu else "cpu_time_total"
        times = {event.key: float(getattr(event, spent)) for event in taken.key_averages()}
        events = list(taken.events() or [])
        whole = next(event for event in events if event.name == RANGE and event.device_type == DeviceType.CPU)
        waits: dict[str, int] = {}
        for event in events:
            name = next((wait for wait in WAITS if event.name.startswith(wait)), None)
            if name is not None and whole.time_range.start <= event.time_range.start <= whole.time_range.end:
                waits[name] = waits.get(name, 0) + 1
        if self.is_gpu:  # the kernels themselves; what the profiler says of ranges has the gaps between them
            kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
            times[RANGE] = sum(float(event.self_device_time_total) for event in kernels)
        return times, waits

    def on(self) -> contextlib.AbstractContextManager:
        """New tensors are made on it."""
        return torch.device(self.name)
