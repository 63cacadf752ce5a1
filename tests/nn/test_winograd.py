"""Convolutions by tiles: what the direct sum gives, the same bits in every batch, never of an old weight."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.nn import winograd
from ldm.nn.lora import LowRank, clone_shared_weights, merge, unmerge
from ldm.nn.unet import UNet, UNetConfig
from ldm.nn.winograd import Conv3x3


@pytest.fixture(autouse=True)
def in_a_run(monkeypatch):
    """A convolution by itself is as in a step of a prepared run; the U-Net says so itself."""
    monkeypatch.setattr(winograd.RUN, "tiles", True, raising=False)


WIDE = {"block_out_channels": (64, 96), "layers_per_block": 1, "transformer_layers": (0, 1), "num_heads": (2, 2)}

pytestmark = pytest.mark.skipif(
    winograd._fewest(64, 96, torch.get_num_threads()) is None, reason="this CPU's products depend on the batch"
)


def convolution(channels=64, out=96, seed=0):
    torch.manual_seed(seed)
    layer = Conv3x3(channels, out)
    return layer.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def direct(layer, x):
    """PyTorch's own sum."""
    return nn.Conv2d.forward(layer, x)


def images(count, channels, height, width, seed=1):
    x = torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


def kernel_of(layer):
    layer.refresh()
    return layer.kernel


def drawn(layer, x):
    layer.refresh()
    return layer(x)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("channels", "out"), [(64, 64), (64, 96), (192, 80), (200, 192)])
@pytest.mark.parametrize("size", [(4, 4), (8, 12), (16, 16), (36, 4)])
def test_it_is_the_convolution(channels, out, size):
    layer, x = convolution(channels, out), images(2, channels, *size)
    y, exact = drawn(layer, x), F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    assert y.shape == exact.shape and y.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(y, direct(layer, x))  # it went by tiles
    error, least = ((one - exact).square().mean().sqrt() for one in (y, direct(layer, x)))
    assert error < 4 * least


@pytest.mark.parametrize("place", range(36))
def test_every_place_of_a_patch_counts_exactly_once(place):
    """A picture of a single one: in fp64 the matrices of the algorithm give exactly the kernel's numbers."""
    row, column = divmod(place, 6)
    patch = torch.zeros(6, 6, dtype=torch.float64)
    patch[row, column] = 1
    kernel = torch.arange(1.0, 10, dtype=torch.float64)
    inputs, outputs = (torch.tensor(m, dtype=torch.float64) for m in (winograd.B_T, winograd.A_T))
    moved = (inputs @ patch @ inputs.T).flatten() * (winograd.KERNEL @ kernel)
    found = outputs @ moved.view(6, 6) @ outputs.T
    assert torch.allclose(found, F.conv2d(patch[None, None], kernel.view(1, 1, 3, 3))[0, 0], atol=1e-12)


@pytest.mark.parametrize(("channels", "out"), [(96, 192), (72, 90)])
@pytest.mark.parametrize("size", [(4, 4), (8, 8), (12, 20), (64, 32)])
def test_an_image_has_the_same_bits_in_every_even_batch(size, channels, out, monkeypatch):
    layer, x = convolution(channels, out), images(18, channels, *size)
    whole = drawn(layer, x)
    assert not torch.equal(whole, direct(layer, x))
    for count in range(2, 18, 2):
        assert torch.equal(drawn(layer, x[:count]), whole[:count]), count
        assert torch.equal(drawn(layer, x[-count:]), whole[-count:]), count
    sizes, real = set(), winograd._product
    monkeypatch.setattr(winograd, "_product", lambda p, *more: sizes.add(p.shape[2:4]) or real(p, *more))
    for at_once in (0, 1 << 23, 1 << 30):
        monkeypatch.setattr(winograd, "AT_ONCE", at_once)
        assert torch.equal(drawn(layer, x), whole), at_once
    assert len(sizes) > 1 or size[0] < 64  # parts were of several sizes


