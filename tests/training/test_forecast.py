"""What a dry run of a U-Net tells, and the packaged settings for it."""

import json

import pytest
import torch

from ldm.cli import main
from ldm.diffusion import names
from ldm.diffusion.schedule import Schedule
from ldm.nn.unet import UNet, UNetConfig
from ldm.training import packaged_configs, read_settings
from ldm.training.forecast import SECONDS, costs, forecast_lines
from ldm.training.parts import text_parts, unet_config, vae_part
from tests.training.conftest import threads

SIZES = {"sd/256": 859.52, "sd/512": 859.52, "sdxl/512": 2567.46, "small/256": 77.9, "tiny/128": 12.3}


@pytest.mark.parametrize("name", SIZES)
def test_packaged_settings_are_networks_of_the_size_that_they_say(name):
    settings = read_settings(name, ["vae=default", "text=default"])
    schedule = Schedule(**settings.schedule)
    names.check(settings.sampler, schedule.prediction_type)
    width = 2048 if name == "sdxl/512" else 768
    model = {**settings.model, "cross_attention_dim": width}
    model |= {"projection_class_embeddings_input_dim": 2816} if name == "sdxl/512" else {}
    config = UNetConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in model.items()})
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in UNet(config).parameters())
    assert count / 1e6 == pytest.approx(SIZES[name], rel=0.01)
    assert "Source: " in (packaged_configs() / f"{name}.yaml").read_text()


def test_costs_are_those_of_a_real_step():
    sizes = {"block_out_channels": (16, 32), "layers_per_block": 1, "transformer_layers": (0, 1), "num_heads": (2, 2)}
    config = UNetConfig(**sizes, norm_num_groups=8, cross_attention_dim=24, sample_size=8)
    parameters, flops, kept = costs(config, False, tokens=40)
    unet = UNet(config)
    assert parameters == sum(p.numel() for p in unet.parameters())
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        unet(torch.randn(1, 4, 8, 8), torch.tensor([5.0]), torch.randn(1, 40, 24)).sum().backward()
    exact = counter.get_total_flops()  # less than three times the forward pass: inputs get no gradient
    assert exact <= flops <= 1.15 * exact
    assert costs(config, True, tokens=40)[1] == flops * 4 / 3 < costs(config, True)[1]  # 77, as CLIP has
    assert 50_000 < kept < 5_000_000


def test_a_dry_run_measures_two_steps_and_trains_nothing(parts, tmp_path, capsys, unet_mapping):
    (tmp_path / "unet.json").write_text(json.dumps(unet_mapping))
    with threads(1):
        assert main(["train", str(tmp_path / "unet.json"), "-o", str(tmp_path / "run"), "--dry-run", "steps=50"]) == 0
    said = capsys.readouterr().err
    for words in ("U-Net: ", "TFLOPs to train on one image", "50 steps of 8 images (400 in all)", "GB are free"):
        assert words in said, said
    assert "measured: a step of 4 images took" in said and "images/s" in said and "MB a checkpoint" in said
    assert not (tmp_path / "run").exists()


def test_what_would_take_too_long_is_estimated_and_said_so(parts, monkeypatch, unet_mapping, tmp_path):
    (tmp_path / "unet.json").write_text(json.dumps(unet_mapping))
    settings = read_settings(tmp_path / "unet.json")
    monkeypatch.setattr("ldm.training.forecast._speed", lambda *_: 1e5)
    lines = "\n".join(forecast_lines(settings, 10))
    assert f"two steps would take over {SECONDS:.0f} s" in lines and "estimated from 1e-07 TFLOP/s" in lines
    text = text_parts(settings)
    assert text.tokens == text.load().max_length != 77
    flops = costs(unet_config(settings, vae_part(settings), text), False, text.tokens)[1]
    assert f"speed: {1e5 / flops:.3g} images/s" in lines
    monkeypatch.setattr("ldm.training.forecast.free_memory", lambda *_: 10)
    assert "does not fit into the free memory" in "\n".join(forecast_lines(settings, 10))
