"""What a student is asked to answer: against loops written out from the papers, on trajectories known exactly."""

import copy
import math

import pytest
import torch

from ldm.diffusion.denoiser import denoiser, training_loss
from ldm.diffusion.distillation import (
    HUBER,
    Segments,
    consistency_loss,
    consistency_target,
    crossing_loss,
    guided_teacher,
    intervals_at,
)
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.samplers.base import absent
from ldm.diffusion.schedule import Schedule

STEPS = 200  # of training
SCHEDULES = {
    "epsilon": Schedule(prediction_type="epsilon"),
    "v": Schedule(prediction_type="v_prediction"),
    "v, zero terminal SNR": Schedule(prediction_type="v_prediction", rescale_betas_zero_snr=True, spacing="trailing"),
    "flow": Schedule(prediction_type="flow"),
    "flow, shifted": Schedule(prediction_type="flow", flow_shift=3.0),
}


def segments(schedule, count=4):
    return Segments(schedule, schedule.sigmas(count, "ddim", None if schedule.is_flow else "trailing"))


def network(seed, scale=0.3):
    """A small answer that depends on everything."""
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)) * scale

    def predict(x, timesteps):
        return torch.einsum("oc,bchw->bohw", weight, x).tanh() + timesteps.view(-1, 1, 1, 1) / 1000

    return predict


def data(batch=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 4, 5, generator=g), torch.randn(batch, 3, 4, 5, generator=g)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_guidance_is_learned_from_the_teachers_guided_answer(kind):
    schedule, (x0, noise) = SCHEDULES[kind], data()
    with_prompt, without, student = network(1), network(2), network(3)
    scales = torch.tensor([1.0, 2.0, 4.0, 7.5, 0.5, 3.0])
    teacher = guided_teacher(lambda x, t: torch.cat([without(x[:6], t[:6]), with_prompt(x[6:], t[6:])]), scales)
    times = torch.linspace(0.1, 0.9, 6) if schedule.is_flow else torch.arange(100, 1000, 150)
    found = training_loss(student, schedule, x0, noise, times, teacher=teacher)
    for i in range(6):
        alpha, sigma = (c[i].item() for c in schedule.alpha_sigma(times))
        x, t = alpha * x0[i : i + 1] + sigma * noise[i : i + 1], schedule.network_timesteps(times)[i : i + 1]
        c, u, w = with_prompt(x, t), without(x, t), scales[i].item()
        wanted = u + w * (c - u) if w > 1 else c
        assert math.isclose(found[i], (student(x, t) - wanted).square().mean(), rel_tol=1e-5)


def test_a_teacher_that_needs_no_guidance_is_asked_once():
    x0, _ = data()
    asked = []
    guided_teacher(lambda x, t: asked.append(len(x)), torch.tensor([1.0] * 6))(x0, torch.zeros(6))
    assert asked == [6]


@pytest.mark.parametrize("intervals", [1, 2, 16])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_levels_lie_in_their_segment_and_the_sampler_visits_its_ends(kind, intervals):
    schedule = SCHEDULES[kind]
    parts = segments(schedule)
    u = torch.arange(400) / 400
    t, before, s = parts.at(u, intervals)
    which = (u.double() * 4).long()
    assert torch.equal(s, parts.sigmas[which + 1]) and (before >= s).all() and (t > before).all()
    assert (t <= parts.sigmas[which]).all() and torch.equal(t[::100], parts.sigmas[:4])  # the first is the upper end
    if intervals == 1:
        assert torch.equal(before, s)
    else:
        times, total = (t / (1 + t), 1) if schedule.is_flow else (schedule.timestep(t), 1000)
        ends = parts.sigmas / (1 + parts.sigmas) if schedule.is_flow else schedule.timestep(parts.sigmas)
        earlier = before / (1 + before) if schedule.is_flow else schedule.timestep(before)
        whole = before > s
        step = ((ends[which] - ends[which + 1]) / intervals)[whole]
        assert ((times - earlier)[whole] - step).abs().max() <= 0.003 * total


