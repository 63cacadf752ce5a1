"""The manifest: what a kill at any moment leaves, names that are taken, shards, and counts that add up."""

import json
import os
import resource
import signal

import pytest
from prompt_files import jobs_of, resolve

from ldm.errors import NumericsError, ResourceError
from ldm.render.jobs.jobs import Job, Plan, Shard
from ldm.render.jobs.scan import Scan
from ldm.render.output.lines import read_manifest
from ldm.render.output.manifest import Manifest, Report
from ldm.render.prompts.files import read_entries
from tests.children import in_child, status_of


def picture(job):
    """A file's bytes as the runner makes them: the same each time, the job's key inside."""
    return b"PNG of " + json.dumps({"job": job.key, "seed": job.seed}).encode() * 20


def render(folder, jobs, shard=None):
    """Draw what is not there yet; returns the keys that were drawn."""
    drawn = []
    with Manifest(folder, shard) as ledger:
        for job in jobs:
            if ledger.finished(job) is None:
                drawn.append(job.key)
                ledger.save(job, picture(job), seconds=0.5)
    return drawn


def pictures(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".png"}


def identity(folder):
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir() if p.suffix == ".png"}


def records(folder, status="done"):
    return [record for record in read_manifest(folder) if record["status"] == status]


JOBS = ["a cat", "a dog --f dog", "a dog --f dog", "{'not json"]


def test_a_line_says_all_and_a_rerun_leaves_everything_alone(tmp_path):
    jobs = jobs_of(JOBS)
    assert render(tmp_path, jobs) == [job.key for job in jobs]
    for record, job in zip(records(tmp_path), jobs, strict=True):
        path = tmp_path / record["path"]
        assert path.read_bytes() == picture(job) and record["settings"] == job.settings and record["seed"] == job.seed
        assert record["time"].endswith("Z") and len(record["sha256"]) == 64 and record["seconds"] == 0.5
    before, manifest = identity(tmp_path), (tmp_path / "manifest.jsonl").read_bytes()
    assert render(tmp_path, jobs) == []
    assert identity(tmp_path) == before and (tmp_path / "manifest.jsonl").read_bytes() == manifest
    assert sorted(before) == sorted(f"{job.stem}.png" for job in jobs)


CALLS = ("open", "write", "fsync", "link", "unlink", "ftruncate", "chmod", "mkdir")


def stopping_at(number):
    """Make this process end before its `number`-th call that changes the disk."""
    count = 0

    def guarded(call):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)
            return call(*args, **kwargs)

        return wrapper

    for name in CALLS:
        setattr(os, name, guarded(getattr(os, name)))


def test_a_kill_before_any_change_of_the_disk_loses_and_repeats_nothing(tmp_path):
    jobs = jobs_of(JOBS)[:3]
    expected = {f"{job.stem}.png": picture(job) for job in jobs}
    number, status = 0, 9
    while status == 9:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()

        def work(number=number, folder=folder):
            stopping_at(number)
            render(folder, jobs)

        status = status_of(in_child(work))
        left, kept = pictures(folder), identity(folder)
        assert left.items() <= expected.items()  # whole files under their own names, or none
        done = {record["key"] for record in records(folder)}
        assert len(left) - len(done) in (0, 1)
        drawn = render(folder, jobs)
        assert drawn == [job.key for job in jobs if job.key not in done]
        assert pictures(folder) == expected and identity(folder).items() >= kept.items()
        assert [record["key"] for record in records(folder)] == [job.key for job in jobs]
        assert [path.name for path in (folder / ".render" / "1-of-1").iterdir()] == [".lock"]
    assert status == 0 and number > 30


@pytest.mark.parametrize("tail", [b'{"status": "do', b'{"key": "', b"\0" * 300, b"{}", None])
def test_a_torn_last_line_is_cut_off(tmp_path, tail):
    jobs = jobs_of(JOBS)
    render(tmp_path, jobs[:3])
    path = tmp_path / "manifest.jsonl"
    whole = path.read_bytes()
    if tail is None:  # the last line lacks its end alone
        tail, whole = whole.splitlines()[-1], b"\n".join(whole.splitlines()[:-1]) + b"\n"
    path.write_bytes(whole + tail)
    assert len(list(read_manifest(tmp_path))) == whole.count(b"\n")
    before = identity(tmp_path)
    with Manifest(tmp_path) as ledger:
        assert path.read_bytes() == whole and ledger.damaged == 0 and len(ledger) == whole.count(b"\n")
    render(tmp_path, jobs)
    assert [record["key"] for record in records(tmp_path)] == [job.key for job in jobs]
    assert identity(tmp_path).items() >= before.items()


