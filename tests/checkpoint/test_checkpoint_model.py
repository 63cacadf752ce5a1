"""Models as diffusers folders: what is written, what diffusers makes of it, what loading gives back and refuses."""

import json
import logging
import shutil
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import Pipeline
from ldm.checkpoint import Model, check_model, clear_cache, load_model, save_model
from ldm.checkpoint.build import named_as
from ldm.checkpoint.safety import write_manifest
from ldm.errors import LdmError, ModelError


def states(model):
    return {
        f"{part}.{name}": tensor
        for part, module in (("unet", model.unet), ("vae", model.vae.module), ("text", model.text.model))
        for name, tensor in module.state_dict().items()
    }


def same_bits(one, other):
    one, other = states(one), states(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def edit(path, **changes):
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps(value))
    (path.parent / "manifest.json").unlink(missing_ok=True)
    (path.parent.parent / "manifest.json").unlink(missing_ok=True)


def our_image(model, prompt, latents, steps, scale):
    """DDIM under guidance, written with ldm.diffusion alone: (1, H, W, 3) in [0, 1]."""
    from ldm.diffusion.guidance import Guidance
    from ldm.diffusion.guidance.guided import guided_denoiser
    from ldm.diffusion.samplers import SAMPLERS

    schedule = model.schedule
    sigmas = schedule.sigmas(steps, "ddim")
    cond, uncond = model.text.encode([prompt]), model.text.encode([""])
    denoise = guided_denoiser(model.unet, cond, uncond, Guidance(scale=scale), schedule, sigmas)
    x = schedule.initial(latents, sigmas, "ddim")
    with torch.no_grad():
        latents = SAMPLERS["ddim"](denoise, x, sigmas)
        images = model.vae.decode(latents)
    return (images / 2 + 0.5).permute(0, 2, 3, 1).numpy()


def diffusers_pipeline(folder, caplog, **kwargs):
    """diffusers' pipeline from the folder, with every warning that it or transformers made on the way."""
    import diffusers
    import transformers

    loggers = [logging.getLogger("diffusers"), logging.getLogger("transformers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    try:
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **kwargs)
    finally:
        for logger in loggers:
            logger.removeHandler(caplog.handler)
    pipe.set_progress_bar_config(disable=True)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return pipe, [line for line in said if "torchvision" not in line]  # of image processors, once per process


def test_diffusers_loads_the_folder_without_a_warning_and_draws_the_same_image(saved, caplog, recwarn):
    pipe, warnings = diffusers_pipeline(saved, caplog, torch_dtype=torch.float32)
    assert warnings == [] and [w for w in map(str, recwarn) if "torch_dtype" not in w] == []
    model = load_model(saved, "cpu", "fp32")
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(7))
    theirs = pipe("a cat", latents=latents, num_inference_steps=6, guidance_scale=5.0, output_type="np").images
    ours = our_image(model, "a cat", latents, steps=6, scale=5.0)
    assert ours.shape == theirs.shape == (1, 32, 32, 3) and theirs.std() > 0.02
    assert np.abs(ours - theirs).max() <= 1 / 255
    other = pipe("dog", latents=latents, num_inference_steps=6, guidance_scale=5.0, output_type="np").images
    assert np.abs(other - theirs).max() > 2 / 255  # the words reach the image


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_diffusers_draws_the_same_images_at_zero_terminal_snr(name, saved, caplog):
    import diffusers

    pipe, _ = diffusers_pipeline(saved, caplog)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    prompts = ["a cat", "a dog", "dog", "cat a dog"]
    latents = torch.randn((4, 4, 16, 16), generator=torch.Generator().manual_seed(7))
    call = {"latents": latents, "num_inference_steps": 20, "guidance_scale": 4.0}
    theirs = pipe(prompts, output_type="np", **call).images
    sampler = {"DDIMScheduler": "ddim", "EulerDiscreteScheduler": "euler"}.get(name, "dpmpp_2m")
    ours = Pipeline(prompts, model=saved, dtype="fp32").generate(sampler=sampler, **call)
    ours = np.stack([np.asarray(image) for image in ours]).astype(float)
    assert theirs.std() > 0.02
    assert np.abs(ours - np.round(theirs * 255)).max() <= 1


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
def test_diffusers_loads_bf16_shards_and_keeps_their_bits(tiny, tmp_path, caplog):
    folder = save_model(tiny, tmp_path / "bf16", max_shard_mb=0.2)
    assert (folder / "unet/diffusion_pytorch_model.safetensors.index.json").is_file()
    pipe, warnings = diffusers_pipeline(folder, caplog, torch_dtype=torch.bfloat16)
    assert warnings == []
    model = load_model(folder, "cpu", "bf16")
    theirs = {**pipe.unet.state_dict(), **{f"vae.{n}": t for n, t in pipe.vae.state_dict().items()}}
    ours = {**model.unet.state_dict(), **{f"vae.{n}": t for n, t in model.vae.module.state_dict().items()}}
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[n], ours[n]) for n in ours)
    text = pipe.text_encoder.state_dict()
    assert all(
        torch.equal(named_as(text, [n])[n] if n not in text else text[n], t)
        for n, t in model.text.model.state_dict().items()
    )


