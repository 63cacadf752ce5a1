"""Fine-tunings of SD3 and FLUX against a plain PyTorch loop with diffusers' transformers."""

import math
import signal
from functools import partial

import diffusers
import peft
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from ldm.checkpoint import load_model
from ldm.checkpoint.lora import match_layers, read_lora, target_at, with_loras
from ldm.checkpoint.memory import weight_shapes
from ldm.errors import ConfigError, ResourceError
from ldm.nn.lora import updates_of
from ldm.training.finetuning import base_model, memory
from ldm.training.finetuning.memory import weight_bytes
from ldm.training.finetuning.presets import Facts, command, for_model, read_facts
from ldm.training.loop import seeded
from tests.children import in_child, status_of
from tests.flow_models import SHIFTS, TOKENS, build, packed
from tests.training.finetune_cases import QUICK, apart, last_tensors, norm, pictures, plain_sgd, resolved, run, stage_of
from tests.training.test_finetune_resume import final, killed_at

STEPS = 3
SGD = {"optimizer": "sgd", "weight_decay": 0.0, "clip": 1e9, "steps": STEPS, "data.cache_dtype": "fp32"}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """kind -> (diffusers' pipeline, the folder that it saved)."""
    found = {}

    def get(kind):
        if kind not in found:
            found[kind] = tmp_path_factory.mktemp("pipes") / kind
            build(kind).save_pretrained(found[kind])
        return build(kind), found[kind]

    return get


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of two shapes."""
    return pictures(tmp_path_factory.mktemp("data") / "pictures", 8, ((32, 32), (44, 28)))


def shifted(kind, t, tokens):
    """The time that a model of a kind is drawn at in place of t."""
    if kind == "flux_dev":
        mu = calculate_shift(tokens, *SHIFTS.values())
        return math.exp(mu) / (math.exp(mu) + (1 / t - 1))
    shift = {"flux_schnell": 1.0}.get(kind, 3.0)
    return shift * t / (1 + (shift - 1) * t)


def plain_loss(kind, pipe, transformer, batch, step):
    """As diffusers' train_dreambooth_lora_sd3.py and …_flux.py compute it, on the noise and times of our keys."""
    x0, size, seed = batch.latents, len(batch.latents), QUICK["seed"]
    noise = seeded.normal(tuple(x0.shape), seed, "noise", step, 0)
    places = (torch.arange(size) + seeded.uniform((size,), seed, "timesteps", step, 0)) / size
    normal = torch.distributions.Normal(0.0, 1.0).icdf(places.double())
    rows, columns = (side // 2 for side in x0.shape[-2:])
    t = shifted(kind, torch.sigmoid(normal), rows * columns).float()
    noisy = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * noise
    once = {"do_classifier_free_guidance": False} if kind.startswith("sd3") else {}
    others = {"prompt_2": None} if kind.startswith("flux") else {"prompt_2": None, "prompt_3": None}
    found = pipe.encode_prompt(batch.captions, **others, **once, max_sequence_length=TOKENS)
    if kind.startswith("sd3"):
        states, _, pooled, _ = found
        raw = transformer(noisy, states.detach(), pooled.detach(), (1000 * t.double()).float()).sample
        return (raw - (noise - x0)).square().mean()
    states, pooled, text_ids = found
    places = diffusers.FluxPipeline._prepare_latent_image_ids(size, rows, columns, "cpu", torch.float32)
    told = {"guidance": torch.ones(size)} if kind == "flux_dev" else {}
    inputs = {"encoder_hidden_states": states.detach(), "pooled_projections": pooled.detach()}
    raw = transformer(packed(noisy), timestep=t, txt_ids=text_ids, img_ids=places, **inputs, **told).sample
    return (raw - packed(noise - x0)).square().mean()


@pytest.mark.parametrize("kind", ["sd35", "flux_dev"])
def test_a_full_run_is_a_plain_loop(kind, pipes, data, tmp_path):
    pipe, folder = pipes(kind)
    out, rate = tmp_path / "run", 1e-3
    run(data, out, folder, train="full", save_dtype="fp32", **{**SGD, "learning_rate": rate})
    stage, transformer = stage_of(out), pipe.transformer.train()

    def at_first(batch, loss):
        compare_first_step(stage, batch, loss, {n: p.grad for n, p in transformer.named_parameters()})

    loss_of = partial(plain_loss, kind, pipe, transformer)
    plain_sgd(stage, transformer.parameters(), rate, STEPS, loss_of, at_first)
    assert apart(last_tensors(out), transformer.state_dict()) < 1e-6
    assert apart(last_tensors(out), build(kind).transformer.state_dict()) > 1e-5
    saved = diffusers.DiffusionPipeline.from_pretrained(out / "model").transformer.state_dict()
    assert apart(saved, transformer.state_dict()) < 1e-6


def compare_first_step(stage, batch, loss, gradients):
    """Loss and gradients, also with activations that are computed twice."""
    stage.module.train()
    for twice in (False, True):
        stage.module.gradient_checkpointing = twice
        ours = stage.loss(batch, 0, 0)
        assert abs(ours.item() - loss.item()) < 1e-5 * loss.item()
        stage.module.zero_grad()
        ours.backward()
        mine = {name: p.grad for name, p in stage.module.named_parameters()}
        assert mine.keys() == gradients.keys()
        assert norm(mine[n] - g for n, g in gradients.items()) < 5e-5 * norm(gradients.values())


@pytest.mark.parametrize("kind", ["sd3", "flux_schnell", "flux_dev"])
def test_a_lora_is_pefts_in_a_plain_loop(kind, pipes, data, tmp_path):
    pipe, folder = pipes(kind)
    out, transformer, rate = tmp_path / "run", pipe.transformer, 0.005
    run(data, out, folder, lora_alpha=3, **{**SGD, "learning_rate": rate})
    stage = stage_of(out)
    transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=ATTENTION))
    parameters = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    for name, update in updates_of(stage.module).items():
        parameters[f"{name}.lora_A.default.weight"].data.copy_(update.down)
    plain_sgd(stage, parameters.values(), rate, STEPS, partial(plain_loss, kind, pipe, transformer.train()))
    lora = read_lora(out)
    assert len(lora.layers) == len(parameters) // 2
    mine, theirs = {}, {}
    for layer, (_, name) in match_layers(lora.header, target_at(folder)).layers.items():
        at = f"{name}.lora_{{}}.default.weight"
        mine |= {at.format("A"): lora.layers[layer].down, at.format("B"): lora.layers[layer].up}
        theirs |= {at.format(part): parameters[at.format(part)].detach() for part in "AB"}
    assert apart(mine, theirs) < 1e-5
    still = [name for name, value in mine.items() if "lora_B" in name and value.abs().max() < 1e-6]  # they begin at 0
    unused = ["transformer_blocks.1.attn.add_q_proj.lora_B.default.weight"]  # the text's queries in SD3's last block
    assert still == (unused if kind == "sd3" else [])


