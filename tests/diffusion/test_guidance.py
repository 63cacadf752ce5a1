"""Classifier-free guidance: the formula, one batch, no row too many."""

import pytest
import torch
from guidance_cases import SCHEDULE, SIGMAS, Network, Rows, inputs_at

from ldm.diffusion.guidance import Guidance
from ldm.diffusion.guidance.guided import guided_denoiser, step_at
from ldm.errors import ConfigError

X = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
SIGMA = SIGMAS[3]
COND, UNCOND = Rows([1.0, 2.0, 3.0]), Rows([0.0, 0.0, -1.0])


def guided(network, cond, uncond, scale, x=X, calls=1):
    denoise = guided_denoiser(network, cond, uncond, Guidance(scale=scale), SCHEDULE, SIGMAS)
    for _ in range(calls):
        raw = denoise(x, SIGMA.expand(len(x)))
    return raw


def answer(cond, x=X):
    return Network()(*inputs_at(x, SIGMA), cond)


def test_both_halves_in_one_batch_give_the_formula():
    network = Network()
    raw = guided(network, COND, UNCOND, 6.0)
    assert network.calls == [6]
    c, u = answer(COND), answer(UNCOND)
    assert torch.allclose(raw, u + 6.0 * (c - u), atol=1e-6)


@pytest.mark.parametrize("scale", [1, 1.0, 0.5, 0.0, (1.0, 0.0, 0.3)])
@pytest.mark.parametrize("uncond", [UNCOND, None])
def test_without_guidance_only_the_conditional_half_is_computed(scale, uncond):
    network = Network()
    raw = guided(network, COND, uncond, scale)
    assert network.calls == [3]
    assert torch.equal(raw, answer(COND))


def test_each_image_may_have_its_own_scale():
    network = Network()
    raw = guided(network, COND, UNCOND, (1.0, 3.0, 7.5))
    assert network.calls == [6]
    for i, scale in enumerate((1.0, 3.0, 7.5)):
        one = slice(i, i + 1)
        alone = guided(network, Rows(COND.values[one]), Rows(UNCOND.values[one]), scale, X[one])
        assert torch.equal(raw[one], alone)


def test_conditions_are_joined_once_not_at_every_step():
    joined = []

    class Counting(Rows):
        @classmethod
        def cat(cls, parts):
            joined.append(len(parts))
            return super().cat(parts)

    guided(Network(), Counting(COND.values), Counting(UNCOND.values), 4.0, calls=3)
    assert joined == [2]


def test_half_precision_answers_are_combined_in_fp32():
    def predict(x, timesteps, cond):
        return Network()(x, timesteps, cond).to(torch.bfloat16)

    raw = guided(predict, COND, UNCOND, 6.0)
    u, c = answer(UNCOND).to(torch.bfloat16).float(), answer(COND).to(torch.bfloat16).float()
    assert raw.dtype == torch.float32 and torch.equal(raw, u + 6.0 * (c - u))


@pytest.mark.parametrize(
    "scale, uncond, said",
    [((2.0, 3.0), UNCOND, "for 3 images"), (4.0, None, "no for 3"), (4.0, Rows([0.0]), "1 for 3")],
)
def test_scales_and_conditions_that_do_not_fit_are_refused_before_the_network_runs(scale, uncond, said):
    network = Network()
    with pytest.raises(ConfigError, match=said):
        guided(network, COND, uncond, scale)
    assert network.calls == []


def test_the_step_of_a_sigma():
    levels = [9.0, 4.0, 1.0]
    sigmas = (12.0, 9.0, 8.9, 4.0, 2.0, 1.0, 0.5)
    assert [step_at(sigma, levels) for sigma in sigmas] == [0, 0, 0, 1, 1, 2, 2]
