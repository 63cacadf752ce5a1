"""Every kind of guidance against diffusers' guider or its paper's formula; intervals; rows through the network."""

import dataclasses

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    PerturbedAttentionGuidance,
)
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from guidance_cases import FLOW, FLOW_SIGMAS, SCHEDULE, SIGMAS, STEPS, Network, Rows, inputs_at, x0_of

from ldm.diffusion.guidance import GUIDANCES, Guidance
from ldm.diffusion.guidance.guided import guided_denoiser
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.errors import ConfigError


def draw(seed):
    return torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(seed))


X = draw(0)
COND, UNCOND = Rows([1.0, 2.0, 3.0]), Rows([0.0, 0.0, -1.0])


def guide(network, cond, uncond, guidance, schedule, sigmas):
    """The denoiser of a fresh run, called with one sigma for all rows."""
    denoise = guided_denoiser(network, cond, uncond, guidance, schedule, sigmas)
    return lambda x, sigma: denoise(x, torch.as_tensor(sigma).expand(len(x)))


def run(guidance, step=0, schedule=SCHEDULE, network=None, cond=COND, uncond=UNCOND, x=X):
    """x0 at one step of a fresh run."""
    sigmas = SIGMAS if schedule is SCHEDULE else FLOW_SIGMAS
    return guide(network or Network(), cond, uncond, guidance, schedule, sigmas)(x, sigmas[step])


def answers(step=0, schedule=SCHEDULE):
    inputs = inputs_at(X, (SIGMAS if schedule is SCHEDULE else FLOW_SIGMAS)[step], schedule)
    both = Network()(*inputs, COND), Network()(*inputs, UNCOND)
    return *both, both[0].roll(1, -1)  # c, u, p


def flow_x0(raw, step):
    return x0_of(raw, X, FLOW_SIGMAS[step], FLOW)


def by_guider(guider, *predictions, step=0):
    guider.set_state(step, STEPS, None)
    return guider.forward(*predictions).pred


def test_cfg_and_rescale_equal_diffusers():
    c, u, _ = answers()
    for rescale in (0.0, 0.7, 1.0):
        expected = by_guider(ClassifierFreeGuidance(6.0, guidance_rescale=rescale), c, u)
        assert torch.allclose(run(Guidance(scale=6.0, rescale=rescale)), expected, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 5.0])
@pytest.mark.parametrize("momentum", [0.0, -0.5])
def test_apg_equals_diffusers_step_by_step(eta, threshold, momentum):
    """diffusers adds `scale` times the change to u; its "original formulation" (scale - 1) times to c, as the paper."""
    guider = AdaptiveProjectedGuidance(
        3.0, momentum, threshold, eta=eta, guidance_rescale=0.4, use_original_formulation=True
    )
    guider.momentum_buffer = MomentumBuffer(momentum)
    options = {"apg_eta": eta, "apg_momentum": momentum, "apg_threshold": threshold}
    guidance = Guidance("apg", scale=4.0, rescale=0.4, **options)
    guided = guide(Network(), COND, UNCOND, guidance, SCHEDULE, SIGMAS)
    for step in range(4):
        c, u, _ = answers(step)
        assert torch.allclose(guided(X, SIGMAS[step]), by_guider(guider, c, u, step=step), atol=2e-5)


def test_apg_without_its_changes_is_cfg():
    plain = Guidance("apg", scale=5.0, apg_eta=1.0, apg_momentum=0.0, apg_threshold=0.0)
    assert torch.allclose(run(plain), run(Guidance(scale=5.0)), atol=1e-5)


def test_apg_keeps_nothing_along_the_conditional_answer():
    c, _, _ = answers()
    change = run(Guidance("apg", scale=9.0, apg_momentum=0.0)) - c
    assert ((change * c).sum((1, 2, 3)).abs() < 1e-3).all()
    assert torch.linalg.vector_norm(change.flatten(1), dim=1).max() <= 8 * 15.0


