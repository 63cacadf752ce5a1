"""The map from latents to small pictures: exact where a VAE is linear, alike where it is the default one."""

import pytest
import torch
from torch.nn import functional

from ldm import Pipeline
from ldm.checkpoint import load_model
from ldm.images import to_tensor
from ldm.nn.preview import preview, rgb_map, shapes
from ldm.nn.vae import VAE


class Linear(VAE):
    """An autoencoder whose latents are a known mix of the averaged colours."""

    def __init__(self):
        self.factor, self.calls = 4, 0
        self.mix = torch.tensor([[2.0, 0.5, 0.0], [0.0, 1.0, -1.0], [0.3, 0.0, 1.5]])
        self.shift = torch.tensor([0.2, -0.7, 0.1])

    def encode(self, images):
        self.calls += 1
        small = functional.avg_pool2d(images, self.factor)
        return torch.einsum("brhw,cr->bchw", small, self.mix) + self.shift.view(1, 3, 1, 1)


def test_the_map_of_a_linear_autoencoder_is_found_exactly_and_once():
    vae = Linear()
    table = rgb_map(vae)
    inverse = vae.mix.inverse()
    assert torch.allclose(table[:3], inverse.T, atol=1e-5)
    assert torch.allclose(table[3], -inverse @ vae.shift, atol=1e-5)
    picture = shapes(2, 32, seed=5)
    small = preview(vae, vae.encode(picture))
    assert torch.allclose(small, functional.avg_pool2d(picture, 4), atol=1e-5)
    calls = vae.calls
    assert rgb_map(vae) is table and vae.calls == calls


def test_previews_stay_inside_the_range_of_colours():
    vae = Linear()
    found = preview(vae, 100 * torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(0)))
    assert found.shape == (1, 3, 4, 5) and found.min() == -1 and found.max() == 1


def test_shapes_are_coloured_and_the_same_for_the_same_seed():
    first = shapes(3, 24)
    assert torch.equal(first, shapes(3, 24)) and not torch.equal(first, shapes(3, 24, seed=1))
    assert first.shape == (3, 3, 24, 24) and first.min() >= -1 and first.max() <= 1
    assert all(len(picture.flatten(1).unique(dim=1).T) > 10 for picture in first)


@pytest.fixture(scope="module")
def run():
    """(x0 at every step, the finished pictures) of the default model."""
    seen = []
    prompts = ["an apple on a blue background", "a cat on a white background", "a green car on a yellow background"]
    pipe = Pipeline(prompts, dtype="fp32")
    images = pipe.generate(seed=1, num_inference_steps=8, guidance_scale=3, callback=lambda i, x, x0: seen.append(x0))
    return seen, to_tensor(list(images))


def test_previews_of_the_default_model_show_the_picture_from_half_way(run):
    seen, pictures = run
    vae = load_model("default", dtype="fp32").vae
    small = functional.avg_pool2d(pictures, vae.factor)
    for x0 in seen[4:]:
        for one, other in zip(preview(vae, x0), small):
            assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] >= 0.8
