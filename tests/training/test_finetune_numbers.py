"""Loss, gradients and weights of a fine-tuning against a plain PyTorch loop with diffusers' U-Net and schedule."""

from functools import partial

import diffusers
import peft
import pytest
import torch
from diffusers.training_utils import compute_snr

from ldm.checkpoint.lora import match_layers, read_lora, target_at
from ldm.nn.lora import updates_of
from ldm.training.loop import seeded
from tests.checkpoint.test_families_folders import build
from tests.training.finetune_cases import QUICK, apart, last_tensors, norm, pictures, plain_sgd, run, stage_of

STEPS, GAMMA, OFFSET = 5, 5.0, 0.1
SGD = {"optimizer": "sgd", "weight_decay": 0.0, "clip": 1e9, "steps": STEPS, "snr_gamma": GAMMA}
SGD |= {"timesteps": "uniform", "timestep_shift": 1.0}
FAMILIES = {"1.5": "epsilon", "2.1-v": "v_prediction", "xl": "epsilon"}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """family -> (diffusers' pipeline, the folder that it saved)."""
    found = {}

    def get(family):
        if family not in found:
            pipe, folder = build(family), tmp_path_factory.mktemp("pipes") / family
            pipe.save_pretrained(folder)
            found[family] = folder
        return build(family), found[family]

    return get


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of two shapes."""
    return pictures(tmp_path_factory.mktemp("data") / "pictures", 8, ((32, 32), (44, 28)))


def plain_loss(pipe, unet, batch, step, offset=0.0):
    """As diffusers' train_text_to_image.py computes it, on the noise and timesteps of our keys."""
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    x0, size, seed = batch.latents, len(batch.latents), QUICK["seed"]
    noise = seeded.normal(tuple(x0.shape), seed, "noise", step, 0)
    if offset:
        noise = noise + offset * seeded.normal((size, x0.shape[1], 1, 1), seed, "noise offset", step, 0)
    places = (torch.arange(size) + seeded.uniform((size,), seed, "timesteps", step, 0)) / size
    timesteps = (places * scheduler.config.num_train_timesteps).long()
    more = {}
    if hasattr(pipe, "text_encoder_2"):
        empty = {"negative_prompt": batch.captions, "do_classifier_free_guidance": False}
        states, _, pooled, _ = pipe.encode_prompt(batch.captions, device="cpu", num_images_per_prompt=1, **empty)
        there = torch.tensor([float(bool(caption)) for caption in batch.captions])  # dropped ones are zeros
        states, pooled = states * there[:, None, None], pooled * there[:, None]
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": batch.time_ids}}
    else:
        states = pipe.encode_prompt(batch.captions, "cpu", 1, False)[0]
    raw = unet(scheduler.add_noise(x0, noise, timesteps), timesteps, states.detach(), **more).sample
    snr, v = compute_snr(scheduler, timesteps), scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(x0, noise, timesteps) if v else noise
    weights = snr.clamp(max=GAMMA) / (snr + 1 if v else snr)
    return ((raw - target).square().mean(dim=(1, 2, 3)) * weights).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_run_is_a_plain_loop(family, pipes, data, tmp_path):
    pipe, folder = pipes(family)
    out = tmp_path / "run"
    run(data, out, folder, train="full", noise_offset=OFFSET, **SGD)
    stage = stage_of(out)
    assert stage.model.schedule.prediction_type == FAMILIES[family]
    unet = pipe.unet.train()

    def at_first(batch, loss):
        compare_first_step(stage, batch, loss, {n: p.grad for n, p in unet.named_parameters()})

    def loss_of(batch, step):
        return plain_loss(pipe, unet, batch, step, OFFSET)

    plain_sgd(stage, unet.parameters(), QUICK["learning_rate"], STEPS, loss_of, at_first)
    shapes = {batch.shape for batch in (stage.data.batch(step).latents for step in range(STEPS))}
    assert len({shape[2:] for shape in shapes}) == 2  # both buckets were met
    assert apart(last_tensors(out), unet.state_dict()) < 1e-6
    assert apart(last_tensors(out), build(family).unet.state_dict()) > 1e-4


def compare_first_step(stage, batch, loss, gradients):
    stage.module.train()
    ours = stage.loss(batch, 0, 0)
    assert abs(ours.item() - loss.item()) < 1e-5 * loss.item()
    ours.backward()
    mine = {name: p.grad for name, p in stage.module.named_parameters()}
    assert mine.keys() == gradients.keys()
    assert norm(mine[n] - g for n, g in gradients.items()) < 1e-5 * norm(gradients.values())


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_is_pefts_in_a_plain_loop(dora, pipes, data, tmp_path):
    pipe, folder = pipes("1.5")
    out, unet = tmp_path / "run", pipe.unet
    rate = 0.5 if dora else 2.0  # DoRA at 2 makes updates as large as the weights, and rounding grows with each step
    words = {"train": "dora" if dora else "lora", "lora_alpha": 3, "learning_rate": rate}
    run(data, out, folder, **words, **SGD)
    stage = stage_of(out)
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=names, use_dora=dora))
    parameters = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    for name, update in updates_of(stage.module).items():
        parameters[f"{name}.lora_A.default.weight"].data.copy_(update.down)
    plain_sgd(stage, parameters.values(), rate, STEPS, partial(plain_loss, pipe, unet.train()))
    lora = read_lora(out)
    for layer, (_, name) in match_layers(lora.header, target_at(folder)).layers.items():
        mine, at = lora.layers[layer], f"{name}.lora_{{}}.default.weight"
        assert torch.allclose(mine.down, parameters[at.format("A")], atol=1e-6)
        assert torch.allclose(mine.up, parameters[at.format("B")], atol=1e-6) and mine.up.abs().max() > 1e-4
        if dora:
            magnitude = parameters[f"{name}.lora_magnitude_vector.default.weight"].flatten()
            assert torch.allclose(mine.magnitude, magnitude, atol=1e-6)
