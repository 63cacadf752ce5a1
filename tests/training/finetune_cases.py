"""Captioned pictures and small models, and fine-tunings of them that take a second."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.checkpoint.lora import read_lora
from ldm.checkpoint.safety import verify_manifest
from ldm.config import build as build_settings
from ldm.training import finetune
from ldm.training.checkpoints import state
from ldm.training.data import read_training_images
from ldm.training.data.images import with_prior
from ldm.training.finetuning.command import read_arguments, resolve_settings
from ldm.training.settings import FinetuneSettings
from tests.training.conftest import threads

SIZE = 32  # pixels
# A run of three steps, with nothing of validation and grids, in which nothing is random but what is keyed.
QUICK = {"steps": 3, "batch_size": 4, "learning_rate": 0.05, "lora_rank": 2, "resolution": SIZE, "held_out": 0}
QUICK |= {"samples": 0, "device": "cpu", "precision": "fp32", "warmup": 0, "lr_schedule": "constant", "ema": 0.0}
QUICK |= {"validate_every": 100, "save_every": 100, "targets": "attention", "seed": 3}


def pictures(folder, count=8, sizes=((SIZE, SIZE),)):
    """`count` captioned pictures of noise, of these sizes in turn."""
    folder.mkdir(parents=True)
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(sizes[i % len(sizes)], Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {('red', 'blue')[i % 2]} {('cat', 'dog')[i // 2 % 2]}")
    return folder


def run(data, out, model, **words):
    """`ldm.finetune` with QUICK's settings and these."""
    words = {**QUICK, **words}
    if words.get("train") == "full":
        words = {name: value for name, value in words.items() if name not in ("lora_rank", "targets")}
    with threads(1):
        return finetune(data, out, model, **words)


def settings_of(out):
    return build_settings(FinetuneSettings, json.loads((out / "settings.json").read_text()))


def resolved(data, out, model, **options):
    """The settings and the images of a run that is asked for like this."""
    return resolve_settings(read_arguments(data, out, model, **options))


def stage_of(out):
    """The stage of a run as it was before its first step, its data encoded."""
    settings = settings_of(out)
    images = read_training_images(settings.data)
    images = with_prior(images, settings.prior) if settings.prior else images
    return import_module(f"ldm.training.stages.{settings.module}").open_stage(settings, out, images)


def last_tensors(out, part="model."):
    """What the last checkpoint holds under a prefix."""
    tensors = load_file(state.checkpoints(Path(out))[-1] / "state.safetensors")
    return {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)}


def apart(one, other):
    """The largest difference of two mappings of tensors, in parts of the largest number of the second."""
    assert one.keys() == other.keys()
    most = max(value.abs().max().item() for value in other.values())
    return max((one[name] - value).abs().max().item() for name, value in other.items()) / most


def assert_own_folders(out):
    """A LoRA's run with ema=0 and ema_lengths=[0.9] has the weights in its folder, the average in one beside them."""
    last = Path(out, "model-ema-0.9")
    assert verify_manifest(Path(out)) and verify_manifest(last)
    assert sorted(path.name for path in last.iterdir()) == sorted(
        ["pytorch_lora_weights.safetensors", f"{Path(out).name}.safetensors", "manifest.json", "README.md"]
    )
    for folder, part in ((out, "model."), (last, f"average.{0.9:.9f}/")):
        found, wanted = read_lora(folder).layers, last_tensors(out, part)
        assert len(found) == sum(name.endswith(".up") for name in wanted)
        for name, layer in found.items():
            trained = wanted[f"{name.removeprefix('unet.')}.up"]
            assert torch.allclose(layer.up.view(trained.shape).float(), trained, atol=1e-4) and trained.any()


def norm(values):
    return torch.cat([value.flatten() for value in values]).norm().item()


def plain_sgd(stage, parameters, rate, steps, loss_of, at_first=lambda batch, loss: None):
    """A plain loop over the stage's batches: `loss_of(batch, step)`; `at_first` sees the first gradients."""
    optimizer = torch.optim.SGD(parameters, lr=rate)
    with threads(1):
        for step in range(steps):
            batch = stage.data.batch(step)
            loss = loss_of(batch, step)
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                at_first(batch, loss)
            optimizer.step()
