"""How fast a run is: tokens a second, model FLOPs utilisation, memory, and the share of the Hessian."""

import contextlib
import time
from collections.abc import Iterator

import torch

# dense bf16 FLOP/s by the vendors' datasheets, for the SXM parts where there are several
PEAK_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 150e12,
    "A6000": 155e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
    "V100": 112e12,  # fp16: it has no bf16
}


Moment = float | torch.cuda.Event


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of a known card, or None."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((flops for card, flops in PEAK_FLOPS.items() if card in words), None)


class Throughput:
    """Measures the steps between two reports.

    Args:
        device: the process's device.
        world_size: number of processes, one device each.
    """

    def __init__(self, device: torch.device, world_size: int) -> None:
        self.device = device
        self.peak = peak_flops(device)
        self.world_size = world_size
        self._parts: list[tuple[Moment, Moment]] = []
        self.restart()

    def restart(self) -> None:
        """Begin a new measurement here: what lies between two measurements is not counted."""
        self._steps, self._tokens, self._flops, self._hessian_flops = 0, 0, 0.0, 0.0
        self._parts.clear()
        self._started = time.perf_counter()

    def add(self, tokens: int, flops: float, hessian_flops: float = 0.0) -> None:
        """Count a finished step over all processes: target tokens, model FLOPs, and the Hessian's beside."""
        self._steps += 1
        self._tokens += tokens
        self._flops += flops
        self._hessian_flops += hessian_flops

    @contextlib.contextmanager
    def hessian(self) -> Iterator[None]:
        """Time the body as part of the Hessian; on a GPU by events, so that nothing waits.

        A profiler's trace has it by the name of "hessian".
        """
        begin = self._now()
        with torch.profiler.record_function("hessian"):
            yield
        self._parts.append((begin, self._now()))

    def report(self) -> dict[str, float]:
        """Figures since the last report or restart, by metric name; begins a new measurement.

        Seconds and FLOPs of the Hessian are a step's, on the average over steps with and without a refresh.

        Call it when the device has finished the steps: it is the host's clock that counts.
        """
        seconds = time.perf_counter() - self._started
        hessian = sum(_seconds_between(begin, end) for begin, end in self._parts)
        figures = {
            "perf/tokens_per_second": self._tokens / seconds,
            "perf/step_seconds": seconds / max(1, self._steps),
            "perf/hessian_share": hessian / seconds,
            "perf/hessian_seconds": hessian / max(1, self._steps),
            "perf/hessian_flops": self._hessian_flops / max(1, self._steps),
        }
        if self.peak is not None:
            figures["perf/mfu"] = self._flops / seconds / (self.peak * self.world_size)
        if self.device.type == "cuda":
            figures["perf/peak_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self.restart()
        return figures

    def _now(self) -> Moment:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds_between(begin: Moment, end: Moment) -> float:
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
    end.synchronize()
    return begin.elapsed_time(end) / 1000