def test_pag_equals_diffusers_and_its_paper():
    c, u, p = answers(1)
    guider = PerturbedAttentionGuidance(6.0, 2.5, 0.0, 1.0, perturbed_guidance_layers=[0], guidance_rescale=0.3)
    expected = by_guider(guider, c, u, p, step=1)
    assert torch.allclose(run(Guidance("pag", scale=6.0, rescale=0.3, pag_scale=2.5), 1), expected, atol=2e-5)
    alone = run(Guidance("pag", scale=1.0, pag_scale=2.5), 1, uncond=None)
    assert torch.allclose(alone, c + 2.5 * (c - p), atol=1e-5)  # the paper; diffusers' guider: p + 2.5 (c - p)


@pytest.mark.parametrize("step", [0, 1, 5])
def test_cfg_zero_of_a_flow_model_equals_diffusers(step):
    c, u, _ = answers(step, FLOW)
    expected = by_guider(ClassifierFreeZeroStarGuidance(6.0, zero_init_steps=2), c, u, step=step)
    guidance = Guidance("cfg_zero", scale=6.0, zero_init_steps=2)
    assert torch.allclose(run(guidance, step, FLOW), flow_x0(expected, step), atol=2e-5)


def test_cfg_zero_of_other_models_takes_the_best_scale_from_the_first_step():
    c, u, _ = answers()
    dot, square = (c * u).sum((1, 2, 3), keepdim=True), (u * u).sum((1, 2, 3), keepdim=True)
    best = dot / square * u
    assert torch.allclose(run(Guidance("cfg_zero", scale=6.0)), best + 6.0 * (c - best), atol=1e-5)
    with pytest.raises(ConfigError, match=r"zero_init_steps: skips steps of flow models, .* is sample"):
        run(Guidance("cfg_zero", zero_init_steps=1))
    run(Guidance("cfg_zero", zero_init_steps=0))


def test_zero_init_leaves_x_as_it_is_without_calling_the_network():
    network = Network()
    guided = guide(network, COND, UNCOND, Guidance("cfg_zero", scale=4.0), FLOW, FLOW_SIGMAS)
    still = flow_x0(torch.zeros_like(X), 0)
    assert torch.equal(guided(X, FLOW_SIGMAS[0]), still) and network.calls == []
    assert not torch.equal(guided(X, FLOW_SIGMAS[1]), flow_x0(torch.zeros_like(X), 1)) and network.calls == [6]


