"""A small flow transformer from nothing: trained by the stage of the U-Net, drawn, fine-tuned; what does not go."""

import json

import numpy as np
import pytest
import torch

from ldm import Pipeline
from ldm.checkpoint import load_model
from ldm.checkpoint.inspect import inspect
from ldm.checkpoint.lora import read_lora, with_loras
from ldm.checkpoint.single import save_single
from ldm.errors import ConfigError, ModelError
from ldm.nn.mmdit import MMDiT, MMDiTConfig
from ldm.nn.mmdit_init import new_mmdit
from ldm.training import train
from ldm.training.forecast import costs
from ldm.training.loop.muon import hidden_names
from tests.training.conftest import threads
from tests.training.finetune_cases import last_tensors, pictures, run

SCHEDULE = {"prediction_type": "flow", "whole_timesteps": False, "spacing": "linspace", "flow_shift": 2.0}
MODEL = {"type": "mmdit", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "qk_norm": True}


@pytest.fixture(scope="module")
def settings(unet_mapping):
    quick = {"workers": 0, "accumulation": 1, "batch_size": 2, "latent_pool": 256, "validation": 4, "steps": 4}
    quick |= {"learning_rate": 0.03, "warmup": 0}  # else so few steps change no grey level
    return {**unet_mapping, **quick, "schedule": SCHEDULE, "model": MODEL, "sampler": "euler", "save_every": 2}


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    """(the run's folder, its settings file) after four steps."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "settings.json").write_text(json.dumps(settings))
    with threads(1):
        train(folder / "settings.json", folder / "run")
    return folder / "run", folder / "settings.json"


def test_a_new_transformer_answers_nothing_and_learns():
    config = MMDiTConfig(num_layers=3, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12)
    torch.manual_seed(0)
    network = new_mmdit(config).train()
    x, states, pooled = torch.randn(2, 16, 8, 6), torch.randn(2, 5, 12), torch.randn(2, 2048)
    inputs = (x, torch.tensor([300.0, 700.0]), states)
    h, text, temb = torch.randn(2, 12, 16), torch.randn(2, 5, 16), torch.randn(2, 16)
    for block in network.transformer_blocks:
        after = block(h, text, temb, None, None)
        assert torch.equal(after[0], h) and torch.equal(after[1], text)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        answer = network(*inputs, pooled=pooled)
        losses.append((answer - x).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] == x.square().mean() and losses[2] < losses[1] < losses[0]
    assert network.transformer_blocks[0].norm1.linear.weight.abs().max() > 0  # its gates opened
    outer = {"pos_embed.proj.weight", "proj_out.weight"}
    assert {n for n, p in network.named_parameters() if p.ndim > 1} - hidden_names(network) == outer


def test_it_is_trained_drawn_and_described(trained, parts):
    out, _ = trained
    model = load_model(out / "model", "cpu", "fp32")
    assert isinstance(model.unet, MMDiT) and model.unet.config.pooled_width == model.text.width
    s = model.schedule
    assert (s.flow_shift, s.whole_timesteps, s.spacing) == (2.0, False, "linspace")
    average = last_tensors(out, "ema.")
    assert all(torch.allclose(t, average[n].bfloat16().float()) for n, t in model.unet.state_dict().items())
    started = new_mmdit(model.unet.config).state_dict()["transformer_blocks.1.norm1.linear.weight"]
    assert average["transformer_blocks.1.norm1.linear.weight"].abs().max() > started.abs().max() == 0
    assert json.loads((out / "model" / "model_index.json").read_text())["_class_name"] == "LdmTransformerPipeline"
    first, again, other = (
        Pipeline("a (red:1.3) cat", out / "model", device="cpu").generate(
            seed=seed, num_inference_steps=2, height=32, width=32
        )[0]
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    read = model.text.encode(["a red cat", "a blue dog"])  # four steps change few grey levels: the numbers themselves
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    cat, dog = model.unet(x, torch.tensor([500.0] * 2), read.states, pooled=read.pooled)
    assert not torch.equal(cat, dog) and cat.abs().max() > 0
    assert inspect(out / "model")["title"] == "a flow transformer with one CLIP"
    with pytest.raises(ModelError, match="has no single-file form"):
        save_single(model, out / "one.safetensors", torch.float32)
    parameters, flops, kept = costs(model.unet.config, False)
    assert parameters == sum(p.numel() for p in model.unet.parameters()) and flops > 0 and kept > 0


def test_a_resumed_run_ends_with_the_same_bits(trained, tmp_path):
    out, config = trained
    with threads(1):
        train(config, tmp_path / "run", ["steps=2"])
        train(config, tmp_path / "run", resume="latest", allow_changed=["steps"])
    first, second = last_tensors(out, ""), last_tensors(tmp_path / "run", "")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_its_lora_is_trained_and_read(trained, tmp_path):
    out, _ = trained
    data = pictures(tmp_path / "pictures", 4)
    run(data, tmp_path / "lora", out / "model", steps=2)
    base = load_model(out / "model", "cpu", "fp32")
    changed = with_loras(base, [(read_lora(tmp_path / "lora"), 1.0)]).unet.state_dict()
    assert sum(not torch.equal(changed[name], tensor) for name, tensor in base.unet.state_dict().items()) > 8


REFUSED = {
    "an unknown type": ({"model": {"type": "mmdot"}}, "unknown type 'mmdot': choose from unet, mmdit"),
    "a U-Net's setting": ({"model": {**MODEL, "layers_per_block": 1}}, "unknown setting 'layers_per_block'"),
    "another schedule": ({"schedule": {"prediction_type": "flow"}}, "whole_timesteps: false"),
    "another width of text": ({"model": {**MODEL, "joint_attention_dim": 7}}, "model.joint_attention_dim: asks for 7"),
    "patches that do not fit": ({"model": {**MODEL, "patch_size": 3}}, "model.patch_size: has to divide 4"),
    "a start": ({"init": None}, "init: is for U-Nets"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_is_said_first(name, settings, tmp_path):
    changes, message = REFUSED[name]
    changes |= {"init": settings["vae"]} if "init" in changes else {}
    (tmp_path / "settings.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        train(tmp_path / "settings.json", tmp_path / "run")
    assert not (tmp_path / "run").exists()
