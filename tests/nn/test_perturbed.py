"""Perturbed self-attention in chosen levels and rows of the U-Net, against diffusers' processor for it."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

from ldm.errors import ConfigError
from ldm.nn.unet import UNet, UNetConfig, load_unet

CONFIG = UNetConfig(
    block_out_channels=(16, 32, 32),
    num_heads=(2, 4, 4),
    transformer_layers=(1, 2, 0),
    mid_transformer_layers=1,
    norm_num_groups=8,
    cross_attention_dim=24,
)
LEVELS = {  # ours: names of diffusers' attention modules
    ("mid",): ["mid_block"],
    ("down.1", "up.2"): ["down_blocks.1", "up_blocks.2"],
    ("down.0", "down.1", "mid", "up.1", "up.2"): ["down_blocks", "mid_block", "up_blocks"],
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    peer = UNet2DConditionModel.from_config(CONFIG.to_diffusers()).eval()
    for name, parameter in peer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.4 if "attn1" in name else 0.1 if parameter.ndim > 1 else 0.3)
    return peer


@pytest.mark.parametrize("levels", LEVELS)
def test_rows_and_levels_equal_diffusers(peer, levels):
    ours = load_unet(CONFIG, peer.state_dict())
    x, timesteps, states = draw(4, 4, 8, 8), torch.full((4,), 300.0), draw(4, 7, 24, seed=1)
    perturb = torch.tensor([False, False, True, True])  # the second half, as diffusers' processor has it
    chosen = {
        name: PAGIdentitySelfAttnProcessor2_0() if "attn1" in name and name.startswith(tuple(LEVELS[levels])) else old
        for name, old in peer.attn_processors.items()
    }
    before = peer.attn_processors
    with torch.no_grad():
        plain = ours(x, timesteps, states)
        raw = ours(x, timesteps, states, perturb=perturb, perturb_in=levels)
        peer.set_attn_processor(chosen)
        expected = peer(x, timesteps, states).sample
        peer.set_attn_processor(before)
    assert torch.allclose(raw, expected, atol=2e-5)
    assert torch.equal(raw[:2], plain[:2])  # other rows keep their bits
    assert (raw[2:] - plain[2:]).abs().max() > 1e-3


def test_any_rows_in_any_batch_give_the_same_bits():
    torch.manual_seed(0)
    unet = UNet(CONFIG).eval()
    x, timesteps, states = draw(3, 4, 8, 8), torch.full((3,), 300.0), draw(3, 7, 24, seed=1)
    with torch.no_grad():
        raw = unet(x, timesteps, states, perturb=torch.tensor([True, False, True]), perturb_in=("mid", "down.0"))
        for i, perturbed in enumerate([True, False, True]):
            one = x[i : i + 1], timesteps[i : i + 1], states[i : i + 1]
            alone = unet(*one, perturb=torch.tensor([perturbed]), perturb_in=("mid", "down.0"))
            assert torch.equal(raw[i : i + 1], alone)


def test_a_level_without_self_attention_is_refused():
    unet = UNet(CONFIG)
    assert unet.attention_levels == ("down.0", "down.1", "mid", "up.1", "up.2")
    for level in ("down.2", "up.0", "up.3", "middle"):
        with pytest.raises(
            ConfigError, match=f"no self-attention in '{level}' of this model; choose from: down.0, down.1, mid, up.1"
        ):
            CONFIG.check_attention_layers(("mid", level))
    with pytest.raises(ConfigError, match=r"pag_layers: .*'down.2'"):
        unet(draw(1, 4, 8, 8), torch.ones(1), draw(1, 7, 24), perturb=torch.tensor([True]), perturb_in=("down.2",))