def test_the_interval_shrinks_to_the_last():
    assert [intervals_at(i / 10, 1, 16) for i in range(10)] == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16]
    assert [intervals_at(p, 2, 6) for p in (0, 0.34, 0.67, 1.0)] == [2, 4, 6, 6]
    assert intervals_at(0.5, 3, 3) == 3
    for first, last, seen in ((3, 16, [3, 6, 12, 16]), (5, 8, [5, 8]), (3, 4, [3, 4]), (1, 5, [1, 2, 4, 5])):
        count = len(seen)
        assert [intervals_at((i + 0.5) / count, first, last) for i in range(count)] == seen


def in_network_scale(schedule, predict, x, sigma):
    """x0 from the network's answer, written out once more: x = alpha x0 + s noise, all in the network's own scale."""
    kind = schedule.prediction_type
    alpha = 1 / (1 + sigma) if kind == "flow" else 1 / math.sqrt(1 + sigma**2)
    z, s = alpha * x, alpha * sigma
    raw = predict(z, schedule.timestep(torch.tensor([sigma])))
    if kind == "epsilon":
        return (z - s * raw) / alpha
    return alpha * z - s * raw if kind == "v_prediction" else z - s * raw


@pytest.mark.parametrize("intervals", [1, 4])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_consistency_equals_a_plain_loop(kind, intervals):
    schedule, (x0, noise) = SCHEDULES[kind], data(8)
    student, teacher, target = network(1), network(2), network(3)
    sigmas = segments(schedule).at((torch.arange(8) + 0.37) / 8, intervals)
    three = (denoiser(one, schedule) for one in (student, teacher, target))
    found = consistency_loss(*three, x0, noise, sigmas)
    for i in range(8):
        t, before, s = (float(sigma[i]) for sigma in sigmas)
        x = x0[i : i + 1] + t * noise[i : i + 1]
        mine = in_network_scale(schedule, student, x, t)
        theirs = in_network_scale(schedule, teacher, x, t)
        below = theirs + before / t * (x - theirs)
        end = below
        if before > s:
            deeper = in_network_scale(schedule, target, below, before)
            end = deeper + s / before * (below - deeper)
        wanted = (end.double() - s / t * x.double()) / (1 - s / t)  # the x0 that leads from x to `end`
        unit = math.sin(math.atan(t))
        square = ((mine.double() - wanted) / unit).square().mean()
        assert math.isclose(found[i], math.sqrt(square + HUBER**2) - HUBER, rel_tol=5e-3), (i, t, before, s)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_what_the_teachers_way_ends_in_is_a_fixed_point(kind):
    """Where all data is one image the way is a straight line: its x0 is right everywhere, and costs nothing."""
    schedule, (x0, noise) = SCHEDULES[kind], data(8)

    def exact(x, sigma):
        return x0

    sigmas = segments(schedule).at((torch.arange(8) + 0.5) / 8, 8)
    assert consistency_loss(exact, exact, exact, x0, noise, sigmas).abs().max() < 1e-6
    off = consistency_loss(lambda x, sigma: x0 + 0.1, exact, exact, x0, noise, sigmas)
    assert (off > 0.09).all()


def test_targets_have_no_gradient_and_masks_leave_places_out():
    schedule, (x0, noise) = SCHEDULES["flow"], data(4)
    weight = torch.ones((), requires_grad=True)
    learned = denoiser(lambda x, t: weight * x, schedule)
    sigmas = segments(schedule).at((torch.arange(4) + 0.5) / 4, 4)
    assert not consistency_target(learned, learned, x0, *sigmas).requires_grad
    mask = torch.zeros(4, 1, 4, 5)
    mask[..., :2] = 1
    changed = torch.where(mask.bool(), x0, x0 + 9)  # seen by nobody: these answers are made place by place
    one, other = (consistency_loss(learned, learned, learned, x, noise, sigmas, mask=mask) for x in (x0, changed))
    assert torch.allclose(one, other) and one.requires_grad


