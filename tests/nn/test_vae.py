"""The autoencoder's wrapper against AutoencoderKL: scale, shift, sizes, bits, failures."""

import pytest
import torch

from ldm.errors import ConfigError, ModelError, NumericsError
from ldm.nn.vae import VAE

CONFIG = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "latent_channels": 5,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "scaling_factor": 0.7,
    "shift_factor": 0.3,
}


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = VAE.from_config(CONFIG)
    vae.module.eval().requires_grad_(False)
    return vae


def test_channels_factor_and_missing_shift_come_from_the_config(vae):
    assert (vae.latent_channels, vae.factor, vae.scaling_factor, vae.shift_factor) == (5, 4, 0.7, 0.3)
    plain = VAE.from_config({**CONFIG, "shift_factor": None})
    assert plain.shift_factor == 0.0


def test_encoding_is_shifted_and_scaled(vae):
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    posterior = vae.module.encode(images).latent_dist
    mean, std = vae.moments(images)
    assert mean.shape == (2, 5, 4, 6)
    assert torch.allclose(mean, (posterior.mean - 0.3) * 0.7)
    assert torch.allclose(std, posterior.std * 0.7)
    assert torch.equal(vae.encode(images), mean)
    drawn = vae.encode(images, torch.Generator().manual_seed(4))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(4))
    assert torch.equal(drawn, mean + std * noise)


def test_decoding_undoes_scale_and_shift_and_clamps(vae):
    z = torch.randn(2, 5, 4, 6)
    expected = vae.module.decode(z).sample
    decoded = vae.decode((z - 0.3) * 0.7)
    assert torch.allclose(decoded, expected.clamp(-1, 1), atol=1e-5)
    assert vae.decode(1000 * z).abs().max() <= 1


def test_decoded_bits_do_not_depend_on_the_batch(vae):
    z = torch.randn(5, 5, 4, 4)
    together = vae.decode(z)
    assert all(torch.equal(vae.decode(z[i : i + 1])[0], together[i]) for i in range(5))


@pytest.mark.parametrize(
    "size, words", [((18, 16), "height 18.*16 or 20"), ((16, 3), "width 3.*use 4"), ((0, 16), "0")]
)
def test_sizes_that_do_not_fit_are_refused(vae, size, words):
    with pytest.raises(ConfigError, match=words):
        vae.encode(torch.zeros(1, 3, *size))


def test_nan_is_an_error_and_never_a_black_picture(vae):
    latents = torch.zeros(2, 5, 4, 4)
    latents[1, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"decoding.*fp32"):
        vae.decode(latents)
    with pytest.raises(NumericsError, match="encoding"):
        vae.encode(torch.full((1, 3, 8, 8), float("inf")))


def test_wrong_latents_class_and_weights_are_refused(vae):
    with pytest.raises(ModelError, match="4 channels, this VAE decodes 5"):
        vae.decode(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ModelError, match="AsymmetricAutoencoderKL"):
        VAE.from_config({"_class_name": "AsymmetricAutoencoderKL"})
    state = dict(vae.module.state_dict())
    del state["decoder.conv_in.weight"]
    with pytest.raises(ModelError, match=r"1 missing \(decoder.conv_in.weight\)"):
        VAE.from_state(CONFIG, state)


def test_weights_with_the_old_names_of_attention_load(vae):
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in vae.module.state_dict().items():
        for now, then in new.items():
            if f".attentions.0.{now}." in name:
                name = name.replace(now, then)
                tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        old[name] = tensor
    assert set(old) != set(vae.module.state_dict())
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(VAE.from_state(CONFIG, old).encode(images), vae.encode(images))
