"""Losses by which a network learns to do without guidance, and in few steps, what its teacher does.

Guidance (Meng et al. 2023, stage one): the student's answer is to be the teacher's with guidance; the loss is
`denoiser.training_loss` with `guided_teacher`.

Steps: the way from noise to image is cut where the sampler will stop (`Segments`), and within a segment the student is
consistent (Heek et al. 2024; Wang et al. 2024): from x at sigma t its x0 leads, by one Euler step in sigma, to the same
x at the segment's lower end s from wherever on the teacher's way it is asked. With t' between s and t:

    x' = D + t'/t (x - D)            the teacher's step from t to t', D its x0 at (x, t)
    D* = l D + (1 - l) D'            D' the target network's x0 at (x', t');  l = s (t - t') / (t' (t - s))

D* is the x0 that from (x, t) leads to s where D' leads from (x', t'); at t' = s it is D. The target network is the
student's average. Shapes:  B images

A cheaper way to few steps, where images need not be given: the teacher draws, and the student learns to cross each
segment of these trajectories in one step (`crossing_loss`). That is progressive distillation (Salimans & Ho 2022) from
many steps to few at once, on the teacher's own x as in Luhman & Luhman 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.device import sent
from ldm.diffusion.denoiser import Denoise, Predict, mean_square
from ldm.diffusion.guidance.guided import classifier_free
from ldm.diffusion.schedule import Schedule

HUBER = 0.00054  # c of the pseudo-Huber distance, for errors of unit size (Song & Dhariwal 2023, section 3.3)


def guided_teacher(both: Callable[[Tensor, Tensor], Tensor], scales: Tensor) -> Predict:
    """The teacher with guidance as predict(x (B, C, H, W), timesteps (B,)) -> raw; scales (B,) on the CPU.

    `both` is its network for 2 B rows, without the prompt and then with it; with no scale above 1 for B rows with it.
    """
    if not bool((scales > 1).any()):
        return both

    def predict(x: Tensor, timesteps: Tensor) -> Tensor:
        w = sent(scales, x.device).view(-1, 1, 1, 1)
        u, c = both(torch.cat([x, x]), torch.cat([timesteps, timesteps])).float().chunk(2)
        return torch.where(w > 1, classifier_free(c, u, w), c)

    return predict


@dataclass(frozen=True)
class Segments:
    """The parts of the way from noise to image that a student crosses in one step each."""

    schedule: Schedule
    sigmas: Tensor  # (n + 1,) descending: where the student's sampler stops

    def at(self, u: Tensor, intervals: int) -> tuple[Tensor, Tensor, Tensor]:
        """u (B,) in [0, 1) -> sigmas (B,) each: t to ask the student at, t' below it, and s, the segment's lower end.

        Within a segment t is as often in each part of the timesteps, its upper end included; t' is by one of so many
        `intervals` of the segment lower, and no lower than s. With betas timesteps are whole numbers.
        """
        count = len(self.sigmas) - 1
        which = (u.double() * count).long().clamp(max=count - 1)
        times = self._times(self.sigmas)
        high, low = times[which], times[which + 1]
        span = high - low
        time = high - (u.double() * count - which) * span
        if not self.schedule.is_flow:
            time = torch.maximum(time.round(), low + 1)
        step = span / intervals if self.schedule.is_flow else (span / intervals).round().clamp(min=1)
        before = time - step
        t = torch.where(time >= high, self.sigmas[which], self.schedule.sigma(time))
        s = self.sigmas[which + 1]
        return t, torch.where(before <= low, s, torch.maximum(self.schedule.sigma(before), s)), s

    def _times(self, sigmas: Tensor) -> Tensor:
        """Timesteps, for flow in [0, T], fp64."""
        sigmas = sigmas.double()
        if self.schedule.is_flow:
            return self.schedule.num_train_timesteps * sigmas / (1 + sigmas)
        return self.schedule.timestep(sigmas).double().round()


def intervals_at(progress: float, first: int, last: int) -> int:
    """Into how many intervals a segment is cut after this share of the training: `first`, doubled up to `last`, each
    number in an equal part of it.

    The interval shrinks from segment / first to segment / last, as in easy consistency tuning (Geng et al. 2024).
    """
    stages = 1 + (-(-last // first) - 1).bit_length()  # first << (stages - 1) is the first that is not below last
    stage = min(int(progress * stages), stages - 1)
    return min(first << stage, last)


def consistency_target(teacher: Denoise, target: Denoise, x: Tensor, t: Tensor, before: Tensor, s: Tensor) -> Tensor:
    """D* (B, C, H, W) for x at sigmas t, t' = `before`, s (B,) each; see above. No gradients."""
    wide = (-1, *[1] * (x.ndim - 1))
    with torch.no_grad():
        found = teacher(x, t)
        if bool((before <= s).all()):
            return found
        ratio = sent((before.double() / t.double()).float(), x.device).view(wide)
        below = target(found + ratio * (x - found), before)
        share = (s.double() * (t.double() - before.double()) / (before.double() * (t.double() - s.double()))).float()
        share = sent(torch.where(before <= s, 1.0, share), x.device).view(wide)
        return torch.where(share == 1, found, share * found + (1 - share) * below)


def consistency_loss(
    student: Denoise,
    teacher: Denoise,
    target: Denoise,
    x0: Tensor,
    noise: Tensor,
    sigmas: tuple[Tensor, Tensor, Tensor],
    huber: float = HUBER,
    mask: Tensor | None = None,
) -> Tensor:
    """(B,) fp32: how far the student's x0 is from D*, by pseudo-Huber's distance.

    x0, noise (B, C, H, W); `sigmas` are t, t' and s of `Segments.at`. Errors of x0 are in units of the v loss (see
    `denoiser.x0_error`), so that no noise level counts for more by its scale. mask (B, 1, H, W) in [0, 1].
    """
    t, before, s = (sigma.float() for sigma in sigmas)
    wide = (-1, *[1] * (x0.ndim - 1))
    level = sent(t, x0.device).view(wide)
    x = x0.float() + level * noise.float()
    wanted = consistency_target(teacher, target, x, t, before, s)
    error = (student(x, t) - wanted) * (1 + level**-2).sqrt()
    return (mean_square(error, mask) + huber**2).sqrt() - huber


def crossing_loss(student: Denoise, x: Tensor, end: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """(B,) fp32: the squared error of the student's x0 against the one that leads from x at sigma t to `end` at s.

    That is by one Euler step in sigma; x, end (B, C, H, W), t > s (B,). In units of the v loss, as in
    `consistency_loss`.
    """
    t, s = t.float(), s.float()
    level, ratio = (sent(value, x.device).view(-1, *[1] * (x.ndim - 1)) for value in (t, s / t))
    wanted = (end.float() - ratio * x.float()) / (1 - ratio)
    return mean_square((student(x, t) - wanted) * (1 + level**-2).sqrt(), None)
