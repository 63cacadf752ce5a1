"""What a run would do: its images, its batches, and how long it may take by a trial of its most common batch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import LdmError
from ldm.render.jobs.batches import Group, batch_size, groups, windows
from ldm.render.jobs.digest_table import Table
from ldm.render.jobs.job_file import JobFile
from ldm.render.jobs.jobs import Job
from ldm.render.jobs.resolve import Resolver, image_request
from ldm.render.jobs.scan import Run, Scan, scan
from ldm.render.output.lines import DONE, is_inside, read_manifest

SHOWN = 80  # characters of a prompt


def dry_run(run: Run, strict: bool) -> Scan:
    """Print every image that would be drawn, then the sums; writes no file. `strict`: ConfigError for bad lines."""
    done = _done(run.target.folder)
    with JobFile() as job_file:
        result = scan(run, lambda job: done.get(bytes.fromhex(job.key)) is not None, lambda entry: None, job_file)
        batches, steps, samples = 0, Counter(), {}
        for window in windows(job_file.jobs()):
            for group, jobs in groups(window):
                size = run.batch_size or _batch_size(run.resolver, jobs[0])
                batches += -(-len(jobs) // size)
                steps[group] += len(jobs) * jobs[0].settings["num_inference_steps"]
                samples.setdefault(group, jobs[:size])
            for job in window:
                print(f"{job.index}\t{job.where}\t{job.stem}.{run.target.format}\tseed {job.seed}\t{_beginning(job)}")
    print(f"{result.left} images to draw in {batches} batches, {steps.total()} steps")
    if steps:
        _print_estimate(run.resolver, steps, samples)
    if strict and result.bad:
        raise result.refused(run)
    return result


def _done(folder: Path) -> Table:
    """The keys of what the folder holds, without its lock."""
    done = Table()
    for line in read_manifest(folder) if folder.is_dir() else ():
        if line["status"] == DONE and is_inside(line.get("path")) and (folder / line["path"]).is_file():
            done.set(bytes.fromhex(line["key"]), 1)
    return done


def _batch_size(resolver: Resolver, job: Job) -> int:
    engine, settings = resolver.drawable(job.settings)
    return batch_size(resolver.model(job.settings)[1], settings, engine.device, engine.dtype)


def _print_estimate(resolver: Resolver, steps: Counter[Group], samples: Mapping[Group, list[Job]]) -> None:
    """The time that all steps take, by those of the largest group, in proportion to the area."""
    group, _ = steps.most_common(1)[0]
    try:
        each = _seconds_per_step(resolver, samples[group])
    except LdmError as error:
        print(f"no estimate: {error}")
        return
    tried = samples[group][0].settings
    areas = {other: _area(jobs[0].settings) / _area(tried) for other, jobs in samples.items()}
    seconds = each * sum(number * areas[other] for other, number in steps.items())
    minutes = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
    print(f"about {minutes} here, by a trial of {len(samples[group])} images together, {1 / each:.1f} steps/s")


def _seconds_per_step(resolver: Resolver, jobs: list[Job]) -> float:
    """Of one image among so many, from batches of one and of three steps; the first of three warms up."""
    settings = {name: value for name, value in jobs[0].settings.items() if name not in ("timesteps", "sigmas")}
    requests, seconds = [image_request(job.settings) for job in jobs], []
    most = min(3, settings["num_inference_steps"])
    for number in (1, 1, most):
        engine, few = resolver.drawable({**settings, "num_inference_steps": number})
        start = time.monotonic()
        for _ in engine.generate(few, requests, len(requests), lambda *step: None):
            pass
        seconds.append(time.monotonic() - start)
    each = (seconds[2] - seconds[1]) / (most - 1) if most > 1 else seconds[1]
    return max(each, seconds[2] / 30) / len(jobs)


def _area(settings: Mapping[str, Any]) -> int:
    return settings["width"] * settings["height"]


def _beginning(job: Job) -> str:
    text = " ".join(job.settings["prompt"].split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
