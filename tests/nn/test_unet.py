"""Our U-Net against diffusers': names, shapes, outputs, gradients; and its own promises about bits."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from ldm.device import fast_bf16
from ldm.errors import ConfigError, ModelError
from ldm.nn import batch_invariant
from ldm.nn.unet import UNet, UNetConfig, load_unet

SPEC = importlib.util.spec_from_file_location("make_fixtures", Path(__file__).parent / "make_fixtures.py")
FIXTURES = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(FIXTURES)

SMALL = {"norm_num_groups": 8, "cross_attention_dim": 24}
CONFIGS = {
    "sd15": UNetConfig(block_out_channels=(16, 32, 32), num_heads=(2, 4, 4), transformer_layers=(1, 1, 0), **SMALL),
    "sd21": UNetConfig(
        block_out_channels=(16, 32), num_heads=(2, 4), transformer_layers=(1, 0), use_linear_projection=True, **SMALL
    ),
    "xl": UNetConfig(
        block_out_channels=(16, 32, 32),
        num_heads=(2, 2, 4),
        transformer_layers=(0, 1, 2),
        mid_transformer_layers=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
        **SMALL,
    ),
    "inpaint": UNetConfig(
        in_channels=9, block_out_channels=(16, 32), num_heads=(2, 2), transformer_layers=(1, 0), **SMALL
    ),
    "lcm": UNetConfig(
        block_out_channels=(16, 32), num_heads=(2, 2), transformer_layers=(1, 0), time_cond_proj_dim=12, **SMALL
    ),
    "default": UNetConfig(
        in_channels=8,
        out_channels=8,
        block_out_channels=(32, 48),
        num_heads=(2, 4),
        transformer_layers=(0, 1),
        layers_per_block=1,
        cross_attention_dim=192,
        addition_embed_type="text",
        addition_embed_type_num_heads=6,
        norm_num_groups=16,
    ),
    "sixteen": UNetConfig(
        in_channels=16,
        out_channels=16,
        block_out_channels=(16, 32),
        num_heads=(2, 2),
        transformer_layers=(0, 1),
        **SMALL,
    ),
}


def randomised(module):
    """Every weight drawn anew, norms and biases too, so that no zero or one hides a difference."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05 if parameter.ndim > 1 else 0.3)
    return module


def peer(config):
    from diffusers import UNet2DConditionModel

    return randomised(UNet2DConditionModel.from_config(config.to_diffusers())).eval()


def inputs(config, batch=3, size=(8, 8), seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.in_channels, *size, generator=g)
    states = torch.randn(batch, 11, config.cross_attention_dim, generator=g)
    extra = {}
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        extra["pooled"] = torch.randn(batch, width, generator=g)
        extra["time_ids"] = torch.randint(0, 1024, (batch, 6), generator=g).float()
    if config.time_cond_proj_dim is not None:
        extra["guidance"] = torch.linspace(1.5, 8, batch)
    return x, torch.linspace(1, 999, batch), states, extra


def of_peer(unet, x, timesteps, states, mask=None, pooled=None, time_ids=None, guidance=None):
    from diffusers import LatentConsistencyModelPipeline as Pipe

    added, width = {"text_embeds": pooled, "time_ids": time_ids}, unet.config.time_cond_proj_dim
    waves = None if guidance is None else Pipe.get_guidance_scale_embedding(None, guidance - 1, width)
    more = {"encoder_attention_mask": mask, "timestep_cond": waves, "added_cond_kwargs": added}
    return unet(x, timesteps, states, **more).sample


@pytest.mark.parametrize("kind", FIXTURES.CONFIGS)
def test_names_and_shapes_at_full_width(kind):
    with torch.device("meta"):
        state = UNet(UNetConfig.from_diffusers(FIXTURES.CONFIGS[kind])).state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == FIXTURES.read(kind)
    assert len(state) == (1680 if kind == "xl" else 686)


@pytest.mark.parametrize("kind", CONFIGS)
def test_outputs_equal_diffusers(kind):
    config = CONFIGS[kind]
    theirs = peer(config)
    ours = load_unet(config, theirs.state_dict())
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[2] = False  # a text without any token must stay finite
    pools = config.addition_embed_type == "text"  # of masked tokens too in diffusers, but not here: see the next test
    for size in ((8, 8), (9, 7)):
        x, t, states, extra = inputs(config, size=size)
        for backend in ("sdpa", "chunked"):
            ours.set_attention(backend)
            for m in (None,) if pools else (None, mask):
                with torch.no_grad():
                    expected = of_peer(theirs, x, t, states, mask=m, **extra)
                    assert expected.std() > 0.1
                    assert (ours(x, t, states, mask=m, **extra) - expected).abs().max() < 1e-5


