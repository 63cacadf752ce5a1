"""One run on many processes: what they agree on, which rows are whose; in `parallel` the network that all train."""

from .part import Part, part_of
from .processes import ALONE, Alone, current, processes

__all__ = ["ALONE", "Alone", "Part", "current", "part_of", "processes"]
