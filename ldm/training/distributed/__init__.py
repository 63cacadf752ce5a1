"""One run on many processes: which rows each takes (alone), what they agree on (group), the network (wrap)."""

from ldm.training.distributed.alone import ALONE, Alone, RowShard, by_itself, current
from ldm.training.distributed.group import rows_of
from ldm.training.distributed.processes import processes

__all__ = ["ALONE", "Alone", "RowShard", "by_itself", "current", "processes", "rows_of"]