def test_masked_tokens_are_as_good_as_not_there():
    ours = randomised(UNet(CONFIGS["default"])).eval()
    x, t, states, _ = inputs(CONFIGS["default"])
    mask = torch.arange(11) < 7
    with torch.no_grad():
        short, whole = ours(x, t, states[:, :7]), ours(x, t, states)
        assert (ours(x, t, states, mask=mask.expand(3, -1)) - short).abs().max() < 1e-5 < (whole - short).abs().max()


def test_checkpointing_gives_equal_gradients_and_those_of_diffusers():
    config = CONFIGS["default"]
    theirs = peer(config).train()
    x, t, states, extra = inputs(config)

    def gradients(module, call):
        module.zero_grad()
        call().square().mean().backward()
        return {name: p.grad.clone() for name, p in module.named_parameters()}

    ours = UNet(config).train()
    ours.load_state_dict({k: v.clone() for k, v in theirs.state_dict().items()})
    plain = gradients(ours, lambda: ours(x, t, states, **extra))
    calls = []
    ours.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    ours.gradient_checkpointing = True
    again = gradients(ours, lambda: ours(x, t, states, **extra))
    assert len(calls) == 2  # once forward, once more in the backward pass
    expected = gradients(theirs, lambda: of_peer(theirs, x, t, states))
    for name, gradient in expected.items():
        assert torch.equal(plain[name], again[name]), name
        assert torch.allclose(plain[name], gradient, atol=1e-5, rtol=1e-4), name


EMULATED = () if fast_bf16(torch.device("cpu")) else pytest.mark.slow  # where the CPU has no bfloat16 of its own


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, (16, 16)),
        (torch.float32, (5, 7)),
        pytest.param(torch.bfloat16, (16, 16), marks=EMULATED),
        (torch.bfloat16, (5, 7)),
    ],
)
def test_bits_do_not_depend_on_the_batch(dtype, size):
    config = CONFIGS["default"]
    unet = randomised(UNet(config)).eval().to(dtype)
    x, t, states, _ = inputs(config, batch=17, size=size)
    x, states = x.to(dtype), states.to(dtype)
    with torch.no_grad():
        alone = torch.cat([unet(x[i : i + 1], t[i : i + 1], states[i : i + 1]) for i in range(17)])
        for n in range(2, 18):
            assert torch.equal(unet(x[:n], t[:n], states[:n]), alone[:n]), n
        order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
        assert torch.equal(unet(x[order], t[order], states[order]), alone[order])


def test_a_wide_unet_in_bf16_is_channels_last_and_an_image_has_the_same_bits_in_every_batch(monkeypatch):
    config = CONFIGS["default"]
    unet = randomised(UNet(config)).eval().to(torch.bfloat16)
    x, t, states, _ = inputs(config, batch=4, size=(8, 8))
    x, states = x.to(torch.bfloat16), states.to(torch.bfloat16)
    with torch.no_grad():
        plain = unet(x, t, states)
        monkeypatch.setattr(batch_invariant, "WIDE", 1)
        unet.to(memory_format=torch.channels_last)
        seen = []
        unet.mid_block.resnets[1].conv2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        wide = unet(x, t, states)
        alone = torch.cat([unet(x[i : i + 1], t[i : i + 1], states[i : i + 1]) for i in range(4)])
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()
    assert torch.equal(wide, alone)
    assert (wide.float() - plain.float()).norm() < 0.03 * plain.float().norm()


def test_a_narrow_unet_in_bf16_stays_contiguous():
    """Group norm of small channels-last images in bf16 takes up to 18 times as long."""
    config = CONFIGS["default"]
    unet = randomised(UNet(config)).eval().to(torch.bfloat16)
    x, t, states, _ = inputs(config, batch=2, size=(8, 8))
    seen = []
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_pre_hook(lambda module, args, name=name: seen.append((name, args[0])))
    with torch.no_grad():
        unet(x.to(torch.bfloat16), t, states.to(torch.bfloat16))
    assert seen and [name for name, image in seen if not image.is_contiguous()] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_kept_of_the_texts_changes_no_bit(kind, dtype):
    unet = randomised(UNet(CONFIGS[kind])).eval().to(dtype)
    x, t, states, extra = inputs(CONFIGS[kind])
    x, states, extra = x.to(dtype), states.to(dtype), {name: value.to(dtype) for name, value in extra.items()}
    mask = torch.arange(11) < torch.tensor([[11], [7], [3]])
    with torch.no_grad():
        for m in (None, mask):
            for n in (3, 2, 1):
                more = {name: value[:n] for name, value in extra.items()}
                of_n = None if m is None else m[:n]
                expected = unet(x[:n], t[:n], states[:n], mask=of_n, **more)
                cache, texts = unet.prepare(), states[:n]
                for _step in range(2):
                    assert torch.equal(unet(x[:n], t[:n], texts, mask=of_n, cache=cache, **more), expected)
                assert cache.made
                other = unet(x[:n], t[:n], texts.flip(1), mask=of_n, cache=cache, **more)
                assert torch.equal(other, unet(x[:n], t[:n], texts.flip(1), mask=of_n, **more))


