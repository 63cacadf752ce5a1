"""What a run would do: its pictures, its batches, and how long it may take by a trial of its most common batch."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ldm.errors import LdmError
from ldm.render.jobs.batches import Group, batch_size, groups, windows
from ldm.render.jobs.digest_table import Table
from ldm.render.jobs.jobs import Job
from ldm.render.jobs.resolve import Resolver, picture
from ldm.render.jobs.scan import Run, Survey, survey, unfinished
from ldm.render.output.manifest import DONE, is_inside, read_manifest

TEXT = 80  # characters of a prompt that are shown


def dry(run: Run) -> tuple[Survey, dict[str, int]]:
    """Print every picture that would be drawn, then the sums; writes no file. Returns the counts of a run."""
    done = _done(run.target.folder)
    found = survey(run, lambda job: done.get(bytes.fromhex(job.key)) is not None, lambda entry: None)
    batches, steps, first = 0, Counter(), {}
    for window in windows(unfinished(run, found.finished)):
        for group, jobs in groups(window):
            size = run.batch_size or _batch_size(run.resolver, jobs[0])
            batches += -(-len(jobs) // size)
            steps[group] += len(jobs) * jobs[0].settings["num_inference_steps"]
            first.setdefault(group, jobs[:size])
        for job in window:
            print(f"{job.index}\t{job.where}\t{job.stem}.{run.target.format}\tseed {job.seed}\t{_line(job)}")
    print(f"{found.left} pictures to draw in {batches} batches, {steps.total()} steps")
    if steps:
        _print_estimate(run.resolver, steps, first)
    counts = {"lines": found.lines, "bad_lines": found.bad, "jobs": found.jobs, "rendered": 0, "failed": 0}
    counts |= {"finished_before": found.jobs - found.left, "not_reached": found.left, "other_shards": found.elsewhere}
    return found, counts


def _done(folder: Path) -> Table:
    """The keys of what the folder holds, without its lock."""
    done = Table()
    for record in read_manifest(folder) if folder.is_dir() else ():
        if record["status"] == DONE and is_inside(record.get("path")) and (folder / record["path"]).is_file():
            done.set(bytes.fromhex(record["key"]), 1)
    return done


def _batch_size(resolver: Resolver, job: Job) -> int:
    painter, settings = resolver.drawable(job.settings)
    return batch_size(resolver.model(job.settings)[1], settings, painter.device, painter.dtype)


def _print_estimate(resolver: Resolver, steps: Counter[Group], first: dict[Group, list[Job]]) -> None:
    """The time that all steps take, by those of the largest group, each as long as its area says."""
    group, _ = steps.most_common(1)[0]
    try:
        each = _seconds_a_step(resolver, first[group])
    except LdmError as error:
        print(f"no estimate: {error}")
        return
    tried = first[group][0].settings
    areas = {other: _area(jobs[0].settings) / _area(tried) for other, jobs in first.items()}
    seconds = each * sum(number * areas[other] for other, number in steps.items())
    minutes = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
    print(f"about {minutes} here, by a trial of {len(first[group])} pictures together, {1 / each:.1f} steps/s")


def _seconds_a_step(resolver: Resolver, jobs: list[Job]) -> float:
    """Of one picture among so many, from batches of one and of three steps; the first of three warms up."""
    painter, settings = resolver.drawable(jobs[0].settings)
    pictures, seconds = [picture(job.settings) for job in jobs], []
    for number in (1, 1, min(3, settings.num_inference_steps)):
        short: Any = dataclasses.replace(settings, num_inference_steps=number, timesteps=None, sigmas=None)
        start = time.monotonic()
        for _ in painter.draw(short, pictures, len(pictures), lambda *step: None):
            pass
        seconds.append(time.monotonic() - start)
    more = min(3, settings.num_inference_steps) - 1
    each = (seconds[2] - seconds[1]) / more if more else seconds[1]
    return max(each, seconds[2] / 30) / len(jobs)


def _area(settings: Any) -> int:
    return settings["width"] * settings["height"]


def _line(job: Job) -> str:
    text = " ".join(job.settings["prompt"].split())
    return text if len(text) <= TEXT else f"{text[: TEXT - 1]}…"
