"""What can end a run, each with its sysexits code; every message is one line that names the fix."""

import os
import sys
from collections.abc import Callable


class RunError(Exception):
    """A run cannot go on. The message is one line for a person: what, its value, and the fix.

    Attributes:
        code: of sysexits.
        common: every process of a run raises it between the same two collectives if one does.
    """

    code = 70
    common = False


class ConfigError(RunError):
    """A setting is unknown, of the wrong type, out of range, or at odds with another one."""

    code = 64


class DataError(RunError):
    """Data, a checkpoint or the numbers of the training itself are not usable."""

    code = 65


class MissingInputError(RunError):
    """A file or folder that was asked for is not there."""

    code = 66


class UnavailableError(RunError):
    """A service or an optional package that was asked for is not to be had."""

    code = 69


class OutputError(RunError):
    """The run folder cannot be written or belongs to another process."""

    code = 73


class StorageError(RunError):
    """Writing failed half-way, as on a full disk; what was committed before is intact."""

    code = 74


class Interrupted(RunError):
    """The run was asked to stop, saved its state, and can be continued."""

    code = 75
    common = True


def from_os_error(error: OSError) -> RunError:
    """Say what an error of the operating system means for a run: what failed, where, and what to do."""
    where = f" ({error.filename})" if error.filename else ""
    if isinstance(error, PermissionError):
        return OutputError(f"{error.strerror}{where}; choose another place, or change its permissions")
    return StorageError(
        f"{error.strerror or error}{where}; make room or mend the disk, and run it again to go on"
    )


def as_run_error(error: BaseException) -> RunError:
    """Say what any exception means for a run; of a defect, its type and message."""
    if isinstance(error, RunError):
        return error
    if isinstance(error, OSError):
        return from_os_error(error)
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted at once; run it again to go on from what was saved last")
    return RunError(f"{type(error).__name__}: {error}")


def is_first_process() -> bool:
    """Whether this is the process with rank 0, by what its launcher says; alone, it is."""
    return os.environ.get("RANK", "0") == "0"


def exit_code_of(
    work: Callable[[], int | None],
    speaks: Callable[[BaseException], bool] = lambda error: is_first_process(),
) -> int:
    """Do `work` and return its exit code, None being 0.

    What can end a run becomes one `error:` line on stderr, and its code; any other exception is a defect
    and passes.

    Args:
        work: to do.
        speaks: asked with the error of `work`, whether of several processes this one is to say so.
    """
    try:
        return work() or 0
    except (RunError, OSError, KeyboardInterrupt) as error:
        failure, told_here = as_run_error(error), speaks(error)
    except Exception as defect:
        if not speaks(defect):
            return RunError.code
        defect.add_note(f"in process {os.environ.get('RANK', '0')}")
        raise
    if told_here:
        process = "" if is_first_process() else f"process {os.environ['RANK']}: "
        sys.stderr.write(f"error: {process}{' '.join(str(failure).split())}\n")
    return failure.code