def test_training_mode_pads_nothing():
    config = CONFIGS["default"]
    unet = UNet(config).train()
    rows = []
    unet.conv_in.register_forward_hook(lambda m, i, o: rows.append(len(o)))
    unet.time_embedding.linear_1.register_forward_hook(lambda m, i, o: rows.append(len(o)))
    x, t, states, _ = inputs(config, batch=1)
    assert unet(x, t, states).shape == x.shape
    assert rows == [1, 1]


@pytest.mark.parametrize("kind", CONFIGS)
def test_config_round_trip_through_diffusers(kind):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(CONFIGS[kind].to_diffusers())
    assert UNetConfig.from_diffusers(dict(theirs.config)) == CONFIGS[kind]
    assert UNetConfig.from_diffusers(CONFIGS[kind].to_diffusers()) == CONFIGS[kind]


@pytest.mark.parametrize(
    "setting",
    [
        {"class_embed_type": "timestep"},
        {"encoder_hid_dim": 4096},
        {"addition_embed_type": "image"},
        {"dual_cross_attention": True},
        {"resnet_time_scale_shift": "scale_shift"},
        {"mid_block_type": None},
        {"flip_sin_to_cos": False},
        {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4},
        {"up_block_types": ["CrossAttnUpBlock2D"] * 4},
        {"layers_per_block": [2, 2, 1, 2]},
        {"transformer_layers_per_block": [[1, 1], 2, 1, 1]},
        {"a_setting_of_tomorrow": 3},
    ],
    ids=lambda s: next(iter(s)),
)
def test_unsupported_settings_are_refused_by_name(setting):
    config = {**FIXTURES.CONFIGS["sd15"], **setting}
    with pytest.raises(ModelError, match=next(iter(setting))):
        UNetConfig.from_diffusers(config)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"time_cond_proj_dim": 7}, "an even number from 4 on"),
        ({"num_heads": (8, 8)}, "num_heads has 2 levels"),
        ({"num_heads": (7, 8, 8, 8)}, "not a multiple of num_heads 7"),
        ({"norm_num_groups": 48}, "norm_num_groups 48"),
        ({"addition_embed_type": "txt"}, "did you mean 'text'"),
        ({"addition_embed_type": "text", "addition_embed_type_num_heads": 7}, "addition_embed_type_num_heads 7"),
        ({"addition_embed_type": "text_time"}, "needs addition_time_embed_dim"),
        ({"transformer_layers": (1, 1, 1, 2)}, "mid_transformer_layers"),
        ({"layers_per_block": 0}, "layers_per_block"),
    ],
)
def test_contradictions_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(UNetConfig(), **change)


def test_weights_that_do_not_fit_are_counted_and_named():
    config = CONFIGS["default"]
    state = UNet(config).state_dict()
    names = list(state)
    for name in names[:7]:
        del state[name]
    state["extra.weight"] = torch.zeros(1)
    state["conv_out.weight"] = torch.zeros(3, 3)
    with pytest.raises(ModelError) as error:
        load_unet(config, state, where="unet/config.json")
    for part in ("unet/config.json", "7 missing", names[4], "...", "1 unexpected (extra.weight)", "[3, 3] instead of"):
        assert part in str(error.value)
    assert names[5] not in str(error.value)


def test_leftovers_of_exporters_are_left_out_and_told_but_no_weights_and_no_scales(capsys):
    config = CONFIGS["default"]
    state = UNet(config).state_dict()
    names = ["model_sampling.sigmas", "embeddings.position_ids", "logit_scale"]
    unet = load_unet(config, state | {name: torch.zeros(1) for name in names}, where="unet/x.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in unet.state_dict().items())
    assert f"unet/x.safetensors: 3 tensors that the model has no use for: {', '.join(names)}" in capsys.readouterr().err
    for name in ("extra.weight", "conv_in.extra.bias", "scaled_fp8", "conv_in.scale_weight", "conv_in.weight.absmax"):
        with pytest.raises(ModelError, match="1 unexpected"):
            load_unet(config, state | {name: torch.zeros(1)})


def test_a_scale_is_an_input_of_lcm_alone_and_may_be_left_out():
    theirs = peer(CONFIGS["lcm"])
    ours = load_unet(CONFIGS["lcm"], theirs.state_dict())
    x, t, states, extra = inputs(CONFIGS["lcm"])
    with torch.no_grad():
        plain, told = ours(x, t, states), ours(x, t, states, **extra)
        assert (plain - of_peer(theirs, x, t, states)).abs().max() < 1e-5 < (told - plain).abs().max()
    with pytest.raises(ModelError, match="does not know a scale"):
        UNet(CONFIGS["sd15"]).eval()(x, t, states, **extra)


def test_xl_without_its_sizes_is_refused():
    config = CONFIGS["xl"]
    x, t, states, _ = inputs(config)
    with pytest.raises(ModelError, match="time_ids"):
        UNet(config)(x, t, states)
