"""Deep features that later calls reuse: what is computed, when, and that an image has its bits in every batch."""

import pytest
import torch

from ldm.nn.step_cache import StepCache
from ldm.nn.unet import UNet
from tests.nn.test_unet import CONFIGS, inputs, randomised

KINDS = ("sd15", "xl", "default")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_deep_levels_are_those_of_the_call_before(kind):
    unet = randomised(UNet(CONFIGS[kind])).eval()
    x, t, states, extra = inputs(CONFIGS[kind])
    other, later = x + 0.3, t * 0.9
    cache = StepCache(2)
    assert torch.equal(unet(x, t, states, deep=cache, **extra), unet(x, t, states, **extra))
    found = unet(other, later, states, deep=cache, **extra)
    exact = unet(other, later, states, **extra)
    assert not torch.equal(found, exact)
    kept, last = [], unet.up_blocks[-2].upsamplers[0]
    hook = last.register_forward_hook(lambda module, given, out: kept.append(out))
    unet(x, t, states, **extra)
    hook.remove()
    hook = last.register_forward_hook(lambda module, given, out: kept[0])
    assert torch.equal(found, unet(other, later, states, **extra))  # the exact network with those features put in
    hook.remove()
    assert torch.equal(unet(other, later, states, deep=cache, **extra), exact)  # the third call is whole again


@torch.no_grad()
def test_it_is_made_anew_every_nth_call_and_for_other_texts_and_rows():
    unet, calls = randomised(UNet(CONFIGS["default"])).eval(), []
    unet.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append(1))
    x, t, states, _ = inputs(CONFIGS["default"], batch=4)
    cache = StepCache(3)

    def whole(*given):
        before = len(calls)
        unet(*given, deep=cache)
        return len(calls) > before

    assert [whole(x, t, states) for _ in range(7)] == [True, False, False, True, False, False, True]
    half = states[:2]
    assert whole(x[:2], t[:2], half) and not whole(x[:2], t[:2], half) and whole(x[:2], t[:2], half + 1)
    every = StepCache(1)
    before = len(calls)
    for _ in range(3):
        unet(x, t, states, deep=every)
    assert len(calls) == before + 3


@torch.no_grad()
def test_bits_do_not_depend_on_the_batch():
    unet = randomised(UNet(CONFIGS["default"])).eval()
    x, t, states, _ = inputs(CONFIGS["default"], batch=5)

    def drawn(rows):
        cache, kept = StepCache(2), states[rows]
        first = unet(x[rows], t[rows], kept, deep=cache)
        return unet(first, t[rows] / 2, kept, deep=cache)

    together = drawn(slice(0, 5))
    assert all(torch.equal(drawn(slice(i, i + 1))[0], together[i]) for i in range(5))