def test_damaged_lines_within_are_counted_and_drawn_again(tmp_path):
    jobs = jobs_of(JOBS)
    render(tmp_path, jobs)
    path = tmp_path / "manifest.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"x" + lines[1], b"\n", *lines[2:]]))
    before = identity(tmp_path)
    with Manifest(tmp_path) as ledger:
        assert ledger.damaged == 2 and len(ledger) == 3
    assert render(tmp_path, jobs) == [jobs[1].key]
    assert identity(tmp_path) == before


def test_a_picture_that_was_taken_away_is_drawn_again(tmp_path):
    jobs = jobs_of(JOBS)
    render(tmp_path, jobs)
    (tmp_path / "dog.png").unlink()
    assert render(tmp_path, jobs) == [jobs[1].key]


def test_the_file_keeps_the_name_of_its_first_rendering(tmp_path):
    render(tmp_path, jobs_of(["a cat", "a dog --f dog"]))
    before = identity(tmp_path)
    longer = jobs_of(["a bird", "a cat", "a bee --f dog", "a dog --f dog"])
    assert render(tmp_path, longer) == [longer[0].key, longer[2].key]
    assert identity(tmp_path).items() >= before.items()
    new = [record["path"] for record in records(tmp_path)[2:]]
    assert new == [f"000001-{longer[0].key[:12]}.png", f"dog-{longer[2].key[:12]}.png"]


def test_what_is_there_is_never_overwritten(tmp_path):
    """Faults G 61."""
    folder, outside = tmp_path / "out", tmp_path / "outside.txt"
    folder.mkdir()
    outside.write_text("mine")
    jobs = jobs_of(["a --f file", "b --f link", "c --f dangling", "d --f folder", "e --f empty"])
    (folder / "file.png").write_text("mine")
    (folder / "link.png").symlink_to(outside)
    (folder / "dangling.png").symlink_to(tmp_path / "nowhere")
    (folder / "folder.png").mkdir()
    (folder / "empty.png").touch()
    render(folder, jobs)
    assert (folder / "file.png").read_text() == outside.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists() and (folder / "empty.png").read_bytes() == b""
    for job, record in zip(jobs, records(folder), strict=True):
        assert record["path"] == f"{job.stem}-{job.key[:12]}.png"
        assert (folder / record["path"]).read_bytes() == picture(job)
    for stem in jobs[0].stems():
        (folder / f"{stem}.png").write_text("taken")
    (folder / "manifest.jsonl").unlink()
    with Manifest(folder) as ledger, pytest.raises(ResourceError, match="three files with this job's names"):
        ledger.save(jobs[0], picture(jobs[0]))


def test_a_picture_without_a_line_is_known_by_its_bytes_or_its_key(tmp_path):
    jobs = jobs_of(["a --f a", "b --f b", "c --f c"])
    (tmp_path / "a.png").write_bytes(picture(jobs[0]))
    (tmp_path / "b.png").write_bytes(b"other bits of the same job: " + jobs[1].key.encode())
    (tmp_path / "c.png").write_bytes(picture(jobs[0]))
    before = identity(tmp_path)
    render(tmp_path, jobs)
    assert [record["path"] for record in records(tmp_path)] == ["a.png", "b.png", f"c-{jobs[2].key[:12]}.png"]
    assert identity(tmp_path).items() >= before.items()


def test_a_manifest_from_elsewhere_leads_nowhere(tmp_path):
    (job,) = jobs_of(["a"])
    (tmp_path / "secret.png").touch()
    folder = tmp_path / "out"
    folder.mkdir()
    for path in ("../secret.png", str(tmp_path / "secret.png"), "", ".", None, "a\0b"):
        (folder / "manifest.jsonl").write_text(json.dumps({"status": "done", "key": job.key, "path": path}) + "\n")
        with Manifest(folder) as ledger:
            assert ledger.finished(job) is None


