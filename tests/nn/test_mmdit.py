"""Our flow transformers against diffusers': names, shapes, outputs, gradients; and their own promises about bits."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from ldm.errors import ConfigError, ModelError
from ldm.nn.mmdit import MMDiT, MMDiTConfig, SingleBlock, load_mmdit

SPEC = importlib.util.spec_from_file_location("fixtures_of_mmdit", Path(__file__).parent / "make_fixtures.py")
FIXTURES = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(FIXTURES)

SMALL = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
SMALL |= {"in_channels": 4, "out_channels": 4, "joint_attention_dim": 24, "pooled_projection_dim": 20}
SD3 = MMDiTConfig(**SMALL, pos_embed_max_size=7, sample_size=8)
FLUX = MMDiTConfig(**SMALL, num_single_layers=2, axes_dims_rope=(4, 6, 6), qk_norm=True)
CONFIGS = {
    "sd3_medium": SD3,
    "sd35_medium": dataclasses.replace(SD3, qk_norm=True, dual_attention_layers=(0,)),
    "sd35_large": dataclasses.replace(SD3, qk_norm=True),
    "flux_dev": dataclasses.replace(FLUX, guidance_embeds=True),
    "flux_schnell": FLUX,
}
TENSORS = {"sd3_medium": 683, "sd35_medium": 909, "sd35_large": 1227, "flux_dev": 1160, "flux_schnell": 1156}


def peer(config):
    import diffusers

    settings = config.to_diffusers()
    module = getattr(diffusers, settings["_class_name"]).from_config(settings)
    torch.manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):  # so that no zero or one hides a difference
        torch.nn.init.normal_(tensor, std=0.1 if tensor.ndim > 1 else 0.3)
    return module.eval()


def ours_of(theirs, config):
    return load_mmdit(config, {name: tensor.clone() for name, tensor in theirs.state_dict().items()})


def inputs(config, batch=2, size=(8, 8), tokens=5):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.in_channels, *size, generator=g)
    states = torch.randn(batch, tokens, config.joint_attention_dim, generator=g)
    extra = {"pooled": torch.randn(batch, config.pooled_projection_dim, generator=g)}
    if config.guidance_embeds:
        extra["guidance"] = torch.linspace(1.5, 4.5, batch)
    return x, torch.linspace(999, 20, batch), states, extra


def squares(size):
    """Rows and columns of the latents that one token of FLUX stands for, in the order of the tokens."""
    return [(slice(i, i + 2), slice(j, j + 2)) for i in range(0, size[0], 2) for j in range(0, size[1], 2)]


def of_peer(theirs, x, timesteps, states, pooled, guidance=None):
    """diffusers' answer, with its packing for FLUX written out."""
    if not hasattr(theirs, "x_embedder"):
        return theirs(x, states, pooled, timesteps).sample
    places = squares(x.shape[-2:])
    tokens = torch.stack([x[:, :, rows, columns].flatten(1) for rows, columns in places], dim=1)
    ids = torch.tensor([[0.0, rows.start // 2, columns.start // 2] for rows, columns in places])
    text_ids = torch.zeros(states.shape[1], 3)
    answer = theirs(tokens, states, pooled, timesteps / 1000, ids, text_ids, guidance).sample
    latents = torch.empty_like(x)
    for token, (rows, columns) in enumerate(places):
        latents[:, :, rows, columns] = answer[:, token].unflatten(1, (-1, 2, 2))
    return latents


@pytest.mark.parametrize("kind", FIXTURES.TRANSFORMERS)
def test_names_and_shapes_at_full_width(kind):
    with torch.device("meta"):
        state = MMDiT(MMDiTConfig.from_diffusers(FIXTURES.TRANSFORMERS[kind])).state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == FIXTURES.read(kind)
    assert len(state) == TENSORS[kind]


@pytest.mark.parametrize("kind", CONFIGS)
def test_outputs_equal_diffusers(kind):
    theirs = peer(CONFIGS[kind])
    ours = ours_of(theirs, CONFIGS[kind])
    for size in ((8, 8), (10, 6), (2, 14)):
        x, t, states, extra = inputs(CONFIGS[kind], size=size)
        with torch.no_grad():
            expected = of_peer(theirs, x, t, states, **extra)
            assert expected.shape == x.shape and expected.std() > 0.1
            for backend in ("sdpa", "chunked"):
                ours.set_attention(backend)
                assert (ours(x, t, states, **extra) - expected).abs().max() < 1e-5, size


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_input_and_place_changes_the_output(kind):
    """What the comparison with diffusers would miss if the output did not depend on it."""
    config = CONFIGS[kind]
    ours = ours_of(peer(config), config)
    x, t, states, extra = inputs(config)
    with torch.no_grad():
        expected = ours(x, t, states, **extra)
        others = {"timesteps": ours(x, t - 300, states, **extra), "states": ours(x, t, states.flip(0), **extra)}
        for name, value in extra.items():
            others[name] = ours(x, t, states, **{**extra, name: value.flip(0)})
        others["rows"] = ours(x.roll(2, 2), t, states, **extra).roll(-2, 2)
        others["columns"] = ours(x.roll(2, 3), t, states, **extra).roll(-2, 3)
        others["transposed"] = ours(x.mT, t, states, **extra).mT
    for name, other in others.items():
        assert (other - expected).abs().max() > 1e-3, name


@pytest.mark.parametrize(
    "kind, change",
    [
        ("flux_schnell", {"axes_dims_rope": (6, 4, 6)}),
        ("sd3_medium", {"num_attention_heads": 1, "attention_head_dim": 32}),
    ],
)
def test_other_settings_with_the_same_weights_give_other_outputs(kind, change):
    config = CONFIGS[kind]
    theirs = peer(config)
    x, t, states, extra = inputs(config)
    with torch.no_grad():
        other = ours_of(theirs, dataclasses.replace(config, **change))(x, t, states, **extra)
        assert (other - of_peer(theirs, x, t, states, **extra)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["sd35_medium", "flux_dev"])
def test_checkpointing_gives_equal_gradients_and_those_of_diffusers(kind):
    config = CONFIGS[kind]
    theirs = peer(config).train()
    ours = ours_of(theirs, config).train()
    x, t, states, extra = inputs(config)

    def gradients(module, call):
        module.zero_grad()
        call().square().mean().backward()
        return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}

    plain = gradients(ours, lambda: ours(x, t, states, **extra))
    calls = []
    for block in (ours.transformer_blocks[0], *ours.single_transformer_blocks[:1]):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    ours.gradient_checkpointing = True
    again = gradients(ours, lambda: ours(x, t, states, **extra))
    assert len(calls) == (4 if config.is_flux else 2)  # once forward, once more in the backward pass
    expected = gradients(theirs, lambda: of_peer(theirs, x, t, states, **extra))
    assert plain.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(plain[name], again[name]), name
        assert torch.allclose(plain[name], gradient, atol=1e-5, rtol=1e-4), name
    dead = {name.rpartition(".")[0] for name, gradient in plain.items() if not gradient.any()}
    last = "transformer_blocks.1.attn."  # in SD3 nothing reads what the last block's text asks
    assert dead == (set() if config.is_flux else {f"{last}add_q_proj", f"{last}norm_added_q"})


@pytest.mark.parametrize("kind", ["sd35_medium", "flux_dev"])
def test_masked_tokens_are_as_good_as_not_there(kind):
    config = CONFIGS[kind]
    ours = ours_of(peer(config), config)
    x, t, states, extra = inputs(config)
    mask = (torch.arange(5) < 3).expand(2, -1)
    with torch.no_grad():
        short, whole = ours(x, t, states[:, :3], **extra), ours(x, t, states, **extra)
        assert (ours(x, t, states, mask=mask, **extra) - short).abs().max() < 1e-5 < (whole - short).abs().max()


@pytest.mark.parametrize("size", [(8, 8), (2, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sd35_medium", "flux_dev"])
def test_bits_do_not_depend_on_the_batch(kind, dtype, size):
    config = CONFIGS[kind]
    ours = ours_of(peer(config), config).to(dtype)
    x, t, states, extra = inputs(config, batch=5, size=size)
    x, states, extra["pooled"] = x.to(dtype), states.to(dtype), extra["pooled"].to(dtype)

    def rows(which):
        return ours(x[which], t[which], states[which], **{name: value[which] for name, value in extra.items()})

    with torch.no_grad():
        alone = torch.cat([rows(slice(i, i + 1)) for i in range(5)])
        for n in range(2, 6):
            assert torch.equal(rows(slice(n)), alone[:n]), n
        assert torch.equal(rows([3, 0, 4]), alone[[3, 0, 4]])


def test_positions_of_a_new_network_are_those_of_diffusers():
    from diffusers import SD3Transformer2DModel

    theirs = SD3Transformer2DModel.from_config(SD3.to_diffusers()).pos_embed.pos_embed
    ours = MMDiT(SD3).pos_embed.pos_embed
    assert ours.shape == (1, 49, 32) and (ours - theirs).abs().max() < 1e-6
    assert not torch.equal(ours, MMDiT(dataclasses.replace(SD3, sample_size=16)).pos_embed.pos_embed)


def test_what_overflows_in_fp16_becomes_the_largest_number():
    block = SingleBlock(FLUX)
    with torch.no_grad():
        block.proj_out.bias.fill_(60000.0)
        block.norm.linear.bias.fill_(3.0)  # the gate among them
        h, temb = torch.zeros(2, 4, 32), torch.zeros(2, 32)
        assert block(h, temb, None, None).min() > 1e5
        assert (block.half()(h.half(), temb.half(), None, None) == 65504).all()


@pytest.mark.parametrize("kind", CONFIGS)
def test_config_round_trip_through_diffusers(kind):
    import diffusers

    settings = CONFIGS[kind].to_diffusers()
    with torch.device("meta"):
        theirs = getattr(diffusers, settings["_class_name"]).from_config(settings)
    assert MMDiTConfig.from_diffusers({**theirs.config, "_class_name": settings["_class_name"]}) == CONFIGS[kind]
    assert MMDiTConfig.from_diffusers(settings) == CONFIGS[kind]


@pytest.mark.parametrize(
    "kind, setting",
    [
        ("sd3_medium", {"qk_norm": "layer_norm"}),
        ("sd3_medium", {"caption_projection_dim": 1024}),
        ("sd3_medium", {"pos_embed_max_size": None}),
        ("sd3_medium", {"guidance_embeds": True}),
        ("flux_dev", {"patch_size": 2}),
        ("flux_dev", {"in_channels": 63}),
        ("flux_dev", {"out_channels": 15}),
        ("flux_dev", {"a_setting_of_tomorrow": 3}),
    ],
)
def test_unsupported_settings_are_refused_by_name(kind, setting):
    with pytest.raises(ModelError, match=f"config.json.*not supported.*{next(iter(setting))}"):
        MMDiTConfig.from_diffusers({**FIXTURES.TRANSFORMERS[kind], **setting}, "transformer/config.json")


def test_another_class_is_refused_by_name():
    with pytest.raises(ModelError, match=r"'Flux2Transformer2DModel' is no flow.*'FluxTransformer2DModel'"):
        MMDiTConfig.from_diffusers({"_class_name": "Flux2Transformer2DModel"})


@pytest.mark.parametrize(
    "config, change, words",
    [
        (SD3, {"num_layers": 0}, "num_layers has to be at least 1"),
        (SD3, {"dual_attention_layers": (0, 2)}, "has 2, but there are 2 layers"),
        (SD3, {"num_single_layers": 1}, "need axes_dims_rope"),
        (SD3, {"guidance_embeds": True}, "need axes_dims_rope"),
        (SD3, {"attention_head_dim": 3}, "multiple of 4, got 6"),
        (SD3, {"sample_size": 1}, "sample_size"),
        (FLUX, {"axes_dims_rope": (4, 6, 8)}, "sum is 16"),
        (FLUX, {"axes_dims_rope": (4, 5, 7)}, "three even numbers"),
        (FLUX, {"qk_norm": False}, "needs qk_norm"),
    ],
)
def test_contradictions_are_refused(config, change, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(config, **change)


@pytest.mark.parametrize(
    "kind, change, words",
    [
        ("sd3_medium", {"size": (9, 8)}, "latents of 9x8 cannot be cut into patches of 2x2"),
        ("flux_dev", {"size": (8, 7)}, "multiples of 2"),
        ("sd3_medium", {"size": (8, 16)}, "4x8 patches are more than the 7x7"),
        ("sd3_medium", {"pooled": None}, "needs pooled text"),
        ("flux_dev", {"guidance": None}, "needs the scale of the guidance"),
        ("flux_schnell", {"guidance": torch.ones(2)}, "does not know a scale"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(kind, change, words):
    x, t, states, extra = inputs(CONFIGS[kind], size=change.pop("size", (8, 8)))
    with pytest.raises(ModelError, match=words):
        MMDiT(CONFIGS[kind])(x, t, states, **{**extra, **change})


def test_weights_of_another_model_are_refused():
    with pytest.raises(ModelError, match=r"MMDiT.*missing.*norm_added_k"):
        load_mmdit(CONFIGS["sd35_large"], MMDiT(SD3).state_dict())
