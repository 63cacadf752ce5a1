"""The denoiser and the training loss, against written-out references and diffusers' schedulers."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from ldm.diffusion.denoiser import denoiser, min_snr_weight, scalings, training_loss, x0_error
from ldm.diffusion.schedule import PREDICTION_TYPES, Schedule
from ldm.errors import ConfigError

COSINE = {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(x, timesteps):
    """Any function of both its inputs."""
    return torch.tanh(x.roll(1, 1) + timesteps.view(-1, 1, 1, 1) / 700) * 1.3 - 0.2 * x


def perfect(schedule, x0, noise):
    """A network that knows the picture and the noise: it answers what the prediction type asks for, at any timestep."""

    def predict(x_in, timesteps):
        if schedule.is_flow:
            return noise - x0
        a, s = (c.view(-1, 1, 1, 1) for c in schedule.alpha_sigma(timesteps.long()))
        return {"epsilon": noise, "sample": x0, "v_prediction": a * noise - s * x0}[schedule.prediction_type]

    return predict


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_network_gives_back_x0_at_every_sigma(prediction_type):
    schedule = Schedule(prediction_type)
    x0, noise = draw(5, 4, 3, 3), draw(5, 4, 3, 3, seed=1)
    sigma = schedule.sigma(torch.tensor([3, 100, 500, 900, 999]))
    x = x0 + sigma.view(-1, 1, 1, 1) * noise
    assert torch.allclose(denoiser(perfect(schedule, x0, noise), schedule)(x, sigma), x0, atol=2e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_network_sees_what_it_was_trained_on(prediction_type):
    schedule = Schedule(prediction_type)
    x0, noise = draw(3, 4, 3, 3), draw(3, 4, 3, 3, seed=1)
    timesteps = torch.tensor([0.123, 0.5, 0.987]) if schedule.is_flow else torch.tensor([3, 500, 987])
    sigma = schedule.sigma(timesteps.double() * 1000 if schedule.is_flow else timesteps)
    seen = []

    def predict(x_in, told):
        seen.append((x_in, told))
        return x_in

    training_loss(predict, schedule, x0, noise, timesteps)
    denoiser(predict, schedule)(x0 + sigma.view(-1, 1, 1, 1) * noise, sigma)
    (trained, told), (sampled, told_then) = seen
    assert torch.allclose(trained, sampled, atol=2e-6)
    assert torch.equal(told, told_then) and told.dtype == torch.float32


@pytest.mark.parametrize("betas", [SD, COSINE], ids=["sd", "cosine zero snr"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_equals_the_one_computed_with_diffusers(prediction_type, betas):
    peer = DDPMScheduler(prediction_type=prediction_type, **betas)
    x0, noise, timesteps = draw(6, 4, 5, 3), draw(6, 4, 5, 3, seed=1), torch.tensor([0, 1, 250, 500, 998, 999])
    raw = network(peer.add_noise(x0, noise, timesteps), timesteps)
    wanted = {"epsilon": noise, "sample": x0, "v_prediction": peer.get_velocity(x0, noise, timesteps)}[prediction_type]
    expected = (raw - wanted).square().mean(dim=(1, 2, 3))
    loss = training_loss(network, Schedule(prediction_type, **betas), x0, noise, timesteps)
    assert loss.shape == (6,) and loss.dtype == torch.float32
    assert torch.allclose(loss, expected, rtol=1e-6, atol=0)


def test_flow_loss_equals_the_written_out_one():
    x0, noise, t = draw(4, 4, 3, 3), draw(4, 4, 3, 3, seed=1), torch.tensor([1e-4, 0.3333, 0.75, 0.9999])
    w = t.view(-1, 1, 1, 1)
    raw = network((1 - w) * x0 + w * noise, torch.tensor([0.0, 333.0, 750.0, 999.0]))
    expected = (raw - (noise - x0)).square().mean(dim=(1, 2, 3))
    assert torch.allclose(training_loss(network, Schedule("flow"), x0, noise, t), expected, rtol=1e-6, atol=0)


def test_a_teachers_answer_is_the_right_one():
    x0, noise, t = draw(3, 4, 3, 3), draw(3, 4, 3, 3, seed=1), torch.tensor([10, 500, 990])
    schedule, scale = Schedule("v_prediction", **SD), torch.ones((), requires_grad=True)
    student, teacher = (lambda x, t: network(x, t) + 0.5), (lambda x, t: scale * network(x, t))
    loss = training_loss(student, schedule, x0, noise, t, teacher=teacher)
    torch.testing.assert_close(loss, torch.full((3,), 0.25))
    assert not loss.requires_grad
    weighted = training_loss(student, schedule, x0, noise, t, snr_gamma=5.0, teacher=teacher)
    own = [training_loss(network, schedule, x0, noise, t, snr_gamma=gamma) for gamma in (None, 5.0)]
    torch.testing.assert_close(weighted / loss, own[1] / own[0])


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_network_has_no_loss(prediction_type):
    schedule = Schedule(prediction_type)
    x0, noise = draw(2, 4, 3, 3), draw(2, 4, 3, 3, seed=1)
    timesteps = torch.tensor([0.1, 0.9]) if schedule.is_flow else torch.tensor([10, 990])
    assert training_loss(perfect(schedule, x0, noise), schedule, x0, noise, timesteps).max() < 1e-12


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_equal_the_published_formula(prediction_type):
    gamma, timesteps = 5.0, torch.arange(0, 1000, 37)
    snr = compute_snr(DDPMScheduler(**SD), timesteps)
    capped = snr.clamp(max=gamma)
    expected = {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}[prediction_type]
    schedule = Schedule(prediction_type, **SD)
    x0, noise = draw(len(timesteps), 2, 2, 2), draw(len(timesteps), 2, 2, 2, seed=1)
    plain = training_loss(network, schedule, x0, noise, timesteps)
    weighted = training_loss(network, schedule, x0, noise, timesteps, snr_gamma=gamma)
    assert torch.allclose(weighted, plain * expected, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_is_finite_at_zero_snr(prediction_type):
    x0, noise, last = draw(2, 2, 2, 2), draw(2, 2, 2, 2, seed=1), torch.tensor([998, 999])
    schedule = Schedule(prediction_type, **COSINE)
    assert schedule.alpha_sigma(last)[0][1] == 0
    raw = torch.zeros_like(x0, requires_grad=True)
    loss = training_loss(lambda x, t: raw, schedule, x0, noise, last, snr_gamma=5.0)
    loss.sum().backward()
    assert loss.isfinite().all() and raw.grad.isfinite().all()
    assert (loss[1] > 0) == (prediction_type == "epsilon")  # the others say nothing about x0 at SNR 0


def test_min_snr_of_flow_weighs_the_error_in_x0():
    t = torch.tensor([1e-4, 0.2, 0.3, 0.5, 0.9, 1 - 1e-6])
    snr = ((1 - t) / t) ** 2
    expected = snr.clamp(max=5.0) * t**2  # the error of x0 = x_t - t * raw is t times that of raw
    assert torch.allclose(min_snr_weight("flow", 1 - t, t, 5.0), expected, rtol=1e-4)


def test_precision_is_decided_in_the_denoiser():
    seen = []

    def predict(x, timesteps):
        seen.append((x.dtype, timesteps.dtype))
        return x

    schedule = Schedule("v_prediction")
    x0 = denoiser(predict, schedule, torch.bfloat16)(draw(2, 4, 3, 3) * 14, torch.full((2,), 14.0))
    assert seen == [(torch.bfloat16, torch.float32)] and x0.dtype == torch.float32


def test_each_row_has_its_own_sigma():
    schedule, x, sigma = Schedule("v_prediction"), draw(3, 4, 3, 3), torch.tensor([0.1, 1.0, 10.0])
    denoise = denoiser(network, schedule)
    alone = torch.cat([denoise(x[i : i + 1], sigma[i : i + 1]) for i in range(3)])
    assert torch.equal(denoise(x, sigma), alone)


def test_unknown_prediction_type_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'epsilon'"):
        scalings("epsilom", torch.ones(1))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_error_of_x0_is_the_v_loss_of_every_prediction_type(prediction_type):
    """A network whose answer stands for x0 + e has the error |e|^2 / sin^2, and with v-prediction that is its loss."""
    betas = {} if prediction_type == "flow" else {"rescale_betas_zero_snr": True}
    schedule = Schedule(prediction_type=prediction_type, beta_schedule="squaredcos_cap_v2", **betas)
    generator = torch.Generator().manual_seed(0)
    x0, noise, wrong = (torch.randn(5, 4, 3, 3, generator=generator) for _ in range(3))
    u = torch.linspace(0.1, 0.95, 5)
    sigma = (torch.pi / 2 * u).tan().view(-1, 1, 1, 1)

    def network(x, timesteps):
        c_skip, c_out, _ = scalings(prediction_type, sigma)
        return (x0 + wrong - c_skip * (x0 + sigma * noise)) / c_out

    expected = wrong.square().mean((1, 2, 3)) * (1 + 1 / sigma.flatten() ** 2)
    assert torch.allclose(x0_error(network, schedule, x0, noise, u), expected, rtol=1e-4)
    if prediction_type == "v_prediction":
        a, s = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        loss = (network(None, None) - (a * noise - s * x0)).square().mean((1, 2, 3))
        assert torch.allclose(loss, expected, rtol=1e-3)
