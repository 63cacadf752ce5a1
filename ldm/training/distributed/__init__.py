"""One run on many processes: what they agree on (group), which rows each takes (rows), the network (wrap)."""

from ldm.training.distributed.alone import ALONE, Alone, by_itself, current
from ldm.training.distributed.processes import processes
from ldm.training.distributed.rows import RowShard, rows_of

__all__ = ["ALONE", "Alone", "RowShard", "by_itself", "current", "processes", "rows_of"]
