"""Rendering on a Ray cluster: the same bytes as without one, whatever becomes of its workers."""

import importlib.util
import os
import pickle
import signal
import socket
import threading
import time

import pytest
import torch
from prompt_files import jobs_of
from render_cases import by_key, pictures, report_of

from ldm.cli import main
from ldm.errors import ConfigError, Interrupted, ModelError
from ldm.images import encode
from ldm.render.drawing import ray_pool
from ldm.render.drawing.runner import render
from ldm.render.drawing.writer import Drawn, Encode
from ldm.render.jobs.batches import Group
from ldm.render.jobs.resolve import Resolver
from ldm.render.output.lines import read_manifest

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="ray is not installed")
two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core is one worker")


# Without a cluster


def test_without_the_package_nothing_is_begun(tiny_folder, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    (tmp_path / "p.txt").write_text("a cat\n")
    words = ["render", str(tmp_path / "p.txt"), "-o", str(tmp_path / "out"), "--model", str(tiny_folder)]
    assert main([*words, "--ray", "local"]) == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert "ray: the package ray is not installed; pip install 'ldm-pipeline[ray]'" in said


@pytest.mark.parametrize("address", ["", 7])
def test_what_is_no_address_is_refused(tmp_path, address):
    with pytest.raises(ConfigError, match="expected an address"):
        render(["a cat"], tmp_path / "out", ray=address)


@needs_ray
def test_a_cluster_that_is_not_there_is_refused_at_once(tiny_folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"no Ray cluster at {address} .*ray start --head"):
            render(["a cat"], tmp_path / "out", model=tiny_folder, ray=address)
    assert not (tmp_path / "out").exists()


def test_workers_take_what_the_cluster_has():
    assert ray_pool.places({"CPU": 9}, "auto", 2) == ("cpu", 4, {"num_cpus": 2})
    assert ray_pool.places({"CPU": 9, "GPU": 3}, "auto", 2)[:2] == ("cuda", 3)
    assert ray_pool.places({"CPU": 9, "GPU": 3}, "cpu", 2)[:2] == ("cpu", 4)
    with pytest.raises(ConfigError, match="has 1 cores, and a worker needs 2; OMP_NUM_THREADS=1"):
        ray_pool.places({"CPU": 1}, "auto", 2)
    with pytest.raises(ConfigError, match="has no GPU"):
        ray_pool.places({"CPU": 4}, "cuda", 2)


def test_workers_are_given_whole_batches():
    lines = [{"prompt": "a cat", "seed": i, "num_inference_steps": i % 2 + 1} for i in range(14)]
    jobs = jobs_of(lines, {"negative_prompt": "", "model": "tiny"})
    parts = list(ray_pool.job_batches(jobs, 3))
    assert sorted(len(part.jobs) for part in parts) == [1, 1, 3, 3, 3, 3]
    assert all(len({Group.of(job.settings) for job in part.jobs}) == 1 for part in parts)
    assert sorted(job.seed for part in parts for job in part.jobs) == list(range(14))


def test_a_resolver_is_sent_as_its_arguments(tiny_folder):
    resolver = Resolver("loras", device="cpu", attention="chunked")
    asked = {"prompt": "a cat", "seed": 1, "model": str(tiny_folder), "dtype": "fp32"}
    settings, _ = resolver(asked)
    sent = pickle.loads(pickle.dumps(resolver))
    assert sent(asked) == resolver(asked) and settings["dtype"] == "fp32" and sent.device == "cpu"
    assert sent.model(settings)[0].placement.attention == "chunked"


def test_pictures_come_as_the_bytes_of_their_files_in_their_order():
    from PIL import Image

    jobs, image = jobs_of(["a cat", "a dog"]), Image.new("RGB", (8, 8), "red")
    encoder, bare = (
        ray_pool.RayEncoder(Encode("png", metadata=False), 2),
        {"prompt": "a", "remarks": ["an open bracket"]},
    )
    encoder.put(Drawn(jobs[0], image, bare))
    encoder.put(Drawn(jobs[1], None, {}, ModelError("broken")))
    first, second = pickle.loads(pickle.dumps(encoder.take()))
    assert first.image == encode(image) == Encode("png", True)(first) and first.remarks == first.metadata
    assert second.job == jobs[1] and str(second.error) == "broken" and encoder.take() == []


# On a cluster of two workers


@pytest.fixture
def lines():
    return [f"a cat number {i} --d {i} --s {i % 2 + 8}" for i in range(40)]


@pytest.fixture
def on_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def once(enough, act):
    """In a thread: wait until `enough()`, then `act()`. Returns what `act` gave, in a list."""
    found = []

    def wait():
        while not enough():
            time.sleep(0.01)
        found.append(act())

    threading.Thread(target=wait, daemon=True).start()
    return found


def images_in(folder):
    return lambda: len(list(folder.glob("*.png"))) >= 10


def kill_a_worker():
    """SIGKILL to one of the workers that this process has started; its id."""
    children = {}
    for stat in os.listdir("/proc"):
        if stat.isdecimal():
            with open(f"/proc/{stat}/stat") as text, open(f"/proc/{stat}/cmdline") as words:
                parent = int(text.read().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append((int(stat), words.read()))
    below = [(os.getpid(), "")]
    for pid, _ in below:
        below += children.get(pid, [])
    pid = next(pid for pid, words in below if words.startswith("ray::Worker"))
    os.kill(pid, signal.SIGKILL)
    return pid


@needs_ray
@two_cores
@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_bytes_are_the_same(tiny_folder, tmp_path, lines, on_one_thread):
    words = {"model": str(tiny_folder), "batch_size": 4}
    render([*lines, "a --s 0"], tmp_path / "alone", **words)
    killed = once(images_in(tmp_path / "ray"), kill_a_worker)
    found = render([*lines, "a --s 0"], tmp_path / "ray", ray="local", **words)
    assert len(killed) == 1 and not os.path.exists(f"/proc/{killed[0]}")
    assert found.counts["rendered"] == 40 and found.exit_code == 3
    assert pictures(tmp_path / "ray") == pictures(tmp_path / "alone")
    assert sorted(record["seed"] for record in read_manifest(tmp_path / "ray")) == list(range(40))
    assert by_key(tmp_path / "ray") == by_key(tmp_path / "alone")


@needs_ray
@two_cores
@pytest.mark.slow
def test_signals_and_a_picture_that_kills_its_workers(tiny_folder, tmp_path, lines, on_one_thread, monkeypatch, capsys):
    class Mortal(ray_pool.Worker):
        def draw(self, jobs):
            if any(job.seed == 13 for job in jobs):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().draw(jobs)

    monkeypatch.setattr(ray_pool, "Worker", Mortal)
    words, handler = {"model": str(tiny_folder), "batch_size": 4, "ray": "local"}, signal.getsignal(signal.SIGTERM)
    once(images_in(tmp_path / "ray"), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="all saved; the same command goes on") as stop:
        render([line for i, line in enumerate(lines) if i != 13], tmp_path / "ray", **words)
    assert stop.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) is handler
    before = len(pictures(tmp_path / "ray"))
    assert 10 <= before < 39 and report_of(tmp_path / "ray")[-1]["rendered"] == before
    found = render(lines, tmp_path / "ray", **words)
    assert found.counts["rendered"] == 39 - before and found.counts["failed"] == 1 and found.exit_code == 3
    (line,) = (record for record in read_manifest(tmp_path / "ray") if record["status"] == "failed")
    assert line["seed"] == 13 and "3 workers were lost while they drew it" in line["error"]
    assert "warning: a worker was lost; the 4 images that it had in hand go to others" in capsys.readouterr().err
