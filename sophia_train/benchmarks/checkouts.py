"""Code of other projects, read from the user's checkouts of them: none of it is in this repository."""

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from sophia_train.errors import ConfigError, MissingInputError


def load(option: str, folder: Path, file: str, project: str, *names: str) -> ModuleType:
    """Import one file of a checkout.

    Args:
        option: that named the checkout, for messages.
        folder: the checkout.
        file: its name in there.
        project: where the checkout is from, for messages.
        names: what must be in it.

    Raises:
        MissingInputError: there is no such file.
        ConfigError: it is not the file that was meant.
    """
    path = folder / file
    if not path.is_file():
        raise MissingInputError(f"{option} {folder} has no {file}; give a checkout of {project}")
    name = f"{file.removesuffix('.py')}_of_{digest(path)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # torch's compiler looks up the globals of a function there
    spec.loader.exec_module(module)
    if missing := [each for each in names if not hasattr(module, each)]:
        raise ConfigError(f"{option} {folder}: {file} has no {missing[0]}; give a checkout of {project}")
    return module


def digest(path: Path) -> str:
    """The beginning of a file's SHA-256, which says in a report what version it was."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
