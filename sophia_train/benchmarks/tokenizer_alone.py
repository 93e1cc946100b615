"""A process that only tokenises: `python -m sophia_train.benchmarks.tokenizer_alone FILE`, as of `write`.

A module of its own, so that the process has nothing to import but what tokenising needs.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sophia_train.data.tokenizers import load_tokenizer


def write(texts: Sequence[str], path: Path) -> None:
    """Write documents to a file: a line with the length of each in bytes, then all of them in UTF-8."""
    encoded = [text.encode(errors="surrogatepass") for text in texts]
    with path.open("wb") as file:
        file.write(json.dumps([len(text) for text in encoded]).encode() + b"\n")
        file.writelines(encoded)


def run(paths: Sequence[Path]) -> tuple[int, float]:
    """Tokenise each file in a process of its own, all at once.

    Returns:
        Tokens, with one for each document's end of text, and the seconds of the slowest process that its
        tokenizer took, without start and reading.
    """
    command = [sys.executable, "-m", "sophia_train.benchmarks.tokenizer_alone"]
    processes = [
        subprocess.Popen([*command, str(path)], stdout=subprocess.PIPE, text=True)  # stderr is seen
        for path in paths
    ]
    outputs = [process.communicate()[0] for process in processes]
    for process in processes:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
    tokens, seconds = zip(*(output.split() for output in outputs), strict=True)
    return sum(map(int, tokens)), max(map(float, seconds))


def main(path: Path) -> None:
    """Tokenise the documents of a file, and print how many tokens there were and in how many seconds."""
    tokenizer = load_tokenizer("gpt2")
    tokenizer.encode("")
    with path.open("rb") as file:
        texts = [file.read(length).decode(errors="surrogatepass") for length in json.loads(file.readline())]
    began = time.perf_counter()
    tokens = sum(len(tokenizer.encode_array(text)) + 1 for text in texts)
    print(tokens, time.perf_counter() - began)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