def test_products_of_few_rows_are_filled_up():
    patches, kernel = torch.randn(6, 6, 2, 1, 1, 64), torch.randn(36, 64, 70)
    found = [winograd._product(patches, kernel, fewest) for fewest in (2, 4, 8, 32)]
    assert all(one.shape == (16, 2 * 70) and torch.allclose(one, found[0], atol=1e-2) for one in found)


@pytest.mark.parametrize("least", [2, 64])
def test_a_cpu_whose_products_depend_on_the_batch_computes_directly(least, monkeypatch):
    def product(patches, kernel, fewest):
        return real(patches, kernel, fewest) * (1 + 1e-6 * (patches.shape[2] > least))

    real = winograd._product
    monkeypatch.setattr(winograd, "_product", product)
    assert winograd._fewest.__wrapped__(64, 96, 1) is None
    monkeypatch.setattr(winograd, "_fewest", lambda *of: None)
    assert kernel_of(convolution()) is None


def test_more_rows_are_tried_where_few_are_not_enough(monkeypatch):
    def product(patches, kernel, fewest):
        return real(patches, kernel, fewest) * (1 + 1e-6 * (fewest < 16 and patches.shape[2] < 16))

    real = winograd._product
    monkeypatch.setattr(winograd, "_product", product)
    assert winograd._fewest.__wrapped__(64, 96, 1) == 16


@pytest.mark.parametrize("size", [(6, 8), (8, 9), (1, 1), (2, 2)])
def test_pictures_that_are_not_of_whole_tiles_are_computed_directly(size):
    layer, x = convolution(), images(2, 64, *size)
    assert kernel_of(layer) is not None and torch.equal(drawn(layer, x), direct(layer, x))


def test_odd_numbers_of_pictures_other_layouts_and_bf16_are_computed_directly():
    layer, x = convolution(), images(3, 64, 8, 8)
    assert torch.equal(drawn(layer, x), direct(layer, x))
    assert torch.equal(drawn(layer, x[:2].contiguous()), direct(layer, x[:2].contiguous()))
    halves = x[:2].bfloat16()
    assert torch.equal(layer.bfloat16()(halves), direct(layer, halves))  # refreshed before it was cast


def test_layers_of_other_kinds_have_no_kernel(monkeypatch):
    layers = [convolution(32, 96), convolution(96, 32), convolution().bfloat16(), convolution().to("meta")]
    assert [kernel_of(layer) for layer in layers] == [None] * 4
    monkeypatch.setattr(winograd, "LARGEST", 36 * 64 * 96 * 4 - 1)
    assert kernel_of(convolution()) is None


def test_training_gradients_and_autocast_have_none():
    layer, x = convolution(), images(2, 64, 8, 8)
    expected = direct(layer, x)
    assert not torch.equal(drawn(layer, x), expected)
    with torch.enable_grad():
        assert torch.equal(layer(x), expected) and kernel_of(layer) is None
    layer.refresh()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), direct(layer, x)) and kernel_of(layer) is None
    layer.refresh()
    assert torch.equal(layer.train()(x), expected) and kernel_of(layer) is None


def test_a_kernel_is_not_used_once_its_weight_was_written_to():
    layer, x = convolution(), images(2, 64, 8, 8)
    layer.refresh()
    layer.weight.mul_(2)
    assert torch.equal(layer(x), direct(layer, x))
    layer.refresh()
    layer.weight = nn.Parameter(convolution().weight, requires_grad=False)
    assert torch.equal(layer(x), direct(layer, x))


