"""Classifier-free guidance: the formula, one batch, no row too many."""

import pytest
import torch
from guidance_cases import Network, Rows

from ldm.diffusion.guidance import cfg
from ldm.errors import ConfigError

X = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
T = torch.tensor([10.0, 500.0, 990.0])
COND, UNCOND = Rows([1.0, 2.0, 3.0]), Rows([0.0, 0.0, -1.0])


def test_both_halves_in_one_batch_give_the_formula():
    network = Network()
    raw = cfg(network, COND, UNCOND, 6.0)(X, T)
    assert network.calls == [6]
    c, u = network(X, T, COND), network(X, T, UNCOND)
    assert torch.allclose(raw, u + 6.0 * (c - u), atol=1e-6)


@pytest.mark.parametrize("scale", [1, 1.0, 0.5, 0.0, -2.0, torch.tensor([1.0, 0.0, 0.3])])
@pytest.mark.parametrize("uncond", [UNCOND, None])
def test_without_guidance_only_the_conditional_half_is_computed(scale, uncond):
    network = Network()
    raw = cfg(network, COND, uncond, scale)(X, T)
    assert network.calls == [3]
    assert torch.equal(raw, network(X, T, COND))


def test_each_picture_may_have_its_own_scale():
    network = Network()
    raw = cfg(network, COND, UNCOND, torch.tensor([1.0, 3.0, 7.5]))(X, T)
    assert network.calls == [6]
    for i, scale in enumerate((1.0, 3.0, 7.5)):
        one = slice(i, i + 1)
        alone = cfg(network, Rows(COND.values[one]), Rows(UNCOND.values[one]), scale)(X[one], T[one])
        assert torch.equal(raw[one], alone)


def test_conditions_are_joined_once_not_at_every_step():
    joined = []

    class Counting(Rows):
        @classmethod
        def cat(cls, parts):
            joined.append(len(parts))
            return super().cat(parts)

    guided = cfg(Network(), Counting(COND.values), Counting(UNCOND.values), 4.0)
    for _ in range(3):
        guided(X, T)
    assert joined == [2]


def test_half_precision_answers_are_combined_in_fp32():
    def predict(x, timesteps, cond):
        return Network()(x, timesteps, cond).to(torch.bfloat16)

    raw = cfg(predict, COND, UNCOND, 6.0)(X, T)
    u, c = predict(X, T, UNCOND).float(), predict(X, T, COND).float()
    assert raw.dtype == torch.float32 and torch.equal(raw, u + 6.0 * (c - u))


@pytest.mark.parametrize(
    "scale, uncond, said",
    [
        (float("nan"), UNCOND, "finite"),
        (float("inf"), UNCOND, "finite"),
        (torch.tensor([2.0, float("nan"), 2.0]), UNCOND, "finite"),
        (torch.tensor([2.0, 3.0]), UNCOND, "for 3 pictures"),
        (torch.ones(3, 1) * 2, UNCOND, "for 3 pictures"),
        (4.0, None, "no for 3"),
        (4.0, Rows([0.0]), "1 for 3"),
    ],
)
def test_bad_scales_and_conditions_are_refused_before_the_network_runs(scale, uncond, said):
    network = Network()
    with pytest.raises(ConfigError, match=said):
        cfg(network, COND, uncond, scale)
    assert network.calls == []
