"""The first pass over the lines of a run: what there is to do, and what is wrong."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ldm import console
from ldm.errors import ConfigError
from ldm.render.jobs.job_file import JobFile
from ldm.render.jobs.jobs import Job, Plan, Shard, short
from ldm.render.prompts.entry import Entry, Prompts
from ldm.render.prompts.templates import Wildcards
from ldm.render.sheets.axes import with_sheets

if TYPE_CHECKING:
    from ldm.pipeline.result import Target
    from ldm.render.jobs.resolve import Resolver

SHOWN = 10  # bad lines that are shown one by one; the report holds all


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


@dataclass
class Scan:
    """What the lines of a run come to."""

    lines: int = 0
    bad: int = 0  # of them
    jobs: int = 0  # of this shard
    finished: int = 0  # of them, before this run
    other_shards: int = 0  # jobs of the others
    keys: array = field(default_factory=lambda: array("Q"))  # of all jobs of this shard, `short`

    @property
    def left(self) -> int:
        return self.jobs - self.finished

    def counts(self, rendered: int = 0, failed: int = 0) -> dict[str, int]:
        """What became of lines and jobs: jobs = rendered + finished_before + failed + not_reached."""
        left = self.left - rendered - failed
        if left < 0 or self.bad > self.lines:
            raise AssertionError(f"the counts do not add up: {self}, {rendered} rendered, {failed} failed")
        lines = {"lines": self.lines, "good_lines": self.lines - self.bad, "bad_lines": self.bad}
        jobs = {"jobs": self.jobs, "rendered": rendered, "finished_before": self.finished, "failed": failed}
        return {**lines, **jobs, "not_reached": left, "other_shards": self.other_shards}

    def refused(self, run: Run) -> ConfigError:
        """The error of a strict run with bad lines."""
        what = f"{self.bad} of {self.lines} lines are bad"
        hint = "mend them, or leave --strict out to have the others drawn"
        return ConfigError(what, where=run.prompts.name, hint=hint)


def scan(
    run: Run, is_finished: Callable[[Job], Any], report_bad_line: Callable[[Entry], Any], job_file: JobFile
) -> Scan:
    """Go through all lines once: parse, resolve and count them; jobs that are not finished are added to `job_file`.

    Raises ConfigError for what is wrong with the prompt file as a whole, ResourceError where `job_file` has no room.
    """
    plan = Plan(run.prompts.entries, run.defaults, run.resolver, run.seed, run.wildcards, run.shard)
    items, result = with_sheets(plan, job_file) if run.prompts.grids else plan, Scan()
    for item in console.progress(items, desc="reading", unit=" images"):
        if isinstance(item, Entry):
            report_bad_line(item)
            if plan.bad <= SHOWN:
                console.warn(str(item.error))
            continue
        result.keys.append(short(item.key))
        if is_finished(item):
            result.finished += 1
        else:
            job_file.add(item)
    if plan.bad > SHOWN:
        console.warn(f"{plan.bad - SHOWN} more bad lines")
    result.lines, result.bad, result.jobs, result.other_shards = plan.lines, plan.bad, plan.jobs, plan.other_shards
    return result
