"""Long text in pieces, which bound the memory that tokenising takes."""

from collections.abc import Iterable, Iterator

CHUNK_CHARACTERS = 1 << 20
LONGEST_PIECE = 8 * CHUNK_CHARACTERS


def cut(text: str) -> Iterable[str]:
    """Cut a text that is at hand, if it is long, as `pieces` does."""
    if len(text) <= CHUNK_CHARACTERS:
        return [text]
    starts = range(0, len(text), CHUNK_CHARACTERS)
    return pieces(text[start : start + CHUNK_CHARACTERS] for start in starts)


def pieces(texts: Iterable[str]) -> Iterator[str]:
    """Cut text where GPT-2's pattern cuts anyway, so that the tokens do not depend on the pieces.

    That is after a line end with no other white space beside it. Text without any, for 8 Mi characters, is
    cut all the same: its tokens may differ there, its bytes do not.
    """
    rest = ""
    for text in texts:
        rest += text
        at = rest.rfind("\n", 0, -1)
        while at > 0 and (rest[at - 1].isspace() or rest[at + 1].isspace()):
            at = rest.rfind("\n", 0, at)
        if at > 0:
            yield rest[: at + 1]
            rest = rest[at + 1 :]
        elif len(rest) >= LONGEST_PIECE:
            yield rest
            rest = ""
    if rest:
        yield rest
