"""Few-step LoRAs at work: their settings where nothing is given, and the user's where something is."""

import dataclasses
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm import Pipeline
from ldm.checkpoint import save_model
from ldm.checkpoint.lora import target_at
from ldm.cli import main
from ldm.images import read_metadata
from ldm.nn.unet import UNet
from ldm.render.jobs.resolve import Resolver
from tests.conftest import build_tiny_model

ENDS = ("conv1", "time_emb_proj", "to_q", "to_out.0", "ff.net.2")


@pytest.fixture
def lora(tiny_folder, tmp_path):
    """A function (name, header) -> a LoRA of the tiny model that changes nothing, of the layers of distilled ones."""
    shapes = {name: s for name, s in target_at(tiny_folder).shapes["unet"].items() if name.endswith(ENDS)}

    def make(name, metadata=None):
        tensors = {}
        for layer, (out, inputs, *kernel) in shapes.items():
            tensors[f"unet.{layer}.lora_A.weight"] = torch.ones(2, inputs, *kernel)
            tensors[f"unet.{layer}.lora_B.weight"] = torch.zeros(out, 2, *[1] * len(kernel))
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata)
        return tmp_path / f"{name}.safetensors"

    return make


@pytest.fixture(scope="module")
def lcm_folder(tmp_path_factory):
    """A tiny LCM, whose U-Net is told the guidance's scale."""
    folder, model = tmp_path_factory.mktemp("lcm") / "tiny", build_tiny_model()
    config = dataclasses.replace(model.unet.config, time_cond_proj_dim=12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.unet = UNet(config).eval()
    model.schedule = dataclasses.replace(model.schedule, prediction_type="epsilon", rescale_betas_zero_snr=False)
    save_model(model, folder, dtype="fp32")
    (folder / "manifest.json").unlink()
    path = folder / "scheduler/scheduler_config.json"
    settings = {k: v for k, v in json.loads(path.read_text()).items() if k.startswith(("beta_", "prediction", "num_"))}
    path.write_text(json.dumps({**settings, "_class_name": "LCMScheduler", "set_alpha_to_one": True}))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "LatentConsistencyModelPipeline", "scheduler": ["diffusers", "LCMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps({**index, "requires_safety_checker": False}))
    return folder


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_an_lcm_that_is_told_its_scale_draws_as_diffusers_does(lcm_folder, scale):
    theirs = diffusers.LatentConsistencyModelPipeline.from_pretrained(lcm_folder, local_files_only=True)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32}
    known = {"guidance_scale": scale, "num_inference_steps": 1, "latents": latents, **size}
    expected = theirs(["a cat", "a red dog"], output_type="np", **known).images
    ours = Pipeline(["a cat", "a red dog"], lcm_folder).generate(**known)
    drawn = np.stack([np.asarray(image) / 255 for image in ours])
    assert np.abs(drawn - expected).max() < 0.003  # half a step of 8 bits, and a little


def test_an_lcm_is_told_its_cards_scale_and_another_image_by_it(lcm_folder, capsys):
    pipe = Pipeline("a cat", lcm_folder)
    first = pipe.generate(seed=1)
    (record,) = first.metadata
    taken = record["sampler"], record["num_inference_steps"], record["guidance_scale"], record["few_steps"]
    assert taken == ("lcm", 4, 8.0, "LCM") and "burn" not in capsys.readouterr().err
    assert pixels(pipe.generate(seed=1, guidance_scale=2.0)) != pixels(first)
    together = pipe.generate(seed=[1, 1], guidance_scale=[2.0, 8.0])
    assert pixels(together)[1:] == pixels(first)  # each image has its own scale


def pixels(images):
    return [np.asarray(image).tolist() for image in images]


def test_its_settings_are_taken_told_and_kept(lora, tiny_folder, capsys):
    images = Pipeline("a cat", tiny_folder, lora=lora("lcm_lora")).generate(seed=3)
    (record,) = images.metadata
    taken = {name: record[name] for name in ("sampler", "spacing", "num_inference_steps", "guidance_scale")}
    assert taken == {"sampler": "lcm", "spacing": None, "num_inference_steps": 4, "guidance_scale": 1.0}
    assert record["few_steps"] == "LCM"
    assert "lcm_lora.safetensors: LCM (by its layers and name); where nothing else is given: lcm, 4 steps, no gui" in (
        capsys.readouterr().err
    )
    plain = Pipeline("a cat", tiny_folder).generate(seed=3, sampler="lcm", steps=4, guidance_scale=1)
    assert pixels(images) == pixels(plain) and "few_steps" not in plain.metadata[0]


def test_a_saved_model_keeps_the_settings_of_what_is_merged_into_it(lora, tiny_folder, lcm_folder, tmp_path):
    settings = {"sampler": "tcd", "num_inference_steps": 2, "eta": 0.5, "guidance_scale": 1.0}
    pipe = Pipeline("a cat", tiny_folder, lora=lora("x", {"ldm.sampling": json.dumps(settings)}))
    own = shutil.copytree(tiny_folder, tmp_path / "own")
    (own / "README.md").write_text("---\nlicense: mit\nldm:\n  sampler: euler\n  spacing: karras\n---\nA model.\n")
    for folder, source in ((tmp_path / "one", pipe), (tmp_path / "two", Pipeline("a cat", own, lora=lora("lcm_lora")))):
        source.save(folder)
        (expected,), (found,) = (p.generate(seed=1).metadata for p in (source, Pipeline("a cat", folder)))
        assert all(found[name] == expected[name] for name in ("sampler", "spacing", "num_inference_steps", "eta"))
    text = (tmp_path / "two/README.md").read_text()
    assert text.endswith("---\nA model.\n") and "license: mit" in text and text.count("ldm:") == 1
    Pipeline("a cat", lcm_folder).save(tmp_path / "three")
    (record,) = Pipeline("a cat", tmp_path / "three").generate(seed=1).metadata
    assert (record["sampler"], record["num_inference_steps"], record["guidance_scale"]) == ("lcm", 4, 8.0)
    plain = Pipeline("a cat", tiny_folder).save(tmp_path / "plain")
    assert not (plain / "README.md").exists() or "tcd" not in (plain / "README.md").read_text()


def test_what_the_user_gives_wins_with_a_warning_where_it_cannot_work(lora, tiny_folder, capsys):
    pipe = Pipeline("a cat", tiny_folder, lora=lora("sdxl_lightning_2step"))
    (record,) = pipe.generate(seed=3, guidance_scale=7, sampler="ddim", steps=2).metadata
    assert (record["guidance_scale"], record["sampler"], record["spacing"]) == (7, "ddim", "trailing")
    err = capsys.readouterr().err
    assert "Lightning was made without guidance: with 7 colours burn" in err and "may draw rubbish" not in err


def test_our_key_and_its_eta(lora, tiny_folder):
    settings = {"kind": "ours", "sampler": "tcd", "num_inference_steps": 2, "eta": 0.5}
    pipe = Pipeline("a cat", tiny_folder, lora=lora("x", {"ldm.sampling": json.dumps(settings)}))
    (record,) = pipe.generate(seed=3).metadata
    taken = record["sampler"], record["num_inference_steps"], record["eta"], record["few_steps"]
    assert taken == ("tcd", 2, 0.5, "ours")
    assert pipe.generate(seed=3, sampler="euler", steps=1).metadata[0]["eta"] is None


def test_prompts_that_do_not_share_it_keep_the_models_settings(lora, tiny_folder, capsys):
    folder = lora("lcm_lora").parent
    prompts = ["a cat <lora:lcm_lora>", "a dog"]
    images = Pipeline(prompts, tiny_folder, lora_dir=folder).generate(seed=3, steps=1)
    assert images.metadata[0]["sampler"] != "lcm" and "draw them apart" in capsys.readouterr().err


def test_prompt_lines_resolve_to_the_same_and_to_themselves(lora, tiny_folder, capsys):
    line = {"prompt": "a cat", "seed": 3, "model": str(tiny_folder), "lora": [[str(lora("TCD-LoRA")), 1.0]]}
    resolve = Resolver()
    settings, _ = resolve(line)
    assert (settings["sampler"], settings["num_inference_steps"], settings["guidance_scale"]) == ("tcd", 4, 1.0)
    assert resolve(settings)[0] == settings and resolve.drawable(settings)[1].sampler == "tcd"
    assert resolve({**line, "lora": None})[0]["sampler"] != "tcd"
    assert "burn" not in capsys.readouterr().err
    assert resolve({**line, "guidance_scale": 7.0})[0]["guidance_scale"] == 7.0
    assert "TCD was made for guidance up to 2: with 7 colours burn" in capsys.readouterr().err


def test_render_and_replay_draw_the_same_image(lora, tiny_folder, tmp_path, capsys):
    file, out = lora("sdxl_lightning_2step"), tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("a cat\n")
    common = ["--model", str(tiny_folder), "--lora", str(file), "-q"]
    assert main(["render", str(tmp_path / "prompts.txt"), "-o", str(out), "--seed", "3", *common]) == 0
    (png,) = out.glob("*.png")
    assert main(["generate", "--from", str(png), "--model", str(tiny_folder), "-o", str(tmp_path / "again.png")]) == 0
    first, again = (read_metadata(path).ldm for path in (png, tmp_path / "again.png"))
    assert first["few_steps"] == again["few_steps"] == "Lightning"
    assert (again["sampler"], again["spacing"], again["num_inference_steps"]) == ("euler", "trailing", 2)
    assert np.array_equal(np.asarray(Image.open(png)), np.asarray(Image.open(tmp_path / "again.png")))
