"""Check a Hugging Face GPT-2 folder, and write it as one verified safetensors file for `init_from=DIR`.

    python scripts/import_hf.py FOLDER --out DIR

`init_from=FOLDER` reads Hugging Face folders as they are. This tells beforehand whether FOLDER holds a model
that can be trained here, and with which settings, and joins shards and old names into one file.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sophia_train.command_line import Parser
from sophia_train.errors import OutputError, exit_code_of
from sophia_train.models import convert


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what save_pretrained wrote")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist"
    )
    options = parser.parse_args(arguments)
    Console(highlight=False, soft_wrap=True).print(import_folder(options.folder, options.out), markup=False)


def import_folder(folder: Path, out: Path) -> str:
    """Import a folder; returns what to tell."""
    if out.exists():
        raise OutputError(f"--out {out} exists already; choose another folder")
    config, state = convert.load_folder(folder)
    convert.export_folder(state, out, config)
    settings = " ".join(
        f"model.{key}={str(value).lower()}" for key, value in dataclasses.asdict(config).items()
    )
    return f"{out}: {convert.describe(config)}\ntrain it with init_from={out} {settings}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
