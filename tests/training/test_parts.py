"""The pieces of training, each against what it should be."""

import math

import numpy as np
import pytest
import torch

from ldm.training.data.latent_pool import LatentPool
from ldm.training.loop import seeded
from ldm.training.settings import PIECE, read_settings


class Numbered:
    """Sample i is a 2×2 picture of the colour i, called "i"."""

    def __getitem__(self, index):
        return np.full((2, 2, 3), index % 251, np.uint8), str(index)


def numbered_pool(step, renew=3, workers=0):
    def latents(images):
        return images.float().mean(dim=(1, 2, 3))[:, None]

    def texts(captions):
        return torch.tensor([[float(c)] for c in captions])

    return LatentPool(Numbered(), latents, texts, 3 * PIECE, renew, workers, first_step=step)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_pool_holds_the_same_at_a_step_however_it_came_there(workers):
    walked = numbered_pool(0, workers=workers)
    for step in range(20):
        walked.at(step)
        if step in (0, 7, 8, 9, 19):
            jumped = numbered_pool(step).at(step)
            assert torch.equal(walked.latents, jumped.latents)
            assert torch.equal(walked.texts, jumped.texts)
            assert walked.captions == jumped.captions
    oldest = min(int(c) for c in walked.captions)
    assert oldest == 19 // 3 * PIECE
    assert len(set(walked.captions)) == 3 * PIECE


def test_the_pool_that_is_never_renewed_stays():
    pool = numbered_pool(0, renew=0)
    before = pool.captions.copy()
    assert pool.at(1000).captions == before


def test_keyed_draws_depend_on_every_part_and_on_nothing_else():
    assert torch.equal(seeded.normal((4,), 1, "noise", 2), seeded.normal((4,), 1, "noise", 2))
    draws = [seeded.normal((4,), *k) for k in ((1, "noise", 2), (1, "noise", 3), (2, "noise", 2), (1, "crop", 2))]
    assert len({tuple(d.tolist()) for d in draws}) == 4
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    seeded.uniform((10,), 3, "x")
    assert torch.equal(before, torch.random.get_rng_state())


def test_learning_rate_warms_up_stays_and_falls():
    from ldm.training.loop.schedules import learning_rate

    given = ["vae=x", "text=x", "steps=1000", "learning_rate=1", "warmup=10", "decay_from=0.5", "final_lr=0.1"]
    s = read_settings("emoji/unet", given)
    assert learning_rate(s, 0) == pytest.approx(0.1)
    assert learning_rate(s, 9) == learning_rate(s, 499) == 1
    assert learning_rate(s, 750) == pytest.approx(0.55)
    assert learning_rate(s, 999) == pytest.approx(0.1, abs=0.01)


def test_learning_rate_stays_or_follows_a_cosine():
    from ldm.training.loop.schedules import learning_rate
    from tests.training.toy import toy_settings

    given = {"steps": 110, "learning_rate": 2.0, "warmup": 10, "final_lr": 0.1, "decay_from": 0.0}
    constant, cosine = (toy_settings(lr_schedule=name, **given) for name in ("constant", "cosine"))
    assert [learning_rate(constant, step) for step in (0, 4, 9, 10, 60, 109)] == pytest.approx([0.2, 1, 2, 2, 2, 2])
    assert [learning_rate(cosine, step) for step in (0, 4, 9, 10)] == pytest.approx([0.2, 1, 2, 2])
    assert learning_rate(cosine, 60) == pytest.approx(2 * 0.55)
    assert learning_rate(cosine, 35) == pytest.approx(2 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert learning_rate(cosine, 110) == pytest.approx(0.2)
    rates = [learning_rate(cosine, step) for step in range(10, 110)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(toy_settings(lr_schedule="cosine", warmup=0, steps=1), 0) == pytest.approx(0.05)


def test_ema_in_place():
    from ldm.training.loop.step import update_ema

    a, b = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    with torch.no_grad():
        b.weight.fill_(3)
        b.running_mean.fill_(7)
    update_ema(a, b, 0.75)
    assert a.weight.tolist() == [1.5] * 3
    assert a.running_mean.tolist() == [7.0] * 3


def test_standardized_autoencoder_has_unit_latents_and_the_same_pictures():
    from ldm.training.stages.autoencoder import standardize
    from tests.conftest import tiny_vae

    torch.manual_seed(0)
    vae = tiny_vae()
    for p in vae.module.parameters():
        p.data += 0.05 * torch.randn_like(p)
    x = torch.rand(48, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = vae.module.encode(x).latent_dist
        before = vae.module.decode(posterior.mean).sample
        relative = posterior.std / posterior.mean.std((0, 2, 3))[:, None, None]
        standardize(vae.module, x)
        after = vae.module.encode(x).latent_dist
    assert vae.module.config.scaling_factor == 1.0
    assert after.mean.mean((0, 2, 3)).abs().max() < 1e-4
    assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-3)
    assert torch.allclose(after.std, relative, rtol=1e-3)
    with torch.no_grad():
        assert torch.allclose(vae.module.decode(after.mean).sample, before, atol=1e-4)


def test_crops_are_parts_of_their_pictures():
    from ldm.training.stages.autoencoder import random_crops

    batch = torch.arange(2 * 8 * 8 * 3).view(2, 8, 8, 3)
    crops = random_crops(batch, 4, 3, seed=0, step=1, micro=0)
    assert crops.shape == (6, 4, 4, 3)
    windows = [w for p in batch for w in p.unfold(0, 4, 1).unfold(1, 4, 1).permute(0, 1, 3, 4, 2).reshape(-1, 4, 4, 3)]
    half = len(windows) // 2
    for i, crop in enumerate(crops):
        own = windows[:half] if i < 3 else windows[half:]
        assert any(torch.equal(crop, w) for w in own)


def test_timesteps_are_stratified():
    """Every step's batch has one timestep in each of B equal parts of the range."""
    from ldm.diffusion.schedule import Schedule
    from ldm.training.stages.common import shape_timesteps, timesteps_at

    schedule = Schedule(prediction_type="v_prediction")
    t = timesteps_at(schedule, shape_timesteps((torch.arange(16) + seeded.uniform((16,), 0)) / 16, "uniform", 1))
    assert [int(v) * 16 // 1000 for v in t] == list(range(16))
    even = (torch.arange(1000) + 0.5) / 1000
    t = timesteps_at(schedule, shape_timesteps(even, "logit_normal", 1)).double() / 1000
    logits = torch.log(t / (1 - t))
    assert abs(logits.mean()) < 0.02
    assert abs(logits.std() - 1) < 0.02
    assert math.isfinite(logits.min())
    assert torch.allclose(shape_timesteps(torch.tensor([0.0, 0.25, 0.5]), "uniform", 3), torch.tensor([0.0, 0.5, 0.75]))


def test_stopped_log_is_cut_back(tmp_path):
    from ldm.training.loop.logs import RunLogs

    path = tmp_path / "loss.jsonl"
    log = RunLogs(tmp_path, 0, [])
    for step in range(1, 7):
        log.add(step, float(step), 0.1, 2)
    path.write_text(path.read_text() + '{"step": 8, "lo')
    again = RunLogs(tmp_path, 4, [])
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ['{"step": 2', '{"step": 4']
    again.add(5, 5.0, 0.1, 2)
    again.add(6, math.nan, 0.1, 2)
    assert '"loss": 5.0' in path.read_text().splitlines()[-1]
