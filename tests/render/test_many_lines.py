"""The two passes of a run over very many lines, without drawing: memory does not grow with the texts."""

import subprocess
import sys

import pytest

MEASURE = """
import resource, sys
from pathlib import Path
from ldm.pipeline.result import Target
from ldm.render.jobs.batches import groups, windows
from ldm.render.prompts.templates import Wildcards
from ldm.render.jobs.jobs import Shard
from ldm.render.drawing.runner import _resolver
from ldm.render.prompts.files import open_prompts
from ldm.render.jobs.job_file import JobFile
from ldm.render.jobs.scan import Run
from ldm.render.jobs.scan import scan

def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

resolver, defaults = _resolver({"model": sys.argv[2]})
rest = {"seed": 0, "shard": Shard(), "batch_size": None, "metadata": True}
run = Run(open_prompts(sys.argv[1]), Target.of("nowhere/"), defaults, resolver, Wildcards(), **rest)
before = used()
with JobFile() as job_file:
    found = scan(run, lambda job: job.index % 2, print, job_file)  # every other one was finished before
    drawn = sum(len(jobs) for window in windows(job_file.jobs()) for _, jobs in groups(window))
    print(found.jobs, drawn, used() - before)
"""


@pytest.mark.slow
def test_a_million_lines_need_less_than_300_mib_above_the_model(tiny_folder, tmp_path):
    """Faults G 61, 65: every line names its file and says its steps; half an hour on a busy machine."""
    path = tmp_path / "many.txt"
    with path.open("w") as handle:
        handle.writelines(f"picture {i} of a {{red|blue}} cat --s {i % 50 + 1} --f name{i}\n" for i in range(1_000_000))
    done = subprocess.run([sys.executable, "-c", MEASURE, path, tiny_folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    jobs, drawn, kib = map(int, done.stdout.split())
    assert (jobs, drawn) == (1_000_000, 500_000) and kib < 300 * 1024
