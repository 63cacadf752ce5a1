"""The file of resolved jobs: it gives back what was put in, and neither kills nor other shards disturb it."""

import os
import signal

import pytest
import torch
from prompt_files import jobs_of
from render_cases import by_key

from ldm.errors import ResourceError
from ldm.render.drawing.runner import render
from ldm.render.jobs.job_file import JobFile
from ldm.render.jobs.resolve import Resolver
from ldm.render.prompts.line_settings import parse_settings
from tests.children import in_child, status_of

LINES = [f"a cat --d {i}" for i in range(6)]


def test_jobs_come_back_as_they_were(tmp_path):
    lines = ["a cat's eye, été\n --d 5", {"prompt": "x", "negative_prompt": "", "cfg": 0.1, "seed": 2**62}]
    jobs = jobs_of(lines, {"guidance_interval": [0, 0.8], "lora": [["a", 0.5]]})
    for path in (tmp_path / "jobs.jsonl", None):
        with JobFile(path) as file:
            for job in jobs:
                file.add(job)
            file.add_sheet("a title", [1, None, 2**64 - 1])
            assert list(file.jobs()) == list(file.jobs()) == jobs and len(file) == len(jobs)
            assert list(file.sheets()) == [("a title", [1, None, 2**64 - 1])]
    assert list(tmp_path.iterdir()) == []


def test_each_line_is_parsed_and_resolved_once(tiny_folder, tmp_path, monkeypatch):
    """With a grid too, whose sheets need every cell again."""
    from ldm.render.prompts import entry

    parsed, resolved, resolve = [], [], Resolver.__call__
    monkeypatch.setattr(entry, "parse_settings", lambda pairs, base: parsed.append(1) or parse_settings(pairs, base))
    monkeypatch.setattr(Resolver, "__call__", lambda self, asked: resolved.append(asked) or resolve(self, asked))
    words = {"model": str(tiny_folder), "steps": 1, "batch_size": 2}
    render(LINES, tmp_path / "plain", **words)
    assert (len(parsed), len(resolved)) == (6, 1 + 6)  # one for the command's own settings
    parsed.clear()
    resolved.clear()
    assert render(LINES[:2], tmp_path / "grid", grid=["cfg=1,2"], **words).counts["rendered"] == 4
    assert (len(parsed), len(resolved)) == (2, 1 + 4)
    assert len(list((tmp_path / "grid" / "grids").iterdir())) == 2


@pytest.fixture
def one_thread():
    """Children that are forked may not meet OpenMP's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_file_that_a_killed_run_left_is_replaced(tiny_folder, tmp_path, spy, one_thread):
    words, left = {"model": str(tiny_folder), "steps": 1, "batch_size": 2}, tmp_path / "out" / ".render" / "jobs.jsonl"
    render(["a dog"], tmp_path / "other", **words)  # loads what the child shares
    spy.before = lambda seeds, settings: len(spy.batches) == 2 and os.kill(os.getpid(), signal.SIGKILL)
    assert status_of(in_child(lambda: render(LINES, tmp_path / "out", **words))) == -signal.SIGKILL
    assert len(left.read_bytes().splitlines()) == 6
    spy.before = None
    found = render([*LINES[4:], LINES[0]], tmp_path / "out", **words)  # by what the prompts say now
    assert found.counts["finished_before"] + found.counts["rendered"] == 3 and not left.exists()
    left.write_text("no job\n")
    assert render(LINES, tmp_path / "out", **words).counts["jobs"] == 6 and not left.exists()


def test_shards_in_one_folder_have_files_of_their_own(tiny_folder, tmp_path, spy):
    """The second is drawn in the midst of the first."""
    words = {"model": str(tiny_folder), "steps": 1, "batch_size": 1}
    render(LINES, tmp_path / "whole", **words)

    def second(seeds, settings):
        spy.before = None
        render(LINES, tmp_path / "out", shard="2/2", **words)

    spy.before = second
    render(LINES, tmp_path / "out", shard="1/2", **words)
    assert by_key(tmp_path / "out") == by_key(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "out" / ".render").iterdir()) == ["1-of-2", "2-of-2"]


def test_a_disk_that_is_full_for_jobs_is_named(tmp_path):
    (tmp_path / "jobs.jsonl").symlink_to("/dev/full")
    jobs = jobs_of(LINES)
    with pytest.raises(ResourceError, match="free some disk space"), JobFile(tmp_path / "jobs.jsonl") as file:
        for job in jobs:
            file.add(job)
        list(file.jobs())
