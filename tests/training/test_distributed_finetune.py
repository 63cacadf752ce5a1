"""A fine-tuning of a small model on two processes: the very run of one, its data shared, its files the same."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ldm.training.checkpoints import reading, state
from ldm.training.distributed import processes
from ldm.training.distributed.alone import whole
from ldm.training.loop.step import prepare
from ldm.training.stages.finetune import Finetune
from tests.checkpoint.test_families_folders import build
from tests.training.conftest import threads
from tests.training.finetune_cases import QUICK, SIZE, apart, last_tensors, pictures, run, settings_of, stage_of
from tests.training.processes import free_port, together
from tests.training.test_distributed import CPU, SGD

# Of ten pictures of two shapes: batches of 3 and 2, so 2 + 1 and 1 + 1 rows.
EPOCH = 4
WORDS = {**SGD, "batch_size": 3, "steps": 3}
KINDS = {
    "full": {"train": "full"},
    "lora": {},
    "texts": {"train": "full", "text_encoder": True, "gradient_checkpointing": True},
    "dora": {"train": "dora", "text_encoder": True},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "pictures", 10, ((SIZE, SIZE), (44, 28)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "1.5"
    build("1.5").save_pretrained(folder)
    return folder


def write_gradients(out, path):
    """Of a step of a whole epoch, with the ids of the pictures that each process took."""
    settings = settings_of(out)
    with processes() as group, threads(1):
        stage = stage_of(out)
        now = prepare(stage, settings, CPU, group)
        batches, ids = stage.batches(0), []
        for micro in range(EPOCH):
            with now.parallel.micro(last=micro == EPOCH - 1):
                batch = next(batches)
                now.parallel.loss(stage, batch, 0, micro).backward()
            ids += batch.ids
        own = state.trainable(now.module).items()
        found = {name: whole(p.grad).clone() for name, p in own if p.grad is not None}
        everyones = group.gathered(ids)
        if group.first:
            save_file(found, path)
            path.with_suffix(".txt").write_text("\n".join(sorted(everyones)))


@pytest.mark.parametrize(("kind", "sharded"), [("full", False), ("lora", True), ("texts", True), ("dora", False)])
def test_gradients_and_pictures_are_those_of_one_process(kind, sharded, data, model, tmp_path):
    out = tmp_path / "run"
    run(data, out, model, **{**WORDS, **KINDS[kind], "steps": 1, "accumulation": EPOCH})
    write_gradients(out, tmp_path / "one")
    assert together(2, lambda rank: write_gradients(out, tmp_path / "two"), sharded) == [0, 0]
    assert apart(load_file(tmp_path / "two"), load_file(tmp_path / "one")) < 1e-5
    pictures_of = [(tmp_path / name).with_suffix(".txt").read_text().split() for name in ("one", "two")]
    assert pictures_of[0] == pictures_of[1] == sorted(f"{i}.png" for i in range(10))


def files_of(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if "cache" not in path.parts)


@pytest.mark.parametrize(("kind", "sharded"), [("full", True), ("lora", False)])
def test_a_run_leaves_the_files_of_one_process(kind, sharded, data, model, tmp_path, capfd):
    words = {**WORDS, **KINDS[kind], "samples": 1, "sample_steps": 2, "prior": str(data)}
    words |= {"held_out": 0.2, "batch_size": 2}
    run(data, tmp_path / "run", model, **words)
    os.rename(tmp_path / "run", tmp_path / "one")
    said = capfd.readouterr().err
    assert together(2, lambda rank: run(data, tmp_path / "run", model, **words) and 0, sharded) == [0, 0]
    assert files_of(tmp_path / "run") == files_of(tmp_path / "one")
    assert apart(last_tensors(tmp_path / "run"), last_tensors(tmp_path / "one")) < 1e-5
    told = capfd.readouterr().err
    assert re.sub(r"[\d.e-]+", "#", told) == re.sub(r"[\d.e-]+", "#", said)  # but for the numbers, and said once
    name = "pytorch_lora_weights.safetensors" if kind == "lora" else "model/unet/diffusion_pytorch_model.safetensors"
    made, expected = (load_file(tmp_path / out / name) for out in ("run", "one"))
    assert apart({k: v.float() for k, v in made.items()}, {k: v.float() for k, v in expected.items()}) < 1e-2


def test_pictures_that_are_lost_on_one_are_left_out_by_all(data, model, tmp_path, monkeypatch, capfd):
    """With cache=off pictures are read as they are needed; here some are gone by then."""
    own, batches = tmp_path / "pictures", Finetune.batches
    words = {**WORDS, "cache": "off", "max_bad": 0.5, "steps": 4}

    def lose(stage, first_step):
        for name in ("1.png", "2.png", "4.png"):
            (own / name).unlink(missing_ok=True)
        return batches(stage, first_step)

    monkeypatch.setattr(Finetune, "batches", lose)
    shutil.copytree(data, own)
    run(own, tmp_path / "one", model, **words)
    shutil.copytree(data, own, dirs_exist_ok=True)
    capfd.readouterr()
    assert together(2, lambda rank: run(own, tmp_path / "two", model, **words) and 0) == [0, 0]
    assert apart(last_tensors(tmp_path / "two"), last_tensors(tmp_path / "one")) < 1e-5
    said = capfd.readouterr().err
    assert [said.count(f"{i}.png: cannot be opened") for i in (1, 2, 4)] == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_torchrun_runs_the_command(sharded, data, model, tmp_path):
    out = tmp_path / "run"
    words = [f"{name}={value}" for name, value in QUICK.items() if name not in ("resolution", "held_out", "targets")]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={free_port()}", "-m", "ldm"]
    command = [sys.executable, *launch, "finetune", str(data), "-o", str(out), "--model", str(model), "--offline"]
    command += ["--resolution", "32", "--held-out", "0", "--targets", "attention", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"ACCELERATE_USE_FSDP": "true"} if sharded else {})}
    where = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out) and done.stderr.count("10 found: 10 used") == 1
    assert reading.read_about(state.checkpoints(out)[-1])["environment"]["processes"] == 2
    alone = tmp_path / "alone"
    run(data, alone, model)
    assert apart(last_tensors(out), last_tensors(alone)) < 1e-4