def test_diffusers_draws_from_a_bf16_folder_without_being_told_a_dtype(tiny, tmp_path, caplog):
    """As README and forums say it: from_pretrained(folder) and nothing else."""
    folder = save_model(tiny, tmp_path / "bf16", "bf16")
    pipe, warnings = diffusers_pipeline(folder, caplog)
    assert warnings == []
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(7))
    theirs = pipe("a cat", latents=latents, num_inference_steps=4, guidance_scale=5.0, output_type="np").images
    ours = our_image(load_model(folder, "cpu", "fp32"), "a cat", latents, steps=4, scale=5.0)
    assert np.abs(ours - theirs).max() <= 1 / 255


def test_model_index_is_what_diffusers_writes(saved, tmp_path, caplog):
    pipe, _ = diffusers_pipeline(saved, caplog)
    pipe.save_pretrained(tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs/model_index.json").read_text())
    theirs.pop("_name_or_path")  # of the folder that it was loaded from
    assert json.loads((saved / "model_index.json").read_text()) == theirs
    for part in ("unet", "vae"):
        ours, they = (json.loads((root / part / "config.json").read_text()) for root in (saved, tmp_path / "theirs"))
        they.pop("_name_or_path", None)
        assert ours.items() <= they.items()
    assert same_bits(load_model(tmp_path / "theirs", "cpu", "fp32"), load_model(saved, "cpu", "fp32"))


def test_saved_and_loaded_is_the_same_model(tiny, saved):
    model = load_model(saved, "cpu", "fp32", cache=False)
    assert same_bits(model, tiny) and model.schedule == tiny.schedule and model.unet.config == tiny.unet.config
    assert not any(p.requires_grad or p.is_meta for p in model.unet.parameters())
    assert not any(b.is_meta for b in model.text.model.buffers())
    assert (model.name, model.path, model.info) == ("tiny", saved.resolve(), {"trained_on": "cpu"})
    assert torch.equal(model.text.encode(["a cat"]).states, tiny.text.encode(["a cat"]).states)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_saving_again_writes_the_same_bytes(tiny, tmp_path, dtype):
    first = save_model(tiny, tmp_path / "one", dtype)
    second = save_model(load_model(first, "cpu", dtype), tmp_path / "two", dtype)
    names = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    assert [n for n in names if (first / n).read_bytes() != (second / n).read_bytes()] == []
    assert load_model(first, "cpu", dtype).hash == load_model(second, "cpu", dtype).hash


def test_files_are_small_shards_with_the_old_text_keys(saved):
    weights = list(saved.rglob("*.safetensors"))
    assert len(weights) > 5 and max(path.stat().st_size for path in weights) <= 300_000
    index = json.loads((saved / "unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = {n: t for p in (saved / "unet").glob("*.safetensors") for n, t in load_file(p).items()}
    assert set(index["weight_map"]) == set(shards)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in shards.values())
    text = [n for p in (saved / "text_encoder").glob("*.safetensors") for n in load_file(p)]
    assert text and all(name.startswith("text_model.") for name in text)
    assert {p.name for p in (saved / "tokenizer").iterdir()} == {
        *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    }
    assert oct((saved / "model_index.json").stat().st_mode)[-3:] == oct(weights[0].stat().st_mode)[-3:] != "600"


@pytest.mark.parametrize("kept", [{"vocab.json", "merges.txt"}, {"tokenizer.json"}])
def test_either_form_of_the_tokenizer_is_enough(copied, tiny, kept):
    (copied / "manifest.json").unlink()
    for path in (copied / "tokenizer").iterdir():
        if path.name not in {*kept, "tokenizer_config.json"}:
            path.unlink()
    text = "a cat and a dog, doing 3 things"
    assert torch.equal(load_model(copied, "cpu", "fp32").text.tokenize([text]), tiny.text.tokenize([text]))


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_keys_with_and_without_prefix_load(copied, tiny, prefix):
    state = {n.removeprefix("text_model."): t for n, t in tiny.text.model.state_dict().items()}
    state["embeddings.position_ids"] = torch.arange(12)[None]  # in every old file
    for path in (copied / "text_encoder").glob("model*"):
        path.unlink()
    save_file({prefix + n: t for n, t in state.items()}, copied / "text_encoder/model.safetensors")
    (copied / "manifest.json").unlink()
    assert same_bits(load_model(copied, "cpu", "fp32"), tiny)


def test_old_attention_keys_of_a_vae_load(copied, tiny):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state, old = tiny.vae.module.state_dict(), {}
    for name, tensor in state.items():
        new = next((f"{name.replace(k, v)}" for k, v in names.items() if f".{k}." in name), name)
        old[new] = tensor.clone()
    assert old.keys() != state.keys()
    for path in (copied / "vae").glob("diffusion*"):
        path.unlink()
    save_file(old, copied / "vae/diffusion_pytorch_model.safetensors")
    (copied / "manifest.json").unlink()
    assert same_bits(load_model(copied, "cpu", "fp32"), tiny)


def test_dtype_is_converted(saved, tiny):
    model = load_model(saved, "cpu", "bf16")
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    assert all(torch.equal(t, states(tiny)[n].to(t.dtype)) for n, t in states(model).items())


def test_each_byte_of_the_weights_is_read_once(saved, monkeypatch):
    clear_cache()
    weights = sum(path.stat().st_size for path in saved.rglob("*.safetensors"))

    def read():
        return int(open("/proc/self/io").read().split()[1])

    load_model(saved, "cpu", "fp32", cache=False)  # imports and their files
    before = read()
    load_model(saved, "cpu", "fp32", cache=False)
    assert weights < read() - before < 1.5 * weights


def test_cache_is_by_path_identity_dtype_and_shared_between_threads(copied):
    clear_cache()
    found = []
    threads = [threading.Thread(target=lambda: found.append(load_model(copied, "cpu", "fp32"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = found[0]
    assert len(found) == 3 and all(model is first for model in found)
    assert load_model(str(copied) + "/", "cpu", "fp32") is first
    assert load_model(first) is first
    assert load_model(copied, "cpu", "bf16") is not first
    assert load_model(copied, "cpu", "fp32", cache=False) is not first
    edit(copied / "scheduler/scheduler_config.json", steps_offset=2)
    changed = load_model(copied, "cpu", "fp32")
    assert changed is not first and changed.schedule.steps_offset == 2 and changed.hash != first.hash


def test_hash_is_over_content_with_and_without_a_manifest(copied, saved):
    with_manifest = load_model(saved, "cpu", "fp32").hash
    (copied / "manifest.json").unlink()
    (copied / "README.md").write_text("another card")
    assert load_model(copied, "cpu", "fp32").hash == with_manifest and len(with_manifest) == 64
    state = load_file(next((copied / "vae").glob("*.safetensors")))
    save_file({n: t + 1 for n, t in state.items()}, next((copied / "vae").glob("*.safetensors")))
    assert load_model(copied, "cpu", "fp32").hash != with_manifest


def test_the_vae_can_come_from_elsewhere(saved, tiny, tmp_path):
    base = load_model(saved, "cpu", "fp32")
    for vae in (saved, saved / "vae", str(saved / "vae")):
        model = load_model(saved, "cpu", "fp32", vae=vae)
        assert same_bits(model, base) and model.vae is not base.vae
    own = load_model(saved, "cpu", "fp32", vae=tiny.vae)
    assert own.vae is tiny.vae and base.vae is not tiny.vae and own.hash != base.hash
    with pytest.raises(ModelError, match=r"not an autoencoder's folder|no such file"):
        load_model(saved, "cpu", "fp32", vae=tmp_path / "none")


def breaks(name):
    """(how to break a copy, what the error says) by name."""

    def shard(folder):
        return sorted((folder / "unet").glob("*.safetensors"))[0]

    def flip(folder):
        raw = bytearray(shard(folder).read_bytes())
        raw[-1] ^= 1
        shard(folder).write_bytes(raw)

    def cut(folder):
        shard(folder).write_bytes(shard(folder).read_bytes()[:-5])

    def cut_without_manifest(folder):
        cut(folder)
        (folder / "manifest.json").unlink()

    def nan(folder, value=float("nan")):
        state = load_file(shard(folder))
        state[sorted(state)[0]].view(-1)[0] = value
        save_file(state, shard(folder))
        write_manifest(folder)

    def drop_shard(folder):
        shard(folder).unlink()
        (folder / "manifest.json").unlink()

    def rename_key(folder):
        state = load_file(shard(folder))
        state["stranger"] = state.pop(sorted(state)[0])
        save_file(state, shard(folder))
        (folder / "manifest.json").unlink()

    def pickled(folder):
        for path in (folder / "unet").glob("diffusion*"):
            path.unlink()
        (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")
        (folder / "manifest.json").unlink()

    def stranger(folder):
        shutil.copy(shard(folder), folder / "unet/diffusion_pytorch_model.safetensors")

    def no_tokenizer(folder):
        shutil.rmtree(folder / "tokenizer")
        (folder / "manifest.json").unlink()

    def escape(folder):
        index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
        edit(index, weight_map={"a": "../vae/x.safetensors"})

    table = {
        "no folder": (lambda f: shutil.rmtree(f), "no such model folder"),
        "no index": (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
        "index syntax": (lambda f: (f / "model_index.json").write_text("{"), "not valid JSON"),
        "no config": (lambda f: (f / "unet/config.json").unlink(), "config.json: no such file"),
        "no tokenizer": (no_tokenizer, "no vocab.json"),
        "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json: no such file"),
        "size": (cut, "does not match the manifest's size"),
        "truncated": (cut_without_manifest, "is truncated"),
        "missing shard": (drop_shard, "which is missing"),
        "pickle": (pickled, "pickle"),
        "escape": (escape, "no safetensors file beside it"),
        "manifest": (lambda f: (f / "manifest.json").write_text('{"files": 3}'), "manifest is damaged"),
        "XL": (
            lambda f: edit(f / "model_index.json", _class_name="StableDiffusionXLPipeline"),
            "names no text_encoder_2 and no tokenizer_2",
        ),
        "XL edit": (
            lambda f: edit(f / "model_index.json", _class_name="StableDiffusionXLInstructPix2PixPipeline"),
            "this kind of Stable Diffusion XL",
        ),
        "refiner": (
            lambda f: edit(
                f / "model_index.json",
                _class_name="StableDiffusionXLImg2ImgPipeline",
                text_encoder=[None, None],
                tokenizer=[None, None],
                text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
                tokenizer_2=["transformers", "CLIPTokenizer"],
            ),
            "XL refiner",
        ),
        "SD3": (lambda f: edit(f / "model_index.json", _class_name="StableDiffusion3Pipeline"), "unet .*not supported"),
        "FLUX": (lambda f: edit(f / "model_index.json", _class_name="FluxFillPipeline"), "this kind of FLUX"),
        "ControlNet": (
            lambda f: edit(f / "model_index.json", _class_name="StableDiffusionControlNetPipeline"),
            "ControlNet",
        ),
        "T5": (
            lambda f: edit(f / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
            "is of model type clip_text_model, but the index names the text encoder T5EncoderModel",
        ),
        "T5 config": (
            lambda f: edit(f / "text_encoder/config.json", model_type="t5"),
            "is of model type t5, but the index names the text encoder CLIPTextModel",
        ),
        "AltCLIP": (
            lambda f: edit(f / "model_index.json", text_encoder=["diffusers", "RobertaSeriesModelWithTransformation"]),
            r"text_encoder \(RobertaSeriesModelWithTransformation\)",
        ),
        "second encoder": (
            lambda f: edit(f / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]),
            "text_encoder_2",
        ),
        "no unet": (lambda f: edit(f / "model_index.json", unet=[None, None]), "names no unet"),
        # found while loading
        "sha": (flip, "does not match the manifest's sha256"),
        "NaN": (nan, "holds NaN or infinity"),
        "infinity": (lambda f: nan(f, float("inf")), "holds NaN or infinity"),
        "keys": (rename_key, "1 missing .* 1 unexpected .stranger"),
        "config": (lambda f: edit(f / "unet/config.json", class_embed_type="timestep"), "class_embed_type"),
        "config type": (lambda f: edit(f / "unet/config.json", norm_num_groups="many"), "cannot be used"),
        "width": (lambda f: edit(f / "unet/config.json", cross_attention_dim=64), "for text of width 64"),
        "channels": (lambda f: edit(f / "vae/config.json", latent_channels=8), "the VAE 8 latent channels"),
        "shape": (lambda f: edit(f / "unet/config.json", layers_per_block=2), "missing"),
        "eos": (lambda f: edit(f / "text_encoder/config.json", eos_token_id=3), "pools at token 3"),
        "schedule": (lambda f: edit(f / "scheduler/scheduler_config.json", beta_schedule="odd"), "beta_schedule"),
        "stranger": (stranger, "not listed in the manifest"),
        "config sha": (
            lambda f: (f / "vae/config.json").write_text((f / "vae/config.json").read_text().replace("0.7", "0.8")),
            "manifest's sha256",
        ),
    }
    return table if name is None else table[name]


CHEAP = list(breaks(None))[: list(breaks(None)).index("sha")]


@pytest.mark.parametrize("name", breaks(None))
def test_a_broken_folder_is_one_line_that_names_the_file(copied, name):
    damage, said = breaks(name)
    damage(copied)
    with pytest.raises(LdmError, match=said) as error:
        load_model(copied, "cpu", "fp32")
    assert isinstance(error.value, ModelError) and "\n" not in str(error.value)
    assert copied.name in str(error.value) or name == "schedule"
    if name in CHEAP:
        with pytest.raises(ModelError, match=said):
            check_model(copied)
    else:
        assert check_model(copied) == copied


@pytest.mark.parametrize("name", ["config", "width", "channels", "schedule"])
def test_settings_are_refused_before_a_weight_is_read(copied, name):
    breaks("NaN")[0](copied)  # would be found by reading
    damage, said = breaks(name)
    damage(copied)
    with pytest.raises(ModelError, match=said):
        load_model(copied, "cpu", "fp32")


def test_a_value_too_large_for_fp16_is_named(tiny, tmp_path):
    from ldm.checkpoint.safety import read_tensors

    save_file({"a.weight": torch.tensor([1e6])}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"'a.weight' is too large for float16"):
        read_tensors(tmp_path / "w.safetensors", torch.float16, "cpu")


def test_only_a_model_is_replaced_and_only_by_a_whole_one(tiny, saved, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    with pytest.raises(ModelError, match="exists and is no model"):
        save_model(tiny, tmp_path / "mine")
    folder = save_model(tiny, tmp_path / "model")
    before = (folder / "manifest.json").read_bytes()
    name, broken = "conv_in.bias", load_model(saved, "cpu", "fp32", cache=False)
    broken.unet.state_dict()[name][0] = float("nan")
    with pytest.raises(ModelError, match=f"'{name}' holds NaN"):
        save_model(broken, folder)
    assert (folder / "manifest.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "model"]
    with pytest.raises(ModelError, match="fp64"):
        save_model(tiny, folder, dtype="fp64")


def test_parts_of_different_models_are_refused(tiny, make, tmp_path):
    with pytest.raises(ModelError, match="for text of width 32, this one has 64"):
        save_model(Model(tiny.unet, tiny.vae, make.text(64), tiny.schedule), tmp_path / "m")
    with pytest.raises(ModelError, match="the VAE 8 latent channels"):
        save_model(Model(tiny.unet, make.vae(8), tiny.text, tiny.schedule), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_checking_imports_no_torch(saved):
    code = f"""
import sys
from ldm.checkpoint import check_model
check_model({str(saved)!r})
print([m for m in ("torch", "diffusers", "transformers", "huggingface_hub") if m in sys.modules])"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_single_files_and_near_misses_are_told_apart(saved, tmp_path):
    single = next((saved / "unet").glob("*.safetensors"))
    (tmp_path / "m.ckpt").write_bytes(b"\x80\x02")
    (tmp_path / "run").mkdir()
    shutil.copytree(saved, tmp_path / "run/model")
    cases = {single: "holds no U-Net", tmp_path / "m.ckpt": "pickle", tmp_path / "run": "did you mean .*run/model"}
    cases |= {saved / "unet": "a single UNet2DConditionModel", saved / "model_index.json": "neither a model folder"}
    cases |= {"": "name is empty", tmp_path / "none": "no such model folder", "owner/m.ckpt": "no such model folder"}
    for model, said in cases.items():
        with pytest.raises(ModelError, match=said):
            check_model(model)


def test_loading_opens_no_connection(saved, monkeypatch):
    def refuse(*args):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_model(saved, "cpu", "fp32", cache=False)