@pytest.mark.parametrize("kind", ["sd35", "flux_dev"])
def test_a_lora_is_read_by_diffusers_and_under_kohyas_names(kind, pipes, data, tmp_path):
    pipe, folder = pipes(kind)
    run(data, tmp_path / "run", folder, name="mine")
    base = load_model(folder, "cpu", "fp32")
    theirs, mine = read_lora(tmp_path / "run" / "mine.safetensors"), read_lora(tmp_path / "run")
    changed = [with_loras(base, [(file, 1.0)]).unet.state_dict() for file in (mine, theirs)]
    assert apart(*changed) == 0 and apart(changed[0], base.unet.state_dict()) > 1e-3
    pipe.load_lora_weights(str(tmp_path / "run"), weight_name="pytorch_lora_weights.safetensors")
    pipe.fuse_lora()
    fused = {name.replace(".base_layer", ""): t for name, t in pipe.transformer.state_dict().items()}
    assert apart({name: fused[name] for name in changed[0]}, changed[0]) < 1e-6


def test_a_killed_run_goes_on_to_the_same_bits(pipes, data, tmp_path, one_thread):
    _, folder = pipes("flux_dev")
    words = {"steps": 4, "save_every": 2, "accumulation": 2, "caption_dropout": 0.5, "held_out": 0.3, "samples": 1}
    words |= {"sample_steps": 2, "optimizer": "adamw", "ema": 0.8, "validate_every": 2, "cache": str(tmp_path / "c")}
    words |= {"gradient_checkpointing": True, "name": "mine"}

    def go(out, **more):
        run(data, tmp_path / out, folder, **words, **more)

    go("imported")  # all of it before a child is forked
    assert status_of(in_child(lambda: go("whole") and 0)) == 0
    assert killed_at(("loss", 5), lambda: go("killed")) == -signal.SIGKILL
    assert status_of(in_child(lambda: go("killed", resume="latest") and 0)) == 0
    assert final(tmp_path / "killed") == final(tmp_path / "whole")


