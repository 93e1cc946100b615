"""What the processes of a run tell each other; alone, a process talks to itself."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sophia_train.errors import RunError

T = TypeVar("T")


def rank() -> int:
    """Return the number of this process."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def sum_over_processes(tensors: list[Tensor]) -> None:
    """Sum each tensor over all processes, in place."""
    if torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def gather(value: T, group: ProcessGroup | None = None) -> list[T]:
    """Return the values of all processes, by rank; small ones, for they are pickled on their way.

    Args:
        value: of this process.
        group: of all processes, if not the default one.
    """
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value, group)
    return cast(list[T], values)


def _that_can_be_sent(error: OSError | RunError) -> OSError | RunError:
    """An error of the same meaning, without what libraries hang on theirs."""
    if isinstance(error, RunError):
        return error
    return OSError(error.errno, error.strerror or str(error), error.filename)


def together(work: Callable[[], T], timeout: timedelta | None = None) -> list[T]:
    """Do `work` on every process; where one fails, all fail, so that none is left waiting for it.

    Args:
        work: of this process.
        timeout: how long the processes wait for each other; None is the time that any collective has.

    Returns:
        What came of it on each process, by rank.

    Raises:
        OSError, RunError: of this process's work, or else of the first that failed. What else `work` may
            raise is not waited for.
    """
    group = None
    if timeout is not None and torch.distributed.is_initialized():
        group = torch.distributed.new_group(backend="gloo", timeout=timeout)
    result, error = None, None
    try:
        result = work()
    except (OSError, RunError) as caught:
        error = caught
    outcomes = gather((result, error and _that_can_be_sent(error)), group)
    if group is not None:
        torch.distributed.destroy_process_group(group)
    failures = [each for _, each in outcomes if each is not None]
    if failures:
        raise error or failures[0]
    return [cast(T, each) for each, _ in outcomes]