def test_shards_have_their_own_files_and_know_of_each_other(tmp_path):
    lines = [f"line {i}" for i in range(12)]
    parts = [list(Plan(read_entries(lines), {}, resolve, shard=Shard(i, 2))) for i in (1, 2)]
    with Manifest(tmp_path, Shard(1, 2)) as one, Manifest(tmp_path, Shard(2, 2)) as two:
        for ledger, part in ((one, parts[0]), (two, parts[1])):
            for job in part:
                ledger.save(job, picture(job))
        with pytest.raises(ResourceError, match="is in use by process"), Manifest(tmp_path, Shard(1, 2)):
            pass
    assert sorted(path.name for path in tmp_path.glob("manifest*")) == [
        "manifest-1-of-2.jsonl",
        "manifest-2-of-2.jsonl",
    ]
    assert len(records(tmp_path)) == 12
    with (tmp_path / "manifest-1-of-2.jsonl").open("ab") as handle:
        handle.write(b'{"status": "done", "ke')  # the other shard is writing: not ours to cut
    assert render(tmp_path, jobs_of(lines)) == []
    assert (tmp_path / "manifest-1-of-2.jsonl").read_bytes().endswith(b'"ke')


def test_sharded_and_whole_runs_give_the_same_files(tmp_path):
    lines = [f"line {i % 5} --num_images 2 --f n{i % 3}" for i in range(10)]
    for name, shards in (("whole", [Shard()]), ("parts", [Shard(3, 3), Shard(1, 3), Shard(2, 3)])):
        (tmp_path / name).mkdir()
        for shard in shards:
            render(tmp_path / name, list(Plan(read_entries(lines), {}, resolve, shard=shard)), shard)
    assert pictures(tmp_path / "whole") == pictures(tmp_path / "parts") and len(pictures(tmp_path / "whole")) == 20


def test_a_full_disk_leaves_whole_lines_and_is_named(tmp_path):
    """A limit on the size of files stands for the disk: the manifest meets it in the middle of a line."""
    jobs = jobs_of([f"line {i}" for i in range(20)])

    def run():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        try:
            render(tmp_path, jobs)
        except ResourceError as error:
            return 42 if "cannot be written" in str(error) and "manifest.jsonl" in str(error) else 43

    assert status_of(in_child(run)) == 42
    data = (tmp_path / "manifest.jsonl").read_bytes()
    assert 2000 < len(data) <= 4000 and data.endswith(b"\n")
    done, before = records(tmp_path), identity(tmp_path)
    assert 5 < len(done) < 20 and len(before) == len(done) + 1
    assert len(render(tmp_path, jobs)) == 20 - len(done) and identity(tmp_path).items() >= before.items()
    assert pictures(tmp_path) == {f"{job.stem}.png": picture(job) for job in jobs}


def test_failures_are_lines_too_and_are_tried_again(tmp_path):
    jobs = jobs_of(["a", "b"])
    with Manifest(tmp_path) as ledger:
        ledger.save(jobs[0], picture(jobs[0]))
        ledger.fail(jobs[1], NumericsError("the picture holds NaN", hint="use dtype fp32"))
    (failed,) = records(tmp_path, "failed")
    assert failed["key"] == jobs[1].key and failed["path"] is None and "holds NaN" in failed["error"]
    assert render(tmp_path, jobs) == [jobs[1].key]


def test_the_report_names_everything_and_adds_up(tmp_path):
    lines = ["a", "b --s 0", "c --stepz", "d --num_images 3", "e"]
    plan = Plan(read_entries(lines), {}, resolve)
    items = list(plan)
    scan = Scan(lines=plan.lines, bad=plan.bad, jobs=plan.jobs, finished=2)
    with Report(tmp_path) as report:
        for item in items:
            if not isinstance(item, Job):
                report.bad_line(item)
        report.rendered += 1
        report.failed(items[0], NumericsError("holds NaN"))
        report.finish(scan)
    said = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in said] == ["bad line", "bad line", "failed", "counts"]
    assert [(line["line"], line["field"]) for line in said[:2]] == [(2, "s"), (3, "--stepz")]
    counts = {"lines": 5, "good_lines": 3, "bad_lines": 2, "jobs": 5, "rendered": 1, "finished_before": 2}
    counts |= {"failed": 1, "not_reached": 1, "other_shards": 0}
    assert report.counts(scan) == counts and said[3] == {"kind": "counts", **counts}
    with Report(tmp_path) as report, pytest.raises(AssertionError, match="do not add up"):
        report.rendered += 6
        report.finish(scan)
    assert (tmp_path / "report.jsonl").read_text() == ""  # each run begins its own


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError), Manifest(tmp_path / "file"):
        pass
