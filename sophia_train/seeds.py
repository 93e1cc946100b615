"""Every random number of a run is a pure function of the run's seed and of what it is for."""

import hashlib


def derive(seed: int, *purpose: int | str) -> int:
    """Derive the seed of one purpose from the run's seed.

    `derive(seed, "dropout", step, micro_batch)` needs no state, so that a resumed run, or one on another
    number of processes, draws the same numbers.

    Args:
        seed: the run's seed.
        purpose: what the numbers are for: words and integers, in a fixed order.

    Returns:
        An integer in [0, 2**63), the same on every platform (BLAKE2b of the arguments).
    """
    text = "\0".join(str(part) for part in (seed, *purpose))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
