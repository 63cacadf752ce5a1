"""Settings that change what a step learns or what is averaged and told of it, each against its formula."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.diffusion.denoiser import training_loss, training_losses
from ldm.diffusion.schedule import Schedule
from ldm.errors import ConfigError
from ldm.training import train
from ldm.training.checkpoints import state
from ldm.training.checkpoints.reading import read_tensors
from ldm.training.data import Batch
from ldm.training.distributed import RowShard, processes
from ldm.training.loop import seeded
from ldm.training.loop.error_weights import ErrorWeights
from ldm.training.settings import read_settings
from ldm.training.stages.common import diffusion_loss, validation_scores
from tests.training.finetune_cases import apart, assert_own_folders, last_tensors, pictures, run
from tests.training.processes import together
from tests.training.toy import Toy, train_toy

FLOW = Schedule(prediction_type="flow")


def draws():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, 4, 4, generator=draw) for _ in range(3)]


def test_contrast_subtracts_the_error_against_another_images_target():
    x0, noise, answer = draws()
    loss, plain = training_losses(lambda x, t: answer, FLOW, x0, noise, torch.tensor([0.2, 0.5, 0.9]), contrast=0.05)
    target = noise - x0
    own = ((answer - target) ** 2).mean((1, 2, 3))
    other = ((answer - target[[2, 0, 1]]) ** 2).mean((1, 2, 3))
    assert torch.allclose(loss, own - 0.05 * other) and torch.allclose(plain, own)


def test_a_mask_counts_the_places_that_it_shows():
    x0, noise, answer = draws()
    mask = torch.zeros(3, 1, 4, 4)
    mask[0, 0, :2], mask[1] = 1.0, 1.0
    args = (lambda x, t: answer, FLOW, x0, noise, torch.tensor([0.2, 0.5, 0.9]))
    masked, whole = training_loss(*args, mask=mask), training_loss(*args)
    upper = ((answer - noise + x0) ** 2)[0, :, :2].mean()
    assert torch.allclose(masked, torch.stack([upper, whole[1], torch.tensor(0.0)]))


def test_the_loss_of_each_part_of_the_noise_levels():
    x0, noise, answer = draws()
    u = torch.tensor([0.1, 0.6, 0.9])
    losses = training_loss(lambda x, t: answer, FLOW, x0, noise, u)
    found = validation_scores([(lambda x, t: answer, x0, noise, u, None)], FLOW, None, levels=4)
    told = {name: value for name, value in found.items() if name.startswith("loss_")}
    low, middle, high = losses.tolist()
    assert told == pytest.approx({"loss_0_25": low, "loss_50_75": middle, "loss_75_100": high})
    assert found["validation_loss"] == pytest.approx(losses.mean())
    assert validation_scores([(lambda x, t: answer, x0, noise, u, None)], FLOW, None).keys() == {
        "validation_loss",
        "x0_error",
    }


class Watched(Toy):
    """Remembers its weights before each step."""

    seen: list

    def batches(self, first_step):
        for batch in super().batches(first_step):
            type(self).seen.append({name: p.detach().clone() for name, p in self.module.named_parameters()})
            yield batch


def test_several_averages_follow_their_decays_and_resume_to_the_bit(tmp_path):
    lengths = {"ema_lengths": (0.05, 0.2), "lr_schedule": "constant", "warmup": 0}
    Watched.seen = []
    train_toy(tmp_path / "whole", steps=6, kind=Watched, **lengths)
    tensors = read_tensors(state.checkpoints(tmp_path / "whole")[-1])
    weights = [*Watched.seen[1:], {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}]
    for decay in lengths["ema_lengths"]:
        average = dict(Watched.seen[0])
        for step, now in enumerate(weights):
            keep = min(decay, (1 + step) / (10 + step))
            average = {name: keep * old + (1 - keep) * now[name] for name, old in average.items()}
        for name, value in average.items():
            assert torch.allclose(tensors[f"average.{decay:.9f}/{name}"], value, atol=1e-6)
        assert (tmp_path / f"whole/model-ema-{decay:g}/weights.txt").is_file()
    texts = {
        (tmp_path / f"whole/{folder}/weights.txt").read_text()
        for folder in ("model", "model-ema-0.05", "model-ema-0.2")
    }
    assert len(texts) == 3
    train_toy(tmp_path / "halves", steps=3, **lengths)
    train_toy(tmp_path / "halves", steps=6, resume="latest", **lengths)
    one, other = (state.checkpoints(tmp_path / run)[-1] / state.WEIGHTS for run in ("whole", "halves"))
    assert one.read_bytes() == other.read_bytes()
    scores = (tmp_path / "whole/scores.jsonl").read_text()
    assert "validation_loss ema 0.05" in scores and "validation_loss ema 0.2" in scores


def test_each_average_of_a_fine_tuning_is_a_lora_of_its_own(tiny_folder, tmp_path):
    run(pictures(tmp_path / "pictures", 4), tmp_path / "run", str(tiny_folder), steps=2, ema_lengths=[0.9])
    assert_own_folders(tmp_path / "run")


def test_what_is_learned_badly_counts_more_and_nothing_less_than_the_floor():
    weights = ErrorWeights(0.5)
    both = RowShard(2)
    assert weights.of(["a", "b"], both).tolist() == [1, 1]
    for _ in range(200):
        weights.seen(["easy", "hard"], torch.tensor([1.0, 7.0]), torch.tensor([0.3, 0.3]), both)
        weights.seen(
            ["easy", "hard"], torch.tensor([10.0, 70.0]), torch.tensor([0.9, 0.9]), both
        )  # as before, relatively
    easy, hard = weights.of(["easy", "hard"], both).tolist()
    assert easy + hard == pytest.approx(2) and hard / easy == pytest.approx(1.75 / 0.5, rel=0.05)
    weights.seen(["easy"], torch.tensor([float("nan")]), torch.tensor([0.3]), RowShard(1))
    assert weights.errors.isfinite().all()


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_the_error_of_a_sample_has_no_contrast_in_it(unet_settings, snr_gamma):
    """Less the contrast it is often negative, and was left out."""
    words = ["weight_floor=0.5", "schedule={prediction_type: flow}", "sampler=euler"]
    settings = read_settings(str(unet_settings), [*words, *([f"snr_gamma={snr_gamma}"] if snr_gamma else [])])
    x0, _, answer = draws()
    batch = Batch(x0, [""] * 3, None, None, ["a", "b", "c"], RowShard(3))
    found = []
    for contrast in (0.0, 0.9):
        weights = ErrorWeights(0.5)
        for step in range(60):
            diffusion_loss(lambda x, t: answer, FLOW, settings, batch, step, 0, contrast=contrast, weights=weights)
        found.append(weights.tensors)
    assert (found[0]["errors"] != 1).sum() == 3
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_weights_by_error_resume_to_the_bit(unet_settings, tmp_path, one_thread):
    words = ["weight_floor=0.5", "latent_pool=256", "renew=0", "accumulation=1", "validate_every=99", "keep=2"]
    train(unet_settings, tmp_path / "whole", [*words, "steps=4"])
    train(unet_settings, tmp_path / "halves", [*words, "steps=3"])
    train(unet_settings, tmp_path / "halves", [*words, "steps=4"], resume="latest")
    one, other = (state.checkpoints(tmp_path / run)[-1] / state.WEIGHTS for run in ("whole", "halves"))
    assert one.read_bytes() == other.read_bytes()
    assert (read_tensors(one.parent)["stage.errors"] != 1).any()


def test_two_processes_weigh_and_contrast_as_one(unet_settings, tmp_path, one_thread):
    words = ["weight_floor=0.5", "flow_contrast=0.3", "schedule={prediction_type: flow}", "batch_size=3", "seed=1"]
    words += ["optimizer=sgd", "learning_rate=0.1", "warmup=0", "clip=1e9", "lr_schedule=constant", "steps=5"]
    words += ["latent_pool=256", "renew=0", "validate_every=99", "save_every=99", "sampler=euler"]
    train(unet_settings, tmp_path / "one", words)
    assert together(2, lambda rank: train(unet_settings, tmp_path / "two", words) and 0) == [0, 0]
    for part, near in (("model.", 1e-5), ("stage.", 1e-4)):
        assert apart(last_tensors(tmp_path / "two", part), last_tensors(tmp_path / "one", part)) < near
    train(unet_settings, tmp_path / "plain", [word for word in words if "contrast" not in word])
    assert apart(last_tensors(tmp_path / "plain"), last_tensors(tmp_path / "one")) > 1e-4


def write_weights(path):
    """Of 40 batches of five samples with losses of their own, on however many processes there are."""
    with processes() as group:
        weights, found = ErrorWeights(0.5), []
        for number in range(40):
            part = group.part(5)
            losses = seeded.normal((5,), 0, "losses", number).abs() * torch.arange(1, 6)
            ids = [f"image {row}" for row in part.own]
            found.append(group.whole(weights.of(ids, part), part))
            weights.seen(ids, part.of(losses), torch.full((5,), 0.3), part)
        if group.first:
            save_file({"weights": torch.stack(found), **weights.tensors}, path)


def test_weights_in_three_processes_are_those_of_one_to_the_bit(tmp_path):
    write_weights(tmp_path / "one")
    assert together(3, lambda rank: write_weights(tmp_path / "three")) == [0, 0, 0]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "three").read_bytes()
    weights = load_file(tmp_path / "one")["weights"]
    assert torch.allclose(weights.mean(1), torch.ones(40)) and weights[-1, 4] > 1.5 * weights[-1, 0]


def test_what_the_aids_do_not_go_with_is_refused():
    base = ["vae=default", "text=default"]
    for words, said in (
        (["flow_contrast=0.05", "schedule={prediction_type: epsilon}"], "flow_contrast: is for flow"),
        (["flow_contrast=2", "schedule={prediction_type: flow}"], "flow_contrast: must be in"),
        (["weight_floor=0"], "weight_floor: must be above 0"),
        (["ema_lengths=[1.5]"], "ema_lengths: must be in"),
        (["validation_levels=-1"], "validation_levels: must be 0 to 20"),
        (["snr_gamma=0"], "snr_gamma: must be positive, got 0"),
        (["snr_gamma=-5"], "snr_gamma: must be positive, got -5"),
        (["guidance_scale=0"], "guidance_scale: must be above 0, at most 1000"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_settings("emoji/unet", [*base, *words])
