"""Our ControlNet against diffusers': names, shapes, outputs; and its own promises about bits."""

import dataclasses

import pytest
import torch

from ldm.errors import ConfigError, ModelError
from ldm.nn.controlnet import ControlNet, ControlNetConfig, load_controlnet, summed
from ldm.nn.unet import UNet, UNetConfig, load_unet
from tests.nn.test_unet import CONFIGS as UNETS
from tests.nn.test_unet import FIXTURES, inputs, randomised
from tests.nn.test_unet import peer as peer_unet

KINDS = ("sd15", "sd21", "xl")
CONFIGS = {kind: ControlNetConfig(UNETS[kind], 3, (8, 8, 16, 16)) for kind in KINDS}
CONFIGS["bgr"] = dataclasses.replace(CONFIGS["sd15"], channel_order="bgr")
CONFIGS["pooled"] = dataclasses.replace(CONFIGS["sd15"], global_pool_conditions=True)
# without a mask, which diffusers' pooling does not know
CONFIGS["text"] = ControlNetConfig(UNETS["default"], 3, (8, 16, 16, 16))


def peer(config):
    from diffusers import ControlNetModel

    net = randomised(ControlNetModel.from_config(config.to_diffusers())).eval()
    for parameter in net.controlnet_cond_embedding.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # else its eight layers make nothing of any image
    return net


def of_peer(net, x, t, states, image, scale=1.0, guess=False, **extra):
    added = {"text_embeds": extra.get("pooled"), "time_ids": extra.get("time_ids")}
    down, middle = net(x, t, states, image, scale, guess_mode=guess, added_cond_kwargs=added, return_dict=False)
    return [*down, middle]


def image_for(x, seed=3):
    size = (len(x), 3, *(8 * side for side in x.shape[2:]))
    return torch.rand(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", FIXTURES.CONTROLNETS)
def test_names_and_shapes_at_full_width(kind):
    config = ControlNetConfig.from_diffusers(FIXTURES.CONTROLNETS[kind])
    with torch.device("meta"):
        state = ControlNet(config).state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == FIXTURES.read(kind)
    assert ControlNetConfig.from_diffusers(config.to_diffusers()) == config


@pytest.mark.parametrize("kind", CONFIGS)
def test_outputs_equal_diffusers(kind):
    theirs = peer(CONFIGS[kind])
    ours = load_controlnet(CONFIGS[kind], theirs.state_dict())
    for size, scale, guess in (((8, 8), 1.0, False), ((9, 7), 0.7, False), ((8, 8), 0.5, True)):
        x, t, states, extra = inputs(CONFIGS[kind].unet, size=size)
        image = image_for(x)
        with torch.no_grad():
            expected = of_peer(theirs, x, t, states, image, scale, guess, **extra)
            got = ours(x, t, states, image=image, scale=scale, guess=guess, **extra)
            other = ours(x, t, states, image=image.flip(0), scale=scale, guess=guess, **extra)
        assert [one.shape for one in got] == [one.shape for one in expected]
        assert max((a - b).abs().max() / b.abs().max() for a, b in zip(got, expected)) < 1e-5
        assert (got[0] - other[0]).abs().max() > 1e-3  # it looks at the image


@pytest.mark.parametrize("kind", KINDS)
def test_a_unet_with_residuals_equals_diffusers(kind):
    theirs, control = peer_unet(UNETS[kind]), peer(CONFIGS[kind])
    ours, net = load_unet(UNETS[kind], theirs.state_dict()), load_controlnet(CONFIGS[kind], control.state_dict())
    x, t, states, extra = inputs(UNETS[kind])
    image = image_for(x)
    added = {"text_embeds": extra.get("pooled"), "time_ids": extra.get("time_ids")}
    with torch.no_grad():
        *down, middle = of_peer(control, x, t, states, image, **extra)
        more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        expected = theirs(x, t, states, added_cond_kwargs=added, **more).sample
        residuals = net(x, t, states, image=image, **extra)
        assert (ours(x, t, states, residuals=residuals, **extra) - expected).abs().max() < 1e-5
        assert (ours(x, t, states, **extra) - expected).abs().max() > 1e-2
        twice = summed([residuals, net(x, t, states, image=image, scale=-1.0, **extra)])
        assert (ours(x, t, states, residuals=twice, **extra) - ours(x, t, states, **extra)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ("sd15", "text"))
def test_the_same_bits_in_every_batch(kind):
    net = randomised(ControlNet(CONFIGS[kind])).eval()
    x, t, states, _ = inputs(CONFIGS[kind].unet, batch=5)
    image = image_for(x)
    with torch.no_grad():
        together = net(x, t, states, image=image, cache=net.prepare())
        for i in range(5):
            one = slice(i, i + 1)
            alone = net(x[one], t[one], states[one], image=image[one], cache=net.prepare())
            assert all(torch.equal(a, b[one]) for a, b in zip(alone, together))
        doubled = net(*(torch.cat([one, one]) for one in (x, t, states)), image=image)  # two conditions, one image each
        assert all(torch.equal(a, b[5:]) for a, b in zip(together, doubled))


def test_from_a_unet_it_begins_as_nothing():
    unet = randomised(UNet(UNETS["inpaint"])).eval()
    net = ControlNet.from_unet(unet).eval()
    assert torch.equal(net.conv_in.weight, unet.conv_in.weight[:, :4])
    assert torch.equal(net.mid_block.resnets[0].conv1.weight, unet.mid_block.resnets[0].conv1.weight)
    x, t, states, _ = inputs(net.control.unet)
    with torch.no_grad():
        assert all((one == 0).all() for one in net(x, t, states, image=image_for(x)))
    assert ControlNet.from_unet(unet, factor=4).control.conditioning_embedding_out_channels == (16, 32, 96)


def test_what_does_not_fit_is_refused():
    net = ControlNet(CONFIGS["sd15"])
    x, t, states, _ = inputs(CONFIGS["sd15"].unet)
    with pytest.raises(ModelError, match="do not fit latents"):
        net(x, t, states, image=image_for(x)[..., :-8])
    with pytest.raises(ConfigError, match="neither rgb nor bgr"):
        dataclasses.replace(CONFIGS["sd15"], channel_order="hsv")
    with pytest.raises(ModelError, match="resnet_time_scale_shift"):
        ControlNetConfig.from_diffusers({"resnet_time_scale_shift": "scale_shift"})
    with pytest.raises(ModelError, match="1 missing"):
        load_controlnet(CONFIGS["sd15"], dict(list(net.state_dict().items())[1:]))
    assert ControlNetConfig(UNetConfig()).factor == 8
