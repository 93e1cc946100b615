"""Continue a text with the model of a run.

    python scripts/sample.py RUN --prompt TEXT [--tokens N] [--temperature T] [--top-k K] [--samples N]

RUN is a run folder (its newest checkpoint is taken), a checkpoint's folder, or a Hugging Face GPT-2 folder.
The tokenizer is that of the run; where its tokenizer.json has moved, --tokenizer says where to.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sophia_train import checkpoint
from sophia_train.command_line import Parser, whole_number
from sophia_train.data.tokenizers import Tokenizer, load_tokenizer
from sophia_train.errors import ConfigError, DataError, MissingInputError, UnavailableError, exit_code_of
from sophia_train.models import convert
from sophia_train.models.gpt2 import GPT2, GPT2Config


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run, a checkpoint, or a Hugging Face folder")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue; may be empty")
    parser.add_argument(
        "--tokens", type=whole_number, default=256, metavar="N", help="how many to add (%(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=1.0,
        metavar="T",
        help="divides the logits; 0 takes the likeliest token (%(default)s)",
    )
    parser.add_argument(
        "--top-k", type=whole_number, metavar="K", help="choose among the K likeliest tokens only"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1337,
        metavar="S",
        help="of the first sample, then S + 1 (%(default)s)",
    )
    parser.add_argument(
        "--samples", type=whole_number, default=1, metavar="N", help="how many continuations (%(default)s)"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="the run's tokenizer.json, where it is not where it was"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="where to compute (cuda where there is one)"
    )
    options = parser.parse_args(arguments)
    device = _device(options.device)
    model, tokenizer = load(options.run, options.tokenizer)
    model.to(device).eval()
    prompt = torch.tensor([tokenizer.encode(options.prompt) or [tokenizer.end_of_text]], device=device)
    for number in range(options.samples):
        ids = model.generate(
            prompt,
            options.tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            seed=options.seed + number,
            words=tokenizer.vocab_size,
        )
        separator = "\n---\n" if number else ""
        sys.stdout.write(f"{separator}{tokenizer.decode(ids[0].tolist())}\n")
        sys.stdout.flush()


def load(run: Path, tokenizer_file: str | None = None) -> tuple[GPT2, Tokenizer]:
    """Load a model and the tokenizer that its text was made with.

    Args:
        run: a run folder, a checkpoint or a Hugging Face folder.
        tokenizer_file: where the tokenizer.json is; None for where the run had it, and for GPT-2's own
            tokenizer with a Hugging Face folder.

    Raises:
        MissingInputError: there is no model, or its tokenizer is not where it was.
        DataError: what is there is damaged, or the tokenizer is another one than the run's.
        ConfigError: a Hugging Face folder holds something else than a GPT-2 over the tokenizer's vocabulary.
    """
    if (run / convert.CONFIG).is_file() and not (run / "metrics.jsonl").is_file():  # a run has both
        config, weights = convert.load_folder(run)
        tokenizer = _given(tokenizer_file or "gpt2")
        if config.vocab_size < tokenizer.vocab_size:
            raise ConfigError(
                f"{run} holds a model of {config.vocab_size:,} words, fewer than the "
                f"{tokenizer.vocab_size:,} of {tokenizer_file or 'gpt2'}; give its own by --tokenizer FILE"
            )
    else:
        weights, manifest = checkpoint.load_weights(run)
        config = GPT2Config(**manifest["config"]["model"])
        tokenizer = _tokenizer_of(run, manifest, tokenizer_file)
    model = GPT2(config)
    checkpoint.load_parameters(model, weights, str(run))
    return model, tokenizer


def _tokenizer_of(run: Path, manifest: Mapping[str, Any], file: str | None) -> Tokenizer:
    """Load the tokenizer of a run, from a file if one is given, and check that it is the same."""
    place = manifest["config"]["data"]["tokenizer"]
    try:
        tokenizer = _given(file) if file else load_tokenizer(place)
    except (MissingInputError, ConfigError) as error:
        if file:
            raise
        raise MissingInputError(
            f"{run} was trained with data.tokenizer={place}, which is not there any more; "
            "say where it is by --tokenizer FILE"
        ) from error
    trained_with = manifest.get("tokenizer", tokenizer.name)  # older checkpoints do not say
    if tokenizer.name != trained_with:
        raise DataError(
            f"{run} was trained with the tokenizer {trained_with}, and {file or place} is {tokenizer.name}; "
            "give the same one by --tokenizer FILE"
        )
    return tokenizer


def _given(file: str) -> Tokenizer:
    try:
        return load_tokenizer(file)
    except (MissingInputError, ConfigError):
        raise MissingInputError(f"--tokenizer {file} is no tokenizer.json; give the run's own") from None


def temperature(text: str) -> float:
    """Read a temperature: a number of at least 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def _device(name: str | None) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UnavailableError("--device cuda, but torch sees no GPU; use --device cpu")
    return torch.device(name or ("cuda" if available else "cpu"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
