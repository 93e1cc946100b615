"""Write a run's model as a Hugging Face folder, which `GPT2LMHeadModel.from_pretrained` loads.

    python scripts/export_hf.py RUN --out DIR

RUN is a run folder (its newest checkpoint is taken) or a checkpoint's folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sophia_train import checkpoint
from sophia_train.command_line import Parser
from sophia_train.errors import OutputError, exit_code_of
from sophia_train.models import convert
from sophia_train.models.gpt2 import GPT2Config


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder or a checkpoint")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist"
    )
    options = parser.parse_args(arguments)
    Console(highlight=False, soft_wrap=True).print(export(options.run, options.out), markup=False)


def export(run: Path, out: Path) -> str:
    """Export the newest checkpoint of a run; returns what to tell."""
    if out.exists():
        raise OutputError(f"--out {out} exists already; choose another folder")
    weights, manifest = checkpoint.load_weights(run)
    config = GPT2Config(**manifest["config"]["model"])
    convert.export_folder(weights, out, config)
    return f"{out}: {convert.describe(config)}, from step {manifest['step']:,} of {run}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
