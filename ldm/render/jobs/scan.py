"""One call of `ldm.render`, checked, and the first pass over its lines: what there is to do, and what is wrong."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ldm import console
from ldm.errors import ConfigError
from ldm.render.jobs.digest_table import Table
from ldm.render.jobs.jobs import Job, Plan, Shard, short
from ldm.render.jobs.resolve import Resolver
from ldm.render.prompts.files import Entry
from ldm.render.prompts.snapshot import Prompts
from ldm.render.prompts.templates import Wildcards

if TYPE_CHECKING:
    from ldm.pipeline.result import Target

SHOWN = 10  # bad lines that are told one by one; the report holds all


@dataclass(frozen=True)
class Run:
    """One call of `render`, checked."""

    prompts: Prompts
    target: Target
    defaults: Mapping[str, Any]
    resolver: Resolver
    wildcards: Wildcards | None
    seed: int
    shard: Shard
    batch_size: int | None
    metadata: bool
    ray: str | None = None  # the address of a cluster

    def plan(self) -> Plan:
        """Goes through the lines once."""
        return Plan(self.prompts.read(), self.defaults, self.resolver, self.seed, self.wildcards, self.shard)


@dataclass
class Survey:
    """What the first pass over the lines finds."""

    lines: int = 0
    bad: int = 0  # of them
    jobs: int = 0  # of this shard
    elsewhere: int = 0  # of the others
    keys: array = field(default_factory=lambda: array("Q"))  # of all jobs of this shard, `short`
    finished: Table = field(default_factory=Table)  # keys of those that are finished

    @property
    def left(self) -> int:
        return self.jobs - len(self.finished)


def survey(run: Run, finished: Callable[[Job], Any], bad_line: Callable[[Entry], Any]) -> Survey:
    """Go through all lines: count, resolve, ask of each job whether it is finished, and hand bad lines to `bad_line`.

    Raises ConfigError where there is no line at all, and for what is wrong with the file as a whole.
    """
    found, plan = Survey(), run.plan()
    for item in console.progress(plan, desc="reading", unit=" pictures"):
        if isinstance(item, Entry):
            bad_line(item)
            if plan.bad <= SHOWN:
                console.warn(str(item.error))
            continue
        found.keys.append(short(item.key))
        if finished(item):
            found.finished.set(bytes.fromhex(item.key), 1)
    if plan.lines == 0:
        raise ConfigError("holds no prompts", where=run.prompts.name)
    if plan.bad > SHOWN:
        console.warn(f"{plan.bad - SHOWN} more bad lines")
    found.lines, found.bad, found.jobs, found.elsewhere = plan.lines, plan.bad, plan.jobs, plan.elsewhere
    return found


def unfinished(run: Run, finished: Table) -> Iterator[Job]:
    """The second pass: every job but those that were finished in the first."""
    return (job for job in run.plan() if isinstance(job, Job) and finished.get(bytes.fromhex(job.key)) is None)
