"""Pipeline.denoiser and Pipeline.attention_maps: the same images as generate's, and maps checked by hand."""

import pytest
import torch

from ldm.diffusion.denoiser import denoiser as plain_denoiser
from ldm.errors import ConfigError
from ldm.nn.attention_maps import averaged, probabilities, recorded
from ldm.nn.unet import UNet, UNetConfig
from ldm.pipeline import Pipeline

FAST = {"num_inference_steps": 3, "sampler": "euler", "seed": 5}


@pytest.fixture
def pipe(tiny_folder):
    return Pipeline("a cat, red", model=tiny_folder)


def pixels(images):
    return [image.tobytes() for image in images]


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1}, {"guidance": "apg"}, {"sampler": "euler_ancestral"}])
def test_a_denoisers_own_run_draws_the_images_of_generate(pipe, settings):
    asked = FAST | settings | {"num_images": 2}
    look = pipe.denoiser(**asked)
    for _ in range(2):  # and again: noise and momentum begin anew
        assert pixels(look.decode(look.sample())) == pixels(pipe.generate(**asked))


def test_one_call_is_the_network_at_that_noise(pipe):
    look = pipe.denoiser(**FAST, num_images=2, guidance_scale=1)
    sigma = torch.tensor([0.5, 3.0])
    x = sigma.view(-1, 1, 1, 1) * look.start
    states = look.model.text.encode(["a cat, red"] * 2).states
    with torch.no_grad():
        expected = plain_denoiser(lambda x, t: look.model.unet(x, t, states), look.schedule)(x, sigma)
    assert torch.allclose(look(x, sigma), expected, atol=1e-5)
    assert not torch.allclose(look(x, 3.0)[0], expected[0], atol=1e-2)


def test_any_sampler_and_noise_levels_may_be_tried(pipe):
    look = pipe.denoiser(**FAST)
    seen = []
    found = look.sample("heun", look.schedule.sigmas(4, "heun"), callback=lambda i, x, x0: seen.append(i))
    assert seen == [0, 1, 2, 3]
    expected = pipe.generate(seed=5, sampler="heun", num_inference_steps=4)
    assert pixels(look.decode(found)) == pixels(expected)


@pytest.mark.parametrize(
    ("prompt", "settings", "what"),
    [
        ("a cat", {"guidance_interval": (0.0, 0.5)}, "a guidance interval needs"),
        ("a cat", {"guidance_sigma_interval": (0.3, 5.0)}, "a guidance interval needs"),
        ("a [cat:dog:0.5]", {}, "a prompt that changes from step to step needs"),
    ],
)
def test_what_acts_step_by_step_needs_one_sigma_for_all(tiny_folder, prompt, settings, what):
    look = Pipeline(prompt, model=tiny_folder).denoiser(**FAST, num_images=2, **settings)
    assert look(look.start, torch.tensor([3.0, 3.0])).shape == look.start.shape
    with pytest.raises(ConfigError, match=f"sigma: the images' sigmas differ, and {what} one step for all"):
        look(look.start, torch.tensor([0.5, 3.0]))
    with pytest.raises(ConfigError, match="3 sigmas for 2 images"):
        look(look.start, torch.tensor([0.5, 3.0, 4.0]))


def test_images_become_latents_and_back(pipe):
    look = pipe.denoiser(**FAST)
    (image,) = pipe.generate(**FAST)
    latents = look.encode(image)
    assert latents.shape == look.start.shape
    assert look.decode(latents)[0].size == image.size


def test_what_a_denoiser_cannot_take_is_refused(pipe, tiny_folder):
    with pytest.raises(ConfigError, match="unknown setting 'strength' of a denoiser"):
        pipe.denoiser(strength=0.5)
    with pytest.raises(ConfigError, match="3 latents, and the denoiser has 1 images"):
        look = pipe.denoiser(**FAST)
        look(look.start.repeat(3, 1, 1, 1), 1.0)
    with pytest.raises(ConfigError, match="as many chunks"):
        Pipeline(["a cat", "a cat BREAK a dog"], model=tiny_folder).denoiser(**FAST)


def test_the_maps_belong_to_the_image_that_generate_draws(pipe):
    before = pixels(pipe.generate(**FAST))
    maps = pipe.attention_maps(**FAST)
    assert pixels([maps.image]) == before == pixels(pipe.generate(**FAST))
    assert maps.words == ("a", "cat", ",", "red")
    assert maps.steps.shape == (3, 4, 4, 4)
    assert (maps.steps > 0).all() and (maps.steps.sum(1) < 1).all()  # the rest goes to start, end and padding
    assert torch.equal(maps["CAT"], maps.steps[:, 1].mean(0))
    assert maps.overlay("cat").size == maps.image.size
    with pytest.raises(ConfigError, match="no word 'car'"):
        maps["car"]


def test_words_of_several_tokens_and_twice_are_added_up(tiny_folder):
    maps = Pipeline("a bird and a cat", model=tiny_folder).attention_maps(**FAST)  # b, i, r and d are tokens
    assert maps.words == ("a", "bird", "and", "a", "cat")
    assert torch.allclose(maps["a"], (maps.steps[:, 0] + maps.steps[:, 3]).mean(0))
    single = Pipeline("a d and a cat", model=tiny_folder).attention_maps(**FAST)
    assert maps["bird"].mean() > 2 * single["d"].mean()  # four tokens


def test_maps_of_several_images_or_of_changing_words_are_refused(pipe, tiny_folder):
    with pytest.raises(ConfigError, match="of one image"):
        pipe.attention_maps(num_images=2, **FAST)
    with pytest.raises(ConfigError, match="change from step to step"):
        Pipeline("a [cat:dog:0.5]", model=tiny_folder).attention_maps(**FAST)


def test_recorded_attention_is_that_of_the_layer():
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(32, 32),
        transformer_layers=(1, 1),
        num_heads=(2, 2),
        layers_per_block=1,
        cross_attention_dim=16,
    )
    unet = UNet(config).eval()
    x, states = torch.randn(2, config.in_channels, 6, 4), torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    with torch.no_grad(), recorded(unet) as layers:
        once = unet(x, torch.tensor([3.0, 3.0]), states, mask=mask)
        assert layers
    with torch.no_grad():
        assert torch.equal(unet(x, torch.tensor([3.0, 3.0]), states, mask=mask), once)
    assert not any(module._forward_hooks for module in unet.modules())
    for found in layers.values():
        assert torch.allclose(found.sum(-1), torch.ones(found.shape[:2]), atol=1e-5)
        assert (found[1, :, 2:] < 1e-6).all()
    maps = averaged(layers, 1, 6, 4)
    assert maps.shape == (5, 6, 4) and torch.allclose(maps.sum(0), torch.ones(6, 4), atol=1e-5)

    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    places = torch.randn(2, 7, 32)
    with torch.no_grad():
        layer.num_heads = 1  # then the mean over heads is the layer's own map
        mixed = probabilities(layer, places, states, mask) @ layer.to_v(states)
        assert torch.allclose(layer.to_out[0](mixed), layer(places, states, mask), atol=1e-5)
