"""Where torch's compilers keep what they have compiled, so that the next run starts sooner."""

import os
import tempfile
from pathlib import Path

from sophia_train.errors import OutputError


def keep_in(folder: str) -> None:
    """Let inductor and Triton keep what they compile in `folder`; call it before anything is compiled.

    Args:
        folder: is made if need be; a relative path is relative to the working directory.

    Raises:
        OutputError: nothing can be written there.
    """
    path = Path(folder).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OutputError(
            f"compile_cache={folder} cannot be written ({error.strerror}); choose another folder"
        ) from None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(path / "triton")