def test_what_does_not_go_is_said_before_anything_is_loaded(pipes, data, tmp_path):
    _, folder = pipes("sd35")
    with pytest.raises(ConfigError, match="text_encoder: is for CLIP alone, and this model is a flow transformer"):
        run(data, tmp_path / "run", folder, text_encoder=True)
    with pytest.raises(ConfigError, match="bucket_step: 4 is no multiple of 8"):
        run(data, tmp_path / "run", folder, bucket_step=4)
    with pytest.raises(ConfigError, match="bucket_step=8"):
        run(data, tmp_path / "run", folder, bucket_step=12, resolution=36)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_presets_of_large_transformers(pipes):
    facts = read_facts({"model": str(pipes("flux_dev")[1])})
    assert facts.transformer and facts.size == "small" and facts.multiple == 8
    flux = Facts(
        width=3072, xl=False, side=1024, flow=True, device="cuda", memory=80 << 30, transformer=True, multiple=16
    )
    settings = for_model({}, flux)
    assert settings["timesteps"] == "logit_normal" and settings["timestep_shift"] is None
    assert settings["data.cache_dtype"] == "bf16" and settings["gradient_checkpointing"]
    assert "data.bucket_step" not in settings and for_model({"data.resolution": 256}, flux)["data.bucket_step"] == 16
    assert "--timestep-shift null" in command(settings, "run")


def test_a_frozen_base_in_16_bits_learns_the_same(pipes, data, tmp_path, monkeypatch):
    """As on a GPU: network and text encoders in bf16, the autoencoder and the updates in fp32."""
    _, folder = pipes("flux_dev")
    words = {"steps": 2, "optimizer": "sgd", "weight_decay": 0.0, "learning_rate": 0.02, "train": "lora"}
    run(data, tmp_path / "plain", folder, **words)
    monkeypatch.setattr(base_model, "frozen_dtype", lambda *_: torch.bfloat16)
    run(data, tmp_path / "half", folder, **words, precision="bf16")
    stage, exact = stage_of(tmp_path / "half"), load_model(folder, "cpu", "fp32")
    assert stage.model.unet.proj_out.weight.dtype == stage.model.text.dtype == torch.bfloat16
    assert apart(stage.model.vae.module.state_dict(), exact.vae.module.state_dict()) == 0
    assert all(p.dtype == torch.float32 for p in stage.module.parameters() if p.requires_grad)
    first, second = (last_tensors(tmp_path / name) for name in ("plain", "half"))
    assert {name for name, tensor in second.items() if tensor.dtype != torch.float32} == set()
    assert 0 < apart(second, first) < 0.1


def test_the_memory_of_the_weights_is_said_and_checked_before_work(pipes, data, tmp_path, monkeypatch, capsys):
    pipe, folder = pipes("sd35")
    count = sum(p.numel() for p in pipe.transformer.parameters()) + pipe.transformer.pos_embed.pos_embed.numel()
    words = {"train": "full", "resolution": 32, "device": "cpu"}
    settings, _ = resolved(data, tmp_path / "run", folder, **words)
    found = weight_bytes(settings, weight_shapes(folder), torch.device("cpu"))
    assert found["transformer"] == 20 * count
    assert found["VAE"] == 4 * sum(p.numel() for p in pipe.vae.parameters())
    run(data, tmp_path / "run", folder, steps=1)
    assert "memory: the weights take" in capsys.readouterr().err
    monkeypatch.setattr(memory, "total_memory", lambda _: 1000)
    with pytest.raises(ResourceError, match=r"the weights need .* MB, and cpu has 1 kB"):
        run(data, tmp_path / "other", folder, steps=1)
