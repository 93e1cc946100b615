"""Where the time of a few training steps goes, recorded by torch's profiler (`profile=true`)."""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from sophia_train import durable

logger = logging.getLogger("sophia_train")

SETTLED = 10  # steps after which everything is compiled, allocated and warm
WARM_UP = 2  # steps that the profiler runs without keeping anything: its own start takes time
RECORDED = 3


@contextlib.contextmanager
def traced(folder: Path, step: int, interval: int | None) -> Iterator[Callable[[], bool]]:
    """Record three training steps of the body, and write them to `folder` for a trace viewer.

    Recorded are a step with a refresh of the Hessian, the first that comes 10 steps or more after the start,
    and those before and after it. A body that ends earlier leaves what there is of them.

    Args:
        folder: takes a file of gzipped JSON in Chrome's trace format, named after the steps, and a list of
            what the GPU, or without one the host, spent its time on.
        step: completed steps at the start of the body.
        interval: refreshes are before steps that follow a multiple of so many; None if there are none.

    Yields:
        What to call between two steps; it returns whether it has written the trace, which takes time.

    Raises:
        OSError: the trace could not be written.
    """
    refresh = step + SETTLED
    refresh += -refresh % (interval or 1)
    first, written = refresh - 1, False

    def write(profile: torch.profiler.profile) -> None:
        nonlocal written
        # in completed steps, as in metrics and names of checkpoints; a body may end with the second of them
        last = min(first + RECORDED, step + profile.step_num + 1)
        path = folder / f"steps_{first + 1:08d}-{last:08d}.json.gz"
        with tempfile.TemporaryDirectory() as place:
            made = Path(place, path.name)
            profile.export_chrome_trace(str(made))
            durable.write_bytes(path, made.read_bytes())
        budget = path.with_name(path.name.replace(".json.gz", ".txt"))
        durable.write_text(budget, time_budget(profile, last - first))
        logger.info("steps %d to %d are in %s; open it at https://ui.perfetto.dev", first + 1, last, path)
        logger.info("what they spent their time on is in %s", budget)
        written = True

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(
        skip_first=first - step - WARM_UP, wait=0, warmup=WARM_UP, active=RECORDED, repeat=1
    )
    with torch.profiler.profile(
        activities=activities,
        schedule=schedule,
        on_trace_ready=write,
        acc_events=True,  # else some versions warn of what a second cycle, which there is not, would drop
    ) as profile:

        def between_steps() -> bool:
            before = written
            profile.step()
            return written and not before

        yield between_steps
    if not written:
        logger.warning(
            "profile=true: the run ended before step %d, the first to record; there is no trace", first + 1
        )


def time_budget(profile: torch.profiler.profile, steps: int) -> str:
    """List where the time went, the longest first: kernels of the GPU, or without one what the host did.

    Args:
        profile: of a few steps.
        steps: how many.

    Returns:
        A line each: milliseconds a step, share of all, calls a step, name.
    """
    on_gpu = torch.cuda.is_available()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    rows = []
    for event in profile.key_averages():
        if event.device_type == kind and not event.is_user_annotation:  # which spans others
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            rows.append((spent / 1e3 / steps, event.count / steps, event.key))
    total = sum(spent for spent, _, _ in rows)
    lines = [f"{total:9.2f} ms a step, in all"]
    for spent, calls, name in sorted(rows, reverse=True):
        lines.append(f"{spent:9.3f} {spent / total:6.1%} {calls:7.1f} x  {name}")
    return "\n".join(lines) + "\n"
