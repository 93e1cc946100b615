"""A corpus of several small units that other processes can import."""

from collections.abc import Sequence
from dataclasses import dataclass

from sophia_train.data import text_files
from sophia_train.data.sources import Text
from sophia_train.data.units import Unit


@dataclass(frozen=True, kw_only=True)
class SmallUnits(Text):
    def units(self) -> Sequence[Unit]:
        return text_files.units(text_files.find(self.path), 1000)
