"""Windows, groups and the size of batches, without a network."""

from types import SimpleNamespace

import pytest
import torch

from ldm.device import free_memory
from ldm.render.jobs import batches
from ldm.render.jobs.batches import Group, batch_size, groups, windows
from ldm.render.jobs.jobs import Job


def job(index, model="a", text="a cat", lora=None, guidance_scale=4.0, **shared):
    own = {"prompt": text, "negative_prompt": "", "seed": index, "guidance_scale": guidance_scale, "model": model}
    return Job(index, f"{index:032x}", "here", str(index), {**own, **shared, **({"lora": lora} if lora else {})})


def test_windows_are_bounded_by_jobs_and_by_text(monkeypatch):
    monkeypatch.setattr(batches, "WINDOW", 4)
    monkeypatch.setattr(batches, "WINDOW_TEXT", 100)
    jobs = [job(i) for i in range(10)] + [job(i, text="x" * 95) for i in range(10, 13)]
    found = list(windows(jobs))
    assert [[one.index for one in window] for window in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10], [11, 12]]
    assert list(windows([])) == []


def test_groups_keep_models_then_loras_together_and_begin_with_what_is_loaded():
    lora = [["x.safetensors", 0.5]]
    jobs = [job(0), job(1, "b"), job(2, lora=lora), job(3, "b", steps=9), job(4), job(5, steps=9), job(6, lora=lora)]
    found = groups(jobs)
    assert [[one.index for one in of_it] for _, of_it in found] == [[0, 4], [5], [2, 6], [1], [3]]
    last = groups([job(7, "b")])[0][0]
    assert [[one.index for one in of_it] for _, of_it in groups(jobs, last)] == [[1], [3], [0, 4], [5], [2, 6]]


def test_what_a_batch_may_mix():
    plain = Group.of(job(0).settings)
    assert (
        Group.of(
            job(
                1,
                text="a dog",
                guidance_scale=9.0,
            ).settings
        )
        == plain
    )
    others = [job(2, guidance_scale=1.0), job(3, "b"), job(4, lora=[["x", 1.0]]), job(5, width=64)]
    assert len({plain, *(Group.of(one.settings) for one in others)}) == 5


@pytest.mark.parametrize(("gigabytes", "expected"), [(0.01, 1), (1.0, 1), (4.0, 5), (400.0, 8)])
def test_less_memory_smaller_batches(monkeypatch, gigabytes, expected):
    monkeypatch.setattr(batches, "free_memory", lambda device: gigabytes * 1e9)
    model = SimpleNamespace(unet=SimpleNamespace(block_out_channels=(320, 640)), factor=8)
    cpu, size = torch.device("cpu"), SimpleNamespace(height=512, width=512)
    found = batch_size(model, size, cpu, torch.float32)
    assert found == expected
    assert batch_size(model, size, cpu, torch.bfloat16) >= found
    assert batch_size(model, size, cpu, torch.float32, coming=int(gigabytes * 1e9)) == 1  # offloaded weights
    assert batch_size(model, SimpleNamespace(height=1024, width=512), cpu, torch.float32) <= found


def test_the_machine_says_how_much_is_free():
    assert 1e6 < free_memory(torch.device("cpu")) < 1e14
