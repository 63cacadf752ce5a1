"""A distillation, and a ControlNet of drawn scenes, on two processes: the very run of one."""

import json

import pytest

import ldm
from ldm.training import train
from ldm.training.data import scenes, trajectories
from ldm.training.settings import stages
from tests.training.conftest import threads
from tests.training.finetune_cases import apart, last_tensors, pictures
from tests.training.processes import together

# Batches of 3, so 2 + 1 rows.
WORDS = ["steps=3", "batch_size=3", "optimizer=sgd", "learning_rate=0.05", "weight_decay=0", "lr_schedule=constant"]
WORDS += ["warmup=0", "ema=0.5", "clip=1e9", "device=cpu", "precision=fp32", "save_every=3", "validate_every=3"]
WORDS += ["log_every=1", "workers=0", "samples=0", "seed=3"]
DISTILL = ["lora_rank=2", "guidance_scale=3", "data.held_out=0.3", "latent_pool=16", "renew=2", "teacher_steps=4"]
SCENES = ["compile=false", "samples=1", "latent_pool=16", "renew=2", "validation=2", "sample_steps=2"]
SCENES += ["data.resolution=32", "control_channels=[32,32]", "control_embedding=[4,4,8,8]", "timesteps=uniform"]
KINDS = {
    "consistency": ["intervals=[2,4]"],
    "trajectory": ["segments=2", "samples=1"],
    "guidance": ["train=full", "guidance_range=[1,5]", "guidance_scale=null", "learning_rate=0.01"],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Ways and scenes are replaced eight at a time."""
    for module in (trajectories, scenes, stages):
        monkeypatch.setattr(module, "PIECE", 8)


def assert_same_run(one, two):
    for part in ("model.", "ema."):
        found, wanted = last_tensors(two, part), last_tensors(one, part)
        assert apart(found, wanted) < 1e-5
    files = [sorted(str(p.relative_to(out)) for p in out.rglob("*") if "cache" not in p.parts) for out in (one, two)]
    assert files[0] == files[1]
    for name in ("loss.jsonl", "scores.jsonl"):
        rows = [[json.loads(line) for line in (out / name).read_text().splitlines()] for out in (one, two)]
        for row, other in zip(*rows, strict=True):
            assert {name: pytest.approx(value, rel=1e-3) for name, value in row.items()} == other


@pytest.mark.parametrize(
    "method", [one if one == "trajectory" else pytest.param(one, marks=pytest.mark.slow) for one in KINDS]
)
def test_a_distillation_is_that_of_one_process(method, images, tiny_folder, tmp_path):
    words = [*WORDS, *DISTILL, f"data={images}", f"method={method}", *KINDS[method]]

    def work(rank=0):
        with threads(1):
            ldm.distill(tiny_folder, tmp_path / "run", overrides=words)
        return 0

    work()
    (tmp_path / "run").rename(tmp_path / "one")
    assert together(2, work) == [0, 0]
    assert_same_run(tmp_path / "one", tmp_path / "run")


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["ddp", "fsdp"])
def test_a_controlnet_of_scenes_is_that_of_one_process(sharded, tiny_folder, tmp_path):
    words = [*WORDS, *SCENES, f"model={tiny_folder}"]

    def work(out):
        with threads(1):
            train("emoji/edges", tmp_path / out, words)
        return 0

    work("run")
    (tmp_path / "run").rename(tmp_path / "one")
    assert together(2, lambda rank: work("run"), sharded) == [0, 0]
    assert_same_run(tmp_path / "one", tmp_path / "run")
