"""Tiles: their places and weights, exactness where nothing reaches across them, and seams that are not seen."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from ldm.checkpoint import load_model
from ldm.diffusion.denoiser import denoiser, sample
from ldm.nn.tiling import SharedNorm, ramp, spans, through_tiles

PROMPTS = ("an apple on a blue background", "a green frog on a yellow background")
SMALL = 16  # a tile's side here: as large as the pictures that the default model was trained on


@pytest.mark.parametrize("length", [1, 15, 16, 17, 30, 31, 32, 33, 64, 100, 257])
@pytest.mark.parametrize("tile, overlap", [(16, 4), (16, 8), (16, 0), (8, 1)])
def test_tiles_cover_everything_overlap_enough_and_their_weights_leave_no_gap(length, tile, overlap):
    places = spans(length, tile, overlap)
    assert places[0][0] == 0 and places[-1][1] == length
    assert all(end - start == min(tile, length) for start, end in places)
    assert all(before[1] - after[0] >= overlap for before, after in pairwise(places))
    if overlap:
        weights = torch.zeros(length * 2)
        for start, end in places:
            weights[2 * start : 2 * end] += ramp(start, end, length, overlap, 2)
        assert weights.min() > 0


def test_what_does_not_reach_across_tiles_is_exact_both_ways():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 3, 1))
    x = torch.randn(1, 3, 37, 50)
    with torch.no_grad():
        up = through_tiles(
            lambda m, part: m(part).repeat_interleave(2, -1).repeat_interleave(2, -2), module, x, 1, 2, 16
        )
        assert torch.allclose(up, module(x).repeat_interleave(2, -1).repeat_interleave(2, -2), atol=1e-6)
        wide = x[..., :36, :48]
        down = through_tiles(lambda m, part: nn.functional.avg_pool2d(m(part), 2), module, wide, 2, 1, 8)
        assert torch.allclose(down, nn.functional.avg_pool2d(module(wide), 2), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 8, 5, 7), (1, 8, 12)])
def test_a_shared_norm_keeps_its_first_statistics(shape):
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    first, other = torch.randn(shape) * 3 + 1, torch.randn(shape)
    shared = SharedNorm(norm)
    with torch.no_grad():
        assert torch.equal(shared(first), norm(first))
        assert torch.allclose(shared(first), norm(first), atol=1e-5)
        groups = first.reshape(4, -1)
        mean, std = groups.mean(1), (groups.var(1, correction=0) + norm.eps).sqrt()
        line = (mean.repeat_interleave(2), std.repeat_interleave(2), norm.weight, norm.bias)
        mean, std, weight, bias = (v.view(1, 8, *[1] * (len(shape) - 2)) for v in line)
        assert torch.allclose(shared(other), (other - mean) / std * weight + bias, atol=1e-5)


@pytest.fixture(scope="module")
def drawn():
    """(the default VAE, latents (2, C, 2 SMALL, 2 SMALL) that its model drew, the pictures decoded at once)."""
    model = load_model("default", dtype="fp32")
    cond = model.text.encode(list(PROMPTS))
    size = (model.vae.latent_channels, 2 * SMALL, 2 * SMALL)
    start = torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])

    def predict(x, timesteps):
        return model.unet(x, timesteps, cond.states, mask=cond.mask, pooled=cond.pooled)

    with torch.no_grad():
        latents = sample(
            denoiser(predict, model.schedule), model.schedule, model.schedule.sigmas(6, "euler"), start, "euler"
        )
        return model.vae, latents, model.vae.decode(latents)


@pytest.fixture(scope="module")
def tiled(drawn):
    vae, latents, _ = drawn
    with torch.no_grad():
        return vae.decode(latents, tile=SMALL)


def test_tiles_as_large_as_the_picture_change_no_bit(drawn):
    vae, latents, whole = drawn
    assert torch.equal(vae.decode(latents, tile=2 * SMALL), whole)


def test_tiles_are_close_to_the_whole_picture_and_their_module_is_as_it_was(drawn, tiled):
    vae, latents, whole = drawn
    apart = (tiled - whole).abs() * 127.5  # of 255
    assert apart.mean() < 2 and apart.max() < 40  # measured 0.9 and 19
    assert not any(isinstance(module, SharedNorm) for module in vae.module.modules())
    assert torch.equal(vae.decode(latents[:1]), whole[:1])
    assert torch.equal(vae.decode(latents[1:], tile=SMALL), tiled[1:])


def test_no_seam_is_steeper_than_the_rest_of_the_picture(drawn, tiled):
    vae, _, whole = drawn
    places = spans(2 * SMALL, SMALL, SMALL // 2)
    edges = {end for _, end in places[:-1]} | {start for start, _ in places[1:]}
    seams = [edge * vae.factor - 1 for edge in sorted(edges)]  # between this pixel and the next

    def steepness(pictures):
        """Of the seams, and of everything else; across and down together."""
        across = pictures.diff(dim=-1).abs().mean((0, 1, 2))
        down = pictures.diff(dim=-2).abs().mean((0, 1, 3))
        other = torch.ones(len(across), dtype=torch.bool)
        other[seams] = False
        return (across[seams] + down[seams]).mean(), (across[other] + down[other]).mean()

    seam, elsewhere = steepness(tiled)
    before, _ = steepness(whole)
    assert seam <= 1.1 * elsewhere  # of the picture as it is
    assert seam <= 1.1 * before  # of the same places where there are no tiles


def test_encoding_in_tiles_is_close_to_encoding_at_once(drawn):
    vae, _, whole = drawn
    with torch.no_grad():
        mean, std = vae.moments(whole[:1], tile=SMALL)
        exact, spread = vae.moments(whole[:1])
    assert mean.shape == exact.shape
    assert (mean - exact).square().mean().sqrt() < 0.08 * exact.std()  # measured 0.04
    assert (std - spread).abs().mean() < 0.15 * spread.mean()  # measured 0.10