def test_whoever_writes_to_a_weight_the_kernel_is_of_what_it_holds():
    layer, other, x = convolution(), convolution(seed=5), images(2, 64, 8, 8)
    before, expected = drawn(layer, x), drawn(other, x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(drawn(layer, x), expected)
    layer.weight.data.copy_(convolution().weight)  # raises no version
    layer.bias = convolution().bias
    assert torch.equal(drawn(layer, x), before)
    twice = layer.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(drawn(twice, x), drawn(copy.deepcopy(twice), x)) and not torch.equal(drawn(twice, x), before)
    layer.weight = nn.Parameter(convolution().weight, requires_grad=False)
    layer.bias = convolution().bias
    assert torch.equal(drawn(layer, x), before)


def test_a_lora_is_seen_and_taken_away_again():
    net, x = nn.Sequential(convolution()), images(2, 64, 8, 8)
    twin, before = clone_shared_weights(net), drawn(net[0], x)
    kept = merge(net, {"0": [(LowRank(torch.randn(2, 64, 3, 3), torch.randn(96, 2, 1, 1), 2.0), 1.0)]})
    changed = drawn(net[0], x)
    assert torch.allclose(changed, net(x), atol=1e-3) and not torch.allclose(changed, before, atol=0.1)
    assert torch.equal(drawn(twin[0], x), before)
    unmerge(net, kept)
    assert torch.equal(drawn(net[0], x), before)


def test_what_was_made_in_inference_mode_is_of_use_outside_of_it():
    layer, x = convolution(), images(2, 64, 8, 8)
    with torch.inference_mode():
        made = convolution()
        first = drawn(made, x)
        made.weight.mul_(2)
        assert not torch.equal(drawn(made, x), first)
        assert torch.equal(drawn(layer, x), first)
    assert torch.equal(drawn(layer, x), first)


def test_with_other_threads_it_is_tried_again_how_many_rows_are_enough(monkeypatch):
    layer = convolution()
    assert kernel_of(layer).fewest == winograd._fewest(64, 96, torch.get_num_threads())
    monkeypatch.setattr(winograd, "_fewest", lambda channels, out, threads: 1000)
    assert kernel_of(layer).fewest == 1000
    monkeypatch.setattr(winograd, "_fewest", lambda channels, out, threads: None)
    assert kernel_of(layer) is None


def test_a_kernel_is_made_once_and_shared_with_copies_of_its_layer():
    layer = nn.Sequential(convolution())
    kernel = kernel_of(layer[0])
    assert kernel_of(layer[0]) is kernel
    twin = clone_shared_weights(layer)[0]
    assert kernel_of(twin) is kernel and twin.weight is not layer[0].weight
    gone = weakref.ref(kernel.values)
    del layer, twin, kernel
    gc.collect()
    assert gone() is None


def test_a_whole_unet_that_is_prepared_goes_by_tiles_and_keeps_its_bits_in_every_batch():
    torch.manual_seed(0)
    unet = UNet(UNetConfig(in_channels=4, out_channels=4, cross_attention_dim=32, **WIDE)).eval()
    unet.to(memory_format=torch.channels_last)
    x, states, steps = images(9, 4, 16, 24), torch.randn(9, 7, 32), torch.arange(9) * 100.0
    plain = unet(x, steps, states)
    whole = unet(x, steps, states, cache=unet.prepare())
    kernels = [layer.kernel for layer in unet.modules() if isinstance(layer, Conv3x3)]
    assert len(kernels) == 17 and None not in kernels  # all but the first, the last, and the one that halves
    for count in range(1, 9):
        assert torch.equal(unet(x[:count], steps[:count], states[:count], cache=unet.prepare()), whole[:count]), count
    assert not torch.equal(whole, plain) and torch.allclose(whole, plain, atol=2e-4 * plain.std().item())


def test_a_call_outside_of_a_run_has_the_same_bits_whatever_was_drawn_before():
    config = UNetConfig(
        block_out_channels=(64, 64),
        layers_per_block=1,
        transformer_layers=(0, 0),
        num_heads=(4, 4),
        cross_attention_dim=8,
        norm_num_groups=8,
    )
    torch.manual_seed(0)
    unet = UNet(config).eval()
    x, steps, states = torch.randn(2, 4, 16, 16), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 8)
    with torch.no_grad():
        before = unet(x, steps, states)
        cache = unet.prepare()
        assert unet.up_blocks[-1].resnets[0].conv2.kernel is not None
        by_tiles = unet(x, steps, states, cache=cache)
        assert torch.equal(unet(x, steps, states), before) and torch.allclose(by_tiles, before, atol=1e-4)
        assert not torch.equal(by_tiles, before)
