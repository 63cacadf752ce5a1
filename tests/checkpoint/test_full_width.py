"""A full-width SD 1.5 of random weights, and readers of older days: pytest -m slow tests/checkpoint/test_full_width.py

The quick tests do the same to a small model; the slow ones need 5 GB of disk, 6 GB of memory and some minutes.
"""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

import ldm
from ldm.bench.networks import filled
from ldm.checkpoint import save_model
from ldm.checkpoint.families import SD1
from ldm.checkpoint.safety import silent
from ldm.checkpoint.single.names import originals, parts_of
from ldm.checkpoint.tensors import Source, write_tensors
from ldm.nn.unet import UNet
from ldm.nn.weights import on_meta
from tests.checkpoint.test_families import shapes
from tests.conftest import build_tiny_model

SIZE = """
import json, sys, threading
looked = [0]  # bytes that looking itself has read
def look(name):
    text = open(f"/proc/self/{name}").read()
    looked[0] += len(text)
    return text
def memory(name):
    return next(int(line.split()[1]) * 1024 for line in look("status").splitlines() if line.startswith(name))
def read():
    return int(look("io").split()[1]) - looked[0]
"""
LOAD = (
    SIZE
    + """
import torch, diffusers, transformers
from ldm.checkpoint import load_model
from ldm.nn.unet import UNet
small, dtype, *paths = sys.argv[1:]
load_model(small, "cpu", dtype, cache=False)  # imports, tables and pools of threads
import gc; gc.collect()
found, kept = [], []  # models are kept, so that none is loaded into memory that another one has freed
for path in paths:
    before, start, peak, stop = memory("VmRSS"), read(), [0], threading.Event()
    def watch():
        while not stop.wait(0.005):
            peak[0] = max(peak[0], memory("VmRSS"))
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    model = load_model(path, "cpu", dtype, cache=False)
    kept.append(model)
    stop.set()
    thread.join()
    modules = (model.unet, model.vae.module, *model.text.modules)
    size = sum(p.numel() * p.element_size() for m in modules for p in m.parameters())
    found.append({"peak": max(peak[0], memory("VmRSS")) - before, "read": read() - start, "size": size})
print(json.dumps(found))
"""
)
DRAW = (
    SIZE
    + """
from ldm import Pipeline
pipe = Pipeline("a photo of a cat", sys.argv[1], device="cpu", dtype="bf16")
images = pipe.generate(seed=1, num_inference_steps=2, height=512, width=512)
print(json.dumps({"peak": memory("VmHWM"), "size": images[0].size}))
"""
)


def child(code, *args):
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny_folder):
    return ldm.convert(tiny_folder, tmp_path_factory.mktemp("small") / "m.safetensors")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """SD 1.5 in fp16 as others publish it: original names, no settings of ours. Weights as a fresh network has them."""
    path, generator = tmp_path_factory.mktemp("full") / "sd15.safetensors", torch.Generator().manual_seed(0)
    parts, sources = parts_of(SD1.configs("epsilon")), {}

    def fresh(key, shape):
        if len(shape) == 1:
            return torch.full(shape, float(key.endswith("weight")))
        return torch.randn(shape, generator=generator) * (shape[1:].numel()) ** -0.5

    for part, names in shapes(SD1).items():
        for key, place in originals(parts[part], names):
            first = names[place.names[0]]
            shape = torch.Size((*first, 1, 1) if place.change == "flat" else first)
            sources[key] = Source(torch.float16, shape, lambda k=key, s=shape: fresh(k, s).half())
    write_tensors(path, sources, {"format": "pt"}, silent)
    return path


@pytest.fixture(scope="module")
def middling(tmp_path_factory):
    """A folder in shards and a single file of a model with 56 million random weights, in fp32."""
    model, root = build_tiny_model(), tmp_path_factory.mktemp("middling")
    shape = {"block_out_channels": (208, 416), "transformer_layers": (1, 2), "mid_transformer_layers": 2}
    config = dataclasses.replace(model.unet.config, **shape)
    model.unet = filled(on_meta(lambda: UNet(config)), "fp32", "cpu")
    folder = save_model(model, root / "folder", dtype="fp32", max_shard_mb=100)
    return folder, ldm.convert(folder, root / "file.safetensors")


def test_loading_reads_each_byte_once_and_never_holds_weights_twice(middling, small):
    of_folder, of_file = child(LOAD, small, "fp32", *middling)
    size = middling[1].stat().st_size
    assert of_folder["size"] > 200e6 and size <= of_file["read"] < 1.01 * size  # the tokenizer's files too
    assert of_folder["read"] < 1.01 * size
    assert max(one["peak"] / one["size"] for one in (of_folder, of_file)) <= 1.5  # 1.0 to 1.4, by the allocator


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_loading_at_full_width_reads_once_and_peaks_at_the_weights(full, small, dtype):
    (found,) = child(LOAD, small, dtype, full)
    print(found)
    assert full.stat().st_size <= found["read"] < 1.01 * full.stat().st_size
    assert found["peak"] <= 1.1 * found["size"]


@pytest.mark.slow
def test_a_full_width_image_of_512_pixels_fits_into_6_gb(full):
    found = child(DRAW, full)
    print(found)
    assert found["size"] == [512, 512] and found["peak"] < 6e9


OLD = """
import sys, torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
folder, out, kind = sys.argv[1:]
pipe = {"xl": StableDiffusionXLPipeline}.get(kind, StableDiffusionPipeline).from_pretrained(folder)
kwargs = {"num_inference_steps": 3, "guidance_scale": 7.5, "output_type": "np", "height": 64, "width": 64}
image = pipe("a red cat", negative_prompt="blue", generator=torch.Generator().manual_seed(5), **kwargs).images
torch.save(torch.from_numpy(image), out)
print('"done"')
"""


@pytest.mark.slow
@pytest.mark.skipif("LDM_OLD_PYTHON" not in os.environ, reason="LDM_OLD_PYTHON names no python with transformers 4")
@pytest.mark.parametrize("family", ["1.5", "2.1-v", "xl"])
def test_transformers_4_and_the_diffusers_of_its_time_read_our_folders(family, tmp_path):
    """Set LDM_OLD_PYTHON to the python of an environment with `transformers<5 diffusers<0.36`."""
    from tests.checkpoint.test_families_folders import build

    build(family).save_pretrained(tmp_path / "theirs")
    folder = ldm.convert(ldm.convert(tmp_path / "theirs", tmp_path / "m.safetensors"), tmp_path / "ours")
    images = {}
    for name, python in (("old", os.environ["LDM_OLD_PYTHON"]), ("new", sys.executable)):
        out = tmp_path / f"{name}.pt"
        done = subprocess.run([python, "-c", OLD, folder, out, family], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "not used when initializing" not in done.stderr and "newly initialized" not in done.stderr
        images[name] = torch.load(out, weights_only=True)
    assert (images["old"] - images["new"]).abs().max() <= 1 / 255 and images["new"].std() > 0.1
