"""What several tests of this folder share: entries from bytes, and a resolver that needs no model."""

from ldm.render.jobs.jobs import Plan
from ldm.render.prompts.files import read_entries

MODEL = {"num_inference_steps": 25, "guidance_scale": 6.0, "height": 128, "width": 128, "sampler": "euler"}


def entries_of(tmp_path, content, name="prompts.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_entries(path, name))


def settings_of(tmp_path, content, name="prompts.txt"):
    """The settings of every entry; a bad line fails the test."""
    entries = entries_of(tmp_path, content, name)
    assert [str(entry.error) for entry in entries if entry.error] == []
    return [dict(entry.settings) for entry in entries]


def resolve(settings):
    return {**MODEL, **settings}, {"model": "sha-of-the-model"}


def jobs_of(prompts, defaults=None, **options):
    """The jobs of a list of prompts; a bad one fails the test."""
    jobs = list(Plan(read_entries(prompts), defaults or {}, options.pop("resolve", resolve), **options))
    assert [str(job.error) for job in jobs if hasattr(job, "error")] == []
    return jobs