ROWS = {
    "scale 1": (Guidance(scale=1.0), [3] * 10),
    "below 1": (Guidance("apg", scale=0.5), [3] * 10),
    "each at most 1": (Guidance(scale=(1.0, 0.0, 0.7)), [3] * 10),
    "cfg": (Guidance(scale=6.0), [6] * 10),
    "one above 1": (Guidance(scale=(1.0, 0.0, 2.0), rescale=0.5), [6] * 10),
    "apg": (Guidance("apg"), [6] * 10),
    "pag": (Guidance("pag"), [9] * 10),
    "pag alone": (Guidance("pag", scale=1.0), [6] * 10),
    "pag of scale 0": (Guidance("pag", pag_scale=0.0), [6] * 10),
    "interval": (Guidance(interval=(0.25, 0.8)), [3] * 2 + [6] * 6 + [3] * 2),
    "no step in it": (Guidance(interval=(0.31, 0.39)), [3] * 10),
    "pag in an interval": (Guidance("pag", interval=(0.0, 0.5)), [9] * 5 + [3] * 5),
    "sigmas": (Guidance(sigma_interval=(float(SIGMAS[6]), float(SIGMAS[2]))), [3] * 2 + [6] * 4 + [3] * 4),
    "sigmas above": (Guidance("cfg_zero", sigma_interval=(0.0, 1e9)), [6] * 10),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_through_the_network(name):
    guidance, rows = ROWS[name]
    network = Network()
    SAMPLERS["euler"](guided_denoiser(network, COND, UNCOND, guidance, SCHEDULE, SIGMAS), X, SIGMAS)
    assert network.calls == rows


def test_outside_of_the_interval_there_is_the_conditional_answer_alone():
    for kind in GUIDANCES:
        guidance = Guidance(kind, rescale=0.5, interval=(0.5, 1.0))
        for schedule in (SCHEDULE, FLOW):
            c = answers(0, schedule)[0]  # zero-init too is inside alone
            assert torch.equal(run(guidance, 0, schedule), c if schedule is SCHEDULE else flow_x0(c, 0))
            inside = dataclasses.replace(guidance, interval=None)
            assert torch.equal(run(guidance, 6, schedule), run(inside, 6, schedule))


def test_intervals_round_as_diffusers_does():
    c, u, _ = answers()
    for start, stop in ((0.0, 1.0), (0.29, 0.58), (0.1, 0.99), (0.55, 0.56)):
        guided = guide(Network(), COND, UNCOND, Guidance(scale=6.0, interval=(start, stop)), SCHEDULE, SIGMAS)
        for step in range(STEPS):
            c, u, _ = answers(step)
            theirs = by_guider(ClassifierFreeGuidance(6.0, start=start, stop=stop), c, u, step=step)
            assert torch.allclose(guided(X, SIGMAS[step]), theirs, atol=1e-5)


def test_an_evaluation_between_two_steps_counts_to_the_earlier_one():
    network = Network()
    guided = guide(network, COND, UNCOND, Guidance(interval=(0.3, 0.6)), SCHEDULE, SIGMAS)
    for sigma in (SIGMAS[:-2] * SIGMAS[1:-1]).sqrt():
        guided(X, sigma)
    assert network.calls == [3, 3, 3, 6, 6, 6, 3, 3, 3]
    network.calls.clear()
    for sigma in (SIGMAS[0] * 1.1, SIGMAS[-2] / 2):  # before the first and after the last
        guided(X, sigma)
    assert network.calls == [3, 3]


def test_flow_steps_at_the_same_whole_timestep_are_told_apart():
    shifted = Schedule("flow", flow_shift=40.0)
    sigmas = shifted.sigmas(50)
    times = shifted.timestep(sigmas[:-1])
    assert times[0] == times[1] and len(times.unique()) < 50
    network = Network()
    guided = guide(network, COND, UNCOND, Guidance("cfg_zero"), shifted, sigmas)
    assert torch.equal(guided(X, sigmas[0]), x0_of(torch.zeros_like(X), X, sigmas[0], shifted)) and network.calls == []
    guided(X, sigmas[1])
    assert network.calls == [6]


@pytest.mark.parametrize("schedule, sigmas", [(SCHEDULE, SIGMAS), (FLOW, FLOW_SIGMAS)], ids=["sample", "flow"])
@pytest.mark.parametrize("interval", [None, (0.1, 0.2)])
@pytest.mark.parametrize("kind", GUIDANCES)
def test_each_picture_has_its_own_scale_and_the_same_bits_in_any_batch(kind, interval, schedule, sigmas):
    scales, x = (1.0, 3.0, 7.5), torch.randn(3, 4, 90, 100, generator=torch.Generator().manual_seed(1))
    guidance = Guidance(kind, scale=scales, rescale=0.6, interval=interval)
    together = guide(Network(), COND, UNCOND, guidance, schedule, sigmas)
    apart = []
    for i in range(3):
        conditions = (Rows(c.values[i : i + 1]) for c in (COND, UNCOND))
        apart.append(guide(Network(), *conditions, dataclasses.replace(guidance, scale=scales[i]), schedule, sigmas))
    for step in range(3):
        raw = together(x, sigmas[step])
        for i in range(3):
            assert torch.equal(raw[i : i + 1], apart[i](x[i : i + 1], sigmas[step]))


def test_conditions_may_change_with_the_step_and_are_joined_once_each():
    joined = []

    class Counting(Rows):
        @classmethod
        def cat(cls, parts):
            joined.append([float(part.values[0]) for part in parts])
            return super().cat(parts)

    texts = {0: Counting([1.0, 2.0, 3.0]), 4: Counting([5.0, 6.0, 7.0])}
    uncond = Counting([0.0, 0.0, 0.0])
    guided = guide(Network(), lambda step: texts[step // 4 * 4], uncond, Guidance(scale=3.0), SCHEDULE, SIGMAS)
    for step in range(8):
        u, c = (Network()(*inputs_at(X, SIGMAS[step]), cond) for cond in (uncond, texts[step // 4 * 4]))
        assert torch.allclose(guided(X, SIGMAS[step]), u + 3.0 * (c - u), atol=1e-5)
    assert joined == [[0.0, 1.0], [0.0, 5.0]]
    outside = guide(Network(), lambda step: texts[step // 4 * 4], None, Guidance(scale=1.0), SCHEDULE, SIGMAS)
    assert torch.equal(outside(X, SIGMAS[4]), Network()(*inputs_at(X, SIGMAS[4]), texts[4]))


def test_options_are_filled_in_and_belong_to_their_kind():
    assert Guidance("apg").apg_threshold == 15.0 and Guidance("apg").pag_scale is None
    assert Guidance("pag", pag_layers="up.0").pag_layers == ("up.0",)
    assert Guidance(scale=torch.tensor([2, 3])).scale == (2.0, 3.0) and Guidance(scale=torch.tensor(2)).scale == 2.0
    assert {name for kind in GUIDANCES.values() for name in kind.options} < {
        field.name for field in dataclasses.fields(Guidance)
    }


@pytest.mark.parametrize(
    "asked, said",
    [
        ({"kind": "cgf"}, "guidance: unknown guidance 'cgf'; did you mean 'cfg'"),
        ({"kind": None}, "guidance: unknown guidance None"),
        ({"scale": float("nan")}, "guidance_scale: expected a number, got nan"),
        ({"scale": -1}, "guidance_scale: -1 is outside 0 to 1000"),
        ({"scale": "6"}, "guidance_scale: expected a number, got '6'"),
        ({"scale": True}, "guidance_scale: expected a number, got True"),
        ({"scale": ()}, "guidance_scale: the list is empty"),
        ({"scale": [2, float("inf")]}, r"guidance_scale\[1\]: inf is outside"),
        ({"scale": [2, None]}, r"guidance_scale\[1\]: expected a number, got None"),
        ({"rescale": 1.5}, "guidance_rescale: 1.5 is outside 0 to 1"),
        ({"interval": (0.5, 0.5)}, "guidance_interval: 0.5 is not below 0.5"),
        ({"interval": (0, 2)}, "guidance_interval: 2 is outside 0 to 1"),
        ({"interval": 0.5}, "guidance_interval: expected two numbers, from and to, got 0.5"),
        ({"sigma_interval": (1, 2, 3)}, "guidance_sigma_interval: expected two numbers"),
        ({"interval": (0, 1), "sigma_interval": (1, 2)}, "give steps or sigmas, not both"),
        ({"apg_eta": 0.5}, "apg_eta: belongs to guidance 'apg', not 'cfg'"),
        ({"kind": "apg", "pag_scale": 3}, "pag_scale: belongs to guidance 'pag', not 'apg'"),
        ({"kind": "apg", "apg_momentum": 1.0}, "apg_momentum: 1 is outside -0.99 to 0.99"),
        ({"kind": "pag", "pag_layers": ("mid", "left.0")}, "pag_layers: expected mid, down.0"),
        ({"kind": "pag", "pag_layers": []}, "pag_layers: expected mid, down.0"),
        ({"kind": "cfg_zero", "zero_init_steps": 1.5}, "zero_init_steps: expected a whole number"),
    ],
)
def test_bad_settings_are_refused(asked, said):
    with pytest.raises(ConfigError, match=said):
        Guidance(**asked)


@pytest.mark.parametrize(
    "uncond, scale, said", [(None, 4.0, "no for 3"), (Rows([0.0]), 4.0, "1 for 3"), (UNCOND, (2.0, 3.0), "for 3 im")]
)
def test_conditions_and_scales_that_do_not_fit_are_refused_before_the_network_runs(uncond, scale, said):
    network = Network()
    with pytest.raises(ConfigError, match=said):
        guide(network, COND, uncond, Guidance(scale=scale), SCHEDULE, SIGMAS)
    assert network.calls == []
