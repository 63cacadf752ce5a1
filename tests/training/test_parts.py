"""The pieces of training, each against what it should be."""

import math

import numpy as np
import pytest
import torch

from ldm.training.data.encoded import Encoders
from ldm.training.data.scenes import Scenes, SceneSet
from ldm.training.distributed import RowShard
from ldm.training.loop import seeded
from ldm.training.settings import PIECE, DataSettings, read_settings


class Numbered:
    """Sample i is an 8×8 image of the colour i, called "i"."""

    def __getitem__(self, index):
        return np.full((8, 8, 3), index % 251, np.uint8), str(index)


class NumberedSet(SceneSet):
    def samples(self, held_out=False):
        return Numbered()


class Mean:
    """An autoencoder that knows colours alone."""

    def encode(self, x):
        return x.mean((1, 2, 3), keepdim=True)


def numbered_scenes(renew=3, workers=0, dropout=0.0):
    data = DataSettings(resolution=16, caption_dropout=dropout)
    encoders = Encoders.__new__(Encoders)
    encoders.vae, encoders.text, encoders.device = Mean(), None, torch.device("cpu")
    return Scenes(NumberedSet(data, 0, 3 * PIECE, renew, workers, 2, 1), encoders, 16, texts=False)


def rows_at(scenes, step):
    return [(row.id, row.caption, row.latents.item()) for micro in (0, 1) for row in scenes.rows(2 * step + micro)[0]]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_scenes_in_use_at_a_step_are_the_same_however_it_came_there(workers):
    walked, back = numbered_scenes(workers=workers), numbered_scenes(dropout=0.5)
    found = {step: rows_at(walked, step) for step in range(20)}
    walked.close()
    for step in (0, 8, 19, 7):
        assert rows_at(numbered_scenes(), step) == found[step]
        assert [row[::2] for row in rows_at(back, step)] == [row[::2] for row in found[step]]
    numbers = [int(row[0]) for step in range(18, 20) for row in found[step]]
    assert min(numbers) >= 6 * PIECE and max(numbers) < 9 * PIECE
    assert all(abs(value - ((int(name) % 251) / 127.5 - 1)) < 1e-5 for name, _, value in found[19])
    dropped = [caption == "" for step in range(7, 20) for _, caption, _ in rows_at(back, step)]
    assert 0.4 < sum(dropped) / len(dropped) < 0.6


def test_scenes_that_are_never_renewed_stay():
    scenes = numbered_scenes(renew=0)
    assert {int(row[0]) for step in range(0, 1000, 7) for row in rows_at(scenes, step)} <= set(range(3 * PIECE))


def test_keyed_draws_depend_on_every_part_and_on_nothing_else():
    assert torch.equal(seeded.normal((4,), 1, "noise", 2), seeded.normal((4,), 1, "noise", 2))
    draws = [seeded.normal((4,), *k) for k in ((1, "noise", 2), (1, "noise", 3), (2, "noise", 2), (1, "crop", 2))]
    assert len({tuple(d.tolist()) for d in draws}) == 4
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    seeded.uniform((10,), 3, "x")
    assert torch.equal(before, torch.random.get_rng_state())


def test_learning_rate_warms_up_stays_and_falls():
    from ldm.training.loop.optimizers import learning_rate

    given = ["vae=x", "text=x", "steps=1000", "learning_rate=1", "warmup=10", "decay_from=0.5", "final_lr=0.1"]
    s = read_settings("emoji/unet", given)
    assert learning_rate(s, 0) == pytest.approx(0.1)
    assert learning_rate(s, 9) == learning_rate(s, 499) == 1
    assert learning_rate(s, 750) == pytest.approx(0.55)
    assert learning_rate(s, 999) == pytest.approx(0.1, abs=0.01)


def test_learning_rate_stays_or_follows_a_cosine():
    from ldm.training.loop.optimizers import learning_rate
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
    vae = tiny_vae(shift_factor=0.3)
    for p in vae.module.parameters():
        p.data += 0.05 * torch.randn_like(p)
    x = torch.rand(48, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = vae.module.encode(x).latent_dist
        before = vae.module.decode(posterior.mean).sample
        relative = posterior.std / posterior.mean.std((0, 2, 3))[:, None, None]
        standardize(vae.module, x)
        after = vae.module.encode(x).latent_dist
    assert vae.module.config.scaling_factor == 1.0 and vae.module.config.shift_factor is None
    assert after.mean.mean((0, 2, 3)).abs().max() < 1e-4
    assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-3)
    assert torch.allclose(after.std, relative, rtol=1e-3)
    with torch.no_grad():
        assert torch.allclose(vae.module.decode(after.mean).sample, before, atol=1e-4)


@pytest.mark.parametrize("lacks", [("use_quant_conv", "use_post_quant_conv"), ("use_post_quant_conv",)])
def test_an_autoencoder_without_1x1_convolutions_gets_a_scale_and_a_shift(lacks):
    from ldm.nn.vae import VAE
    from ldm.training.stages.autoencoder import standardize
    from tests.conftest import tiny_vae

    torch.manual_seed(0)
    module = tiny_vae(shift_factor=0.3, **dict.fromkeys(lacks, False)).module
    for p in module.parameters():
        p.data += 0.05 * torch.randn_like(p)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.rand(16, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = module.decode(module.encode(x).latent_dist.mean).sample
        standardize(module, x)
        latents, _ = VAE(module).moments(x)
        decoded = module.decode(latents / module.config.scaling_factor + module.config.shift_factor).sample
    assert abs(latents.mean()) < 1e-4 and abs(latents.std() - 1) < 1e-4
    assert torch.allclose(decoded, expected, atol=1e-4)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


def test_crops_are_parts_of_their_pictures():
    from ldm.training.stages.autoencoder import random_crops

    batch = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8)
    crops, part = random_crops(batch, RowShard(2), 4, 3, seed=0, step=1, micro=0)
    assert crops.shape == (6, 3, 4, 4) and part == RowShard(6)
    windows = [w for p in batch for w in p.unfold(1, 4, 1).unfold(2, 4, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 4, 4)]
    half = len(windows) // 2
    for i, crop in enumerate(crops):
        own = windows[:half] if i < 3 else windows[half:]
        assert any(torch.equal(crop, w) for w in own)
    second, part = random_crops(batch[1:], RowShard(2, (1,), 1.0), 4, 3, seed=0, step=1, micro=0)
    assert torch.equal(second, crops[3:]) and part == RowShard(6, (3, 4, 5), 1.0)


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
