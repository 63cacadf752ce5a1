"""The queue: its order, its limits, a server that is killed or stopped, many clients at once."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from ldm.web import limits

pytest.importorskip("uvicorn")
requests = pytest.importorskip("requests")
jobs = pytest.importorskip("ldm.web.jobs")

PROGRAM = "import sys; from ldm.cli import main; sys.exit(main())"
LONG_STEPS = """
import time
from ldm.nn.unet import UNet
forward = UNet.forward
UNet.forward = lambda *args, **more: (print("step", flush=True), time.sleep(60), forward(*args, **more))[-1]
"""


@pytest.fixture
def start():
    """A function that runs `ldm web` as a process of its own: (process, address). None outlives the test."""
    processes = []

    def start(folder, model, before=""):
        words = ["web", "-o", str(folder), "--model", str(model), "--port", "0", "--no-open"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", before + PROGRAM, *words]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env))
        line = processes[-1].stdout.readline()
        assert line.startswith("Listening on http://127.0.0.1:"), line
        return processes[-1], line.split()[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait(20)


def ask(url, method="GET", **options):
    return requests.request(method, url, timeout=60, **options).json()


def until(condition, seconds=240):  # a busy machine needs a minute to import what draws
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


def test_a_killed_server_loses_no_image_and_goes_on_and_sigterm_ends_it_in_time(start, tiny_folder, tmp_path):
    folder = tmp_path / "gallery"
    process, url = start(folder, tiny_folder)
    long = {"prompt": "a cat", "seed": 3, "num_inference_steps": 20, "num_images": 8}
    first = ask(f"{url}/api/jobs", "POST", json=long)["id"]
    second = ask(f"{url}/api/jobs", "POST", json={"prompt": "a dog", "num_inference_steps": 2, "seed": 1})["id"]
    until(lambda: ask(f"{url}/api/jobs/{first}")["images"])
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    kept = {path.name: path.read_bytes() for path in folder.glob("[!.]*.png")}  # a write that was killed leaves .tmp-…
    assert kept
    process, url = start(folder, tiny_folder)
    until(lambda: ask(f"{url}/api/jobs/{second}")["state"] == "done")
    assert ask(f"{url}/api/jobs/{first}")["state"] == "done"
    assert len(ask(f"{url}/api/jobs/{first}")["images"]) == 8
    listed = ask(f"{url}/api/images?limit=200")["images"]
    assert len(listed) == 9 == len(list(folder.glob("*.png")))
    assert all((folder / name).read_bytes() == data for name, data in kept.items())
    assert sorted(one["metadata"]["seed"] for one in listed if one["job"] == first) == list(range(3, 11))
    assert ask(f"{url}/api/jobs/0123456789abcdef") == {"error": "unknown", "detail": "unknown", "field": None}
    ask(f"{url}/api/jobs", "POST", json={**long, "num_inference_steps": 200})
    began = time.time()
    with requests.get(f"{url}/api/events", stream=True, timeout=30):
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
    assert time.time() - began < 20


@pytest.mark.parametrize("last", [1, pytest.param(None, marks=pytest.mark.slow)])  # None: as it is shipped
def test_sigterm_ends_a_step_that_takes_longer_than_it_waits_for(start, tiny_folder, tmp_path, last):
    shorter = "" if last is None else f"from ldm.web import server\nserver.LAST = {last}\n"
    process, url = start(tmp_path / "gallery", tiny_folder, LONG_STEPS + shorter)
    with ThreadPoolExecutor() as pool:  # while the model is still being loaded
        asked = [pool.submit(ask, f"{url}/api/prompt", "POST", json={"prompt": "a cat"}) for _ in range(6)]
    assert [one.result()["prompt"]["tokens"] for one in asked] == [2] * 6
    job = ask(f"{url}/api/jobs", "POST", json={"prompt": "a cat", "num_inference_steps": 2})["id"]
    assert process.stdout.readline() == "step\n"  # now it is inside
    began = time.time()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert (last or 12) <= time.time() - began < 20
    with sqlite3.connect(tmp_path / "gallery" / ".web" / "ledger.sqlite3") as ledger:
        assert ledger.execute("select state from jobs where id = ?", (job,)).fetchone()[0] in ("queued", "running")
    if last is None:
        process, url = start(tmp_path / "gallery", tiny_folder)
        until(lambda: ask(f"{url}/api/jobs/{job}")["state"] == "done")  # the job was not lost
        assert len(ask(f"{url}/api/jobs/{job}")["images"]) == 1


def waiting(client, created):
    return SimpleNamespace(client=client, created=created)


def test_clients_take_turns_and_each_in_its_own_order():
    listed = [waiting("a", i) for i in range(4)] + [waiting("b", 10), waiting("b", 11), waiting("c", 12)]
    served, order, now = {}, [], 100.0
    while listed:
        job = jobs._next(listed, served)
        listed.remove(job)
        served[job.client] = now = now + 1
        order.append((job.client, job.created))
    assert order == [("a", 0), ("b", 10), ("c", 12), ("a", 1), ("b", 11), ("a", 2), ("a", 3)]


def test_the_queue_is_bounded(client, monkeypatch):
    monkeypatch.setattr(limits, "MAX_QUEUED", 3)
    first = client.post("/api/jobs", {"prompt": "a cat", "num_inference_steps": 200, "num_images": 64}).json()
    until(lambda: client.get(f"/api/jobs/{first['id']}").json()["state"] == "running")
    answers = [client.post("/api/jobs", {"prompt": "a dog"}) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [201] * 3 + [429]
    call = client.post("/sdapi/v1/txt2img", {"prompt": "a dog"})
    assert call.status_code == 429 and "3 jobs are waiting" in call.json()["detail"]
    assert client.delete("/api/jobs").json() == {"stopped": 4}
    client.wait(first["id"])


def test_a_full_disk_and_a_full_gallery_are_507(client, monkeypatch):
    monkeypatch.setattr(client.server.context.store, "max_bytes", -1)
    answer = client.post("/api/jobs", {"prompt": "a cat"})
    assert answer.status_code == 507 and "--max-gb" in answer.json()["error"]
    monkeypatch.undo()
    monkeypatch.setattr("ldm.web.store.FREE_BYTES", 1 << 60)
    answer = client.post("/api/jobs", {"prompt": "a cat"})
    assert answer.status_code == 507 and "/" not in answer.json()["error"]


def test_a_client_that_goes_away_ends_its_call(client):
    sent = {"prompt": "a cat", "steps": 200, "batch_size": 64}
    with pytest.raises(requests.ReadTimeout):
        requests.post(f"{client.url}/sdapi/v1/txt2img", json=sent, timeout=1)
    until(lambda: client.server.context.queue.current is None, 20)
    assert client.draw()["state"] == "done"


def test_a_job_that_takes_too_long_ends(client, monkeypatch):
    monkeypatch.setattr(limits, "JOB_SECONDS", 0.2)
    job = client.draw(num_inference_steps=200, num_images=64)
    assert job["state"] == "failed" and "seconds" in job["error"]


def load(client, clients, each, **fields):
    """[(client, number)] in the order of the answers; each client asks one thing after another."""
    answers, lock, faults = [], threading.Lock(), []

    def work(number):
        with requests.Session() as session:
            for k in range(each):
                sent = {"prompt": "a cat", "steps": 1, "cfg_scale": 1, "seed": 100 * number + k, **fields}
                answer = session.post(f"{client.url}/sdapi/v1/txt2img", json=sent, timeout=120)
                with lock:
                    if answer.status_code != 200 or len(answer.json()["images"]) != 1:
                        faults.append(answer.text[:200])
                    answers.append((number, k))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert not faults
    return answers


def assert_fair(answers, clients, each):
    assert len(set(answers)) == clients * each
    done = dict.fromkeys(range(clients), 0)
    for number, _ in answers:
        done[number] += 1
        ahead = max(done.values()) - min(done.values())
        assert ahead <= 4 or max(done.values()) == each, done


def test_four_clients_at_once_lose_nothing_and_take_turns(client):
    assert_fair(load(client, 4, 5), 4, 5)


def resident():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    pytest.skip("no /proc")


@pytest.mark.slow
def test_four_times_fifty_requests_and_memory_after_two_thousand(client):
    assert_fair(load(client, 4, 50), 4, 50)
    before = resident()
    for _ in range(9):
        load(client, 4, 50)
    assert resident() <= 1.03 * before, (before, resident())
