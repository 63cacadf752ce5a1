"""What the tests of rendering share: a spy on the batches, folders as tables."""

import json

from ldm.render.output.lines import read_manifest


def pictures(folder):
    """Name -> bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".png"}


def by_key(folder):
    """Key of the job -> bytes of its picture."""
    done = (record for record in read_manifest(folder) if record["status"] == "done")
    return {record["key"]: (folder / record["path"]).read_bytes() for record in done}


def identity(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.png")}


def report_of(folder):
    return [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]


class Spy:
    """Writes down the seeds of every batch that the networks draw, in a file that survives its process."""

    def __init__(self, path):
        self.path, self.before, self.after = path, None, None

    def install(self, monkeypatch):
        from ldm.pipeline import engine

        drawn = engine.Engine.generate_batch

        def draw(self_, model, settings, batch, watch=None):
            seeds = [request.seed for request in batch]
            if self.before:
                self.before(seeds, settings)
            images = drawn(self_, model, settings, batch, watch)
            with self.path.open("a") as handle:
                handle.write(json.dumps(seeds) + "\n")
            return self.after(seeds, images) if self.after else images

        monkeypatch.setattr(engine.Engine, "generate_batch", draw)
        return self

    @property
    def batches(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    @property
    def seeds(self):
        return [seed for batch in self.batches for seed in batch]