def test_a_student_learns_to_land_where_the_teachers_long_way_does():
    """Gaussian data, whose x0 is known exactly: four steps of the student against four and 200 of the teacher."""
    schedule = SCHEDULES["flow"]
    parts, generator = segments(schedule), torch.Generator().manual_seed(0)

    def teacher(x, sigma):
        return x * 0.25 / (0.25 + sigma.view(-1, 1, 1, 1) ** 2)  # E[x0 | x] of standard deviation 0.5

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.SiLU(), torch.nn.Linear(32, 32), torch.nn.SiLU())
    net.append(torch.nn.Linear(32, 1))
    torch.nn.init.zeros_(net[-1].weight), torch.nn.init.zeros_(net[-1].bias)
    average = copy.deepcopy(net)

    def student(of):
        def denoise(x, sigma):
            t = (sigma / (1 + sigma)).view(-1, 1, 1, 1).expand_as(x)
            return teacher(x, sigma) + t * of(torch.cat([x * (1 - t), t, teacher(x, sigma)], dim=-1))

        return denoise

    def landing(denoise, sigmas):
        with torch.no_grad():
            noise = torch.randn(512, 1, 1, 1, generator=torch.Generator().manual_seed(1))
            return SAMPLERS["ddim"](denoise, schedule.initial(noise, sigmas, "ddim"), sigmas, absent, None)

    def error(denoise):
        return (landing(denoise, parts.sigmas) - goal).square().mean().sqrt()

    goal = landing(teacher, schedule.sigmas(200, "ddim"))
    optimizer, before = torch.optim.Adam(net.parameters(), lr=5e-3), error(teacher)
    for step in range(STEPS):
        x0 = torch.randn(128, 1, 1, 1, generator=generator) / 2
        noise = torch.randn(128, 1, 1, 1, generator=generator)
        sigmas = parts.at(
            (torch.arange(128) + torch.rand(128, generator=generator)) / 128, intervals_at(step / STEPS, 1, 16)
        )
        loss = consistency_loss(student(net), teacher, student(average), x0, noise, sigmas).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        for old, new in zip(average.parameters(), net.parameters()):
            old.data.lerp_(new.data, 0.1)
    assert error(student(average)) < 0.5 * before


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_segment_is_crossed_where_one_step_of_the_sampler_ends_as_the_teachers_way(kind):
    schedule, (x, end) = SCHEDULES[kind], data()
    sigmas = segments(schedule).sigmas[:-1]  # four; the last ends at 0
    t, s = sigmas[[0, 1, 2, 0, 1, 3]], torch.cat([sigmas[[1, 2, 3, 2, 3]], torch.zeros(1)])
    x = x * t.view(-1, 1, 1, 1).clamp(max=100)  # at infinity nothing but noise is left to compare
    predict = network(3)
    found = crossing_loss(denoiser(predict, schedule), x, end, t, s)
    for i in range(6):
        sigma, down = t[i].item(), s[i].item()
        row = x[i : i + 1].double()
        x0 = in_network_scale(schedule, lambda z, at: predict(z.float(), at).double(), row, sigma)
        landed = x0 + down / sigma * (row - x0)  # Euler's step
        wanted = (landed - end[i]).square().mean() / (1 - down / sigma) ** 2 * (1 + sigma**-2)
        assert math.isclose(found[i], wanted, rel_tol=2e-3)
    with torch.no_grad():  # what it steps onto has no loss
        known = denoiser(predict, schedule)(x, t)
        step = known + (s / t).view(-1, 1, 1, 1) * (x - known)
        assert crossing_loss(denoiser(predict, schedule), x, step, t, s).max() < 1e-6
