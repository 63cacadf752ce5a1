"""What a fine-tuning leaves: LoRA, DoRA and models that draw the same here and in diffusers; honest scores; presets."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from ldm import Pipeline
from ldm.checkpoint import load_model
from ldm.checkpoint.lora import networks, read_lora, with_loras
from ldm.errors import CheckpointError, ConfigError, DataError
from ldm.training.finetuning.forecast import STAGES, trial_batch
from ldm.training.finetuning.presets import Facts, for_images, for_model
from ldm.training.settings import as_dict
from ldm.training.stages.finetune import Finetune
from tests.checkpoint.lora_cases import apart as pictures_apart
from tests.checkpoint.lora_cases import fresh, ours, theirs
from tests.checkpoint.test_families_folders import build
from tests.comparing.inputs import random_vae
from tests.training.conftest import threads
from tests.training.finetune_cases import QUICK, SIZE, last_tensors, pictures, resolved, run, settings_of, stage_of

WATCHED = {"held_out": 0.3, "samples": 3, "sample_steps": 2, "sampler": "ddim", "validate_every": 3}
# kind -> (family of models, settings)
KINDS = {
    "lora": ("1.5", {"lora_alpha": 3, "learning_rate": 0.1, "steps": 6, "ema": 0.5, **WATCHED}),
    "dora": ("1.5", {"train": "dora", "learning_rate": 0.1, "targets": "transformer,conv1"}),
    "xl": ("xl", {"text_encoder": True, "learning_rate": 0.1, "caption_dropout": 0.3}),
    "full": ("2.1-v", {"train": "full", "text_encoder": True, "learning_rate": 0.01, "save_dtype": "fp32"}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "pictures", 10, ((SIZE, SIZE), (44, 28)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> the folder of a small model."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("models") / family
            build(family).save_pretrained(made[family])
        return made[family]

    return get


@pytest.fixture(scope="module")
def runs(tmp_path_factory, models, data):
    """kind -> (the base's folder, the run's folder, what finetune gave back)."""
    made = {}

    def get(kind):
        if kind not in made:
            family, words = KINDS[kind]
            out = tmp_path_factory.mktemp("runs") / kind
            made[kind] = models(family), out, run(data, out, models(family), **words)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", ["lora", "dora", "xl"])
def test_a_lora_draws_in_diffusers_as_here(kind, runs):
    base, out, given = runs(kind)
    assert given == out
    drawn, plain = ours(base, lora=out)[0], ours(base)[0]
    assert pictures_apart(drawn, plain) > 5
    assert pictures_apart(drawn, ours(base, lora=out / f"{kind}.safetensors")[0]) == 0
    files = ["pytorch_lora_weights.safetensors"]
    files += [] if kind == "dora" else [f"{kind}.safetensors"]  # diffusers drops dora_scale
    for name in files:
        pipe = fresh(KINDS[kind][0])
        pipe.load_lora_weights(out, weight_name=name)
        assert pictures_apart(drawn, theirs(pipe)) <= 1


def test_both_files_say_the_true_alpha(runs):
    _, out, _ = runs("lora")
    for name in ("pytorch_lora_weights.safetensors", "lora.safetensors"):
        header = read_lora(out / name).header
        assert {(e.rank, e.alpha) for e in header.entries.values()} == {(2, 3.0)} and header.assumed == 0
    with safe_open(out / "lora.safetensors", "pt") as file:
        alphas = [file.get_tensor(key) for key in file.keys() if key.endswith(".alpha")]  # noqa: SIM118
    assert len(alphas) == len(header.entries) and all(alpha == 3 for alpha in alphas)
    card = (out / "README.md").read_text()
    assert "rank 2, alpha 3" in card and "validation_loss" in card and "lora.safetensors" in card
    assert set(json.loads((out / "manifest.json").read_text())["files"]) == {name, "pytorch_lora_weights.safetensors"}


@pytest.mark.parametrize("kind", ["lora", "dora", "xl"])
def test_the_merged_model_is_the_adapted_one(kind, runs):
    base, out, _ = runs(kind)
    stage = stage_of(out)
    stage.module.load_state_dict(last_tensors(out, "ema."), strict=False)
    stage.module.eval()
    adapted = networks(stage.model)
    merged = networks(with_loras(load_model(base, "cpu", "fp32"), [(read_lora(out), 1.0)]))
    config, more = stage.model.unet.config, {}
    if stage.xl:
        more = {"pooled": torch.randn(2, 24), "time_ids": torch.full((2, 6), 32.0)}
    x, t, states = torch.randn(2, 4, 8, 8), torch.tensor([30, 700]), torch.randn(2, 5, config.cross_attention_dim)
    with threads(1), torch.no_grad():
        assert torch.equal(adapted["unet"](x, t, states, **more), merged["unet"](x, t, states, **more))
        for part in [part for part in adapted if part != "unet"]:
            ids = torch.tensor([[0, 5, 6, 2]])
            one, other = (found[part](input_ids=ids).last_hidden_state for found in (adapted, merged))
            assert torch.equal(one, other)


def test_text_encoders_learn_where_they_are_asked_to(runs):
    _, out, _ = runs("xl")
    moved = {key.split(".")[0] for key, update in read_lora(out).layers.items() if update.up.abs().max() > 1e-3}
    assert moved == {"unet", "text_encoder", "text_encoder_2"}
    assert settings_of(out).text_encoder and not settings_of(runs("lora")[1]).text_encoder


def test_a_full_run_with_its_text_encoder_is_one_to_start_from(runs):
    from ldm.training.stages.start import start_from

    _, out, _ = runs("full")
    expected = last_tensors(out, "ema.")
    assert any(name.startswith("text_encoder.") for name in expected)
    found = start_from(str(out), "unet").state_dict()
    assert found and all(torch.equal(value, expected[f"unet.{name}"]) for name, value in found.items())


def test_a_full_run_leaves_a_model_for_both(runs):
    base, out, model = runs("full")
    assert model == out / "model" and not (out / "pytorch_lora_weights.safetensors").exists()
    drawn = ours(model)[0]
    assert pictures_apart(drawn, ours(base)[0]) > 5
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    assert pictures_apart(drawn, theirs(pipe)) <= 1
    one, other = (load_model(f, "cpu", "fp32").text.model.state_dict() for f in (base, model))
    assert any(not torch.equal(value, other[name]) for name, value in one.items())
    recipe = (model / "README.md").read_text().split("```json\n")[1].split("```")[0]
    named = as_dict(settings_of(out))  # names, no paths
    named |= {"model": base.name, "data": named["data"] | {"folder": "pictures"}}
    assert json.loads(recipe) == named


def test_scores_are_of_held_out_pictures_with_fixed_noise(runs, models, data, tmp_path):
    _, out, _ = runs("lora")
    scores = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [row["step"] for row in scores] == [0, 3, 6]
    assert all(row["validation_loss"] > 0 and row["x0_error"] > 0 for row in scores)
    stage = stage_of(out)
    held = {name for batch, _, _ in stage.validation for name in batch.ids}
    trained = {name for number in range(8) for name in stage.data.batch(number).ids}
    assert held and not held & trained
    assert sum(len(u) for _, _, u in stage.validation) >= 32
    levels = torch.cat([u for _, _, u in stage.validation]).sort().values
    assert torch.allclose(levels, (torch.arange(len(levels)) + 0.5) / len(levels))
    with threads(1):
        again = stage.validate(stage.module.eval(), 0)  # the updates are zero before the first step
    assert again == {name: scores[0][name] for name in again}
    run(data, tmp_path / "other", models("1.5"), **{**WATCHED, "targets": "to_q", "learning_rate": 1e-3})
    first = json.loads((tmp_path / "other" / "scores.jsonl").read_text().splitlines()[0])
    assert first == scores[0]  # whatever is trained


def test_the_grid_has_the_prompts_at_fixed_seeds(runs, models, data, tmp_path):
    _, out, _ = runs("lora")
    grids = [np.asarray(Image.open(out / "samples" / f"step-{step:08d}.png")) for step in (0, 6)]
    assert grids[0].shape[1] >= 3 * SIZE and not np.array_equal(*grids)
    words = {**WATCHED, "validation_prompts": ["a cat", "a dog"], "learning_rate": 1e-30, "steps": 3}
    run(data, tmp_path / "still", models("1.5"), **words)
    still = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "still" / "samples").iterdir())]
    assert len(still) == 2 and np.array_equal(*still)
    drawn = np.asarray(stage_of(tmp_path / "still").sample_grid(stage_of(tmp_path / "still").module.eval()))
    assert np.abs(drawn.astype(int) - still[0]).max() <= 1


def test_going_on_from_a_lora(runs, models, data, tmp_path):
    base, out, _ = runs("lora")
    run(data, tmp_path / "more", base, init=str(out), learning_rate=1e-30, lora_rank=None, targets=None, steps=1)
    one, other = read_lora(out), read_lora(tmp_path / "more")
    assert one.layers.keys() == other.layers.keys()
    assert all(
        torch.equal(u.up, other.layers[n].up) and u.alpha == other.layers[n].alpha for n, u in one.layers.items()
    )
    settings = settings_of(tmp_path / "more")
    assert (settings.lora_rank, settings.lora_alpha, settings.targets, settings.train) == (2, 3.0, (), "lora")
    with pytest.raises(ConfigError, match=r"lora_rank: is 2 in the LoRA to continue, not 4"):
        run(data, tmp_path / "not", base, init=str(out), lora_rank=4, targets=None)
    _, dora, _ = runs("dora")
    run(data, tmp_path / "dora", base, init=str(dora), lora_rank=None, targets=None, steps=1)
    assert settings_of(tmp_path / "dora").train == "dora" and read_lora(tmp_path / "dora").header.dora


def test_the_prior_is_read_before_anything_is_encoded_and_counted_on_the_page(models, data, tmp_path, capsys):
    bare, out = tmp_path / "bare", tmp_path / "run"
    kept = pictures(tmp_path / "kept", 3)
    pictures(bare, 3)
    for text in bare.glob("*.txt"):
        text.unlink()
    with pytest.raises(DataError, match="caption"):
        run(data, out, models("1.5"), prior=bare, dry_run=True)
    with pytest.raises(DataError, match="caption"):
        run(data, out, models("1.5"), prior=bare)
    assert not out.exists() and "cache:" not in capsys.readouterr().err
    run(data, out, models("1.5"), prior=kept, dry_run=True)
    assert "prior: 3 found: 3 used" in capsys.readouterr().err
    run(data, out, models("1.5"), prior=kept, steps=1)
    assert "prior: 3 found: 3 used" in (out / "index.html").read_text()


def test_a_trial_of_a_step_has_the_prior_in_it(models, data, tmp_path):
    kept = pictures(tmp_path / "kept", 3)
    for words, count in (({}, 4), ({"prior": str(kept), "prior_weight": 0.5}, 8)):
        settings, _ = resolved(data, tmp_path / "run", models("1.5"), **{**QUICK, **words})
        stage, seen = STAGES[settings.module](settings, tmp_path / "run"), []
        stage.model.unet.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])))
        stage.module.train()
        stage.loss(trial_batch(stage), 0, 0)
        assert sum(seen) == count


def test_prior_pictures_are_a_part_of_each_step(models, data, tmp_path):
    kept = pictures(tmp_path / "kept", 3)
    out = tmp_path / "run"
    run(data, out, models("1.5"), prior=str(kept), prior_weight=0.5, steps=1)
    stage = stage_of(out)
    stage.module.train()
    batch = next(stage.batches(0))
    parts = stage._loss(batch, "", 0, 0), stage._loss(stage.prior.batch(0), "prior ", 0, 0)
    assert torch.allclose(stage.loss(batch, 0, 0), parts[0] + 0.5 * parts[1])
    assert stage.inputs["prior"] != stage.inputs["data"]


@pytest.mark.parametrize("words", [{"prediction_type": "flow"}, {"zero_terminal_snr": True}])
def test_a_full_run_may_change_what_the_model_predicts(words, models, data, tmp_path):
    model = run(data, tmp_path / "run", models("2.1-v"), train="full", steps=1, timesteps="logit_normal", **words)
    schedule = load_model(model, "cpu", "fp32").schedule
    assert schedule.is_flow if "prediction_type" in words else schedule.rescale_betas_zero_snr
    assert len(Pipeline("a cat", model=model, device="cpu").generate(num_inference_steps=2, seed=1)) == 1


def test_words_of_the_captions_are_known_afterwards(tiny_folder, tmp_path):
    data = pictures(tmp_path / "pictures", 4)
    (data / "0.txt").write_text("a zorbel")
    for kind in ("lora", "full"):
        made = run(data, tmp_path / kind, tiny_folder, train=kind, steps=1)
        model, lora = (tiny_folder, made) if kind == "lora" else (made, None)
        images = Pipeline("a zorbel gnu", model=model, lora=lora).generate(num_inference_steps=1, seed=1)
        assert images.metadata[0]["unknown_words"] == ["gnu"]


def test_another_vae_and_a_single_file(models, data, tmp_path):
    from ldm.checkpoint.single import save_single

    folder = models("1.5")
    file = save_single(load_model(folder, "cpu", "fp32"), tmp_path / "model.safetensors", torch.float32)
    another = random_vae()
    another.decoder.conv_in.weight.data *= 1.5
    another.save_pretrained(tmp_path / "another")
    run(data, tmp_path / "run", file, vae=str(tmp_path / "another"), steps=1)
    assert ours(file, lora=tmp_path / "run")[0].shape == (2, 64, 64, 3)
    with pytest.raises(CheckpointError, match="the model is not the one"):
        run(data, tmp_path / "run", file, vae=str(folder), steps=2, resume="latest", allow_changed=["vae"])


# Presets

SMALL = Facts(width=96, xl=False, side=128, flow=False, device="cpu")


def apply_presets(given, facts, buckets):
    """All settings of a run: `given`, and presets for what is not."""
    return for_images(for_model(given, facts), given, facts, buckets)


def test_presets_follow_pictures_and_hardware():
    few, many = apply_presets({}, SMALL, [3]), apply_presets({}, SMALL, [100_000])
    assert few["steps"] < many["steps"] and few["batch_size"] == 3
    assert apply_presets({"steps": 7}, SMALL, [24])["steps"] == 7
    xl = Facts(width=320, xl=True, side=1024, flow=False, device="cuda", memory=24 << 30)
    large = apply_presets({}, xl, [50])
    assert large["gradient_checkpointing"] and large["data.resolution"] == 1024
    full = {"train": "full"}
    for xl, gigabytes, checkpointing in ((False, 24, True), (False, 80, False), (True, 141, True)):
        card = Facts(width=320, xl=xl, side=512, flow=False, device="cuda", memory=gigabytes << 30)
        assert apply_presets(full, card, [50]).get("gradient_checkpointing", False) is checkpointing
    roomy = apply_presets({}, Facts(width=320, xl=False, side=512, flow=False, device="cuda", memory=80 << 30), [50])
    assert roomy["batch_size"] == 4 and "gradient_checkpointing" not in roomy
    assert apply_presets({}, Facts(width=96, xl=False, side=128, flow=True, device="cpu"), [50])["snr_gamma"] is None
    shipped = Facts(width=96, xl=False, side=128, flow=False, device="cpu", default=True)
    assert apply_presets({}, shipped, [24])["prior_images"] > 0 and "prior_images" not in apply_presets({}, SMALL, [24])
    assert "prior_images" not in apply_presets({"prior": "kept/"}, shipped, [24])
    assert not {"prior_target", "prior_weight"} & apply_presets({"prior_images": 0}, shipped, [24]).keys()
    assert apply_presets({}, shipped, [24])["prior_target"] == "model" and "prior_target" not in apply_presets(
        {"train": "full"}, shipped, [24]
    )


def test_epochs_become_steps():
    found = apply_presets({"epochs": 2.5, "batch_size": 4, "accumulation": 2}, SMALL, [100])
    assert found["steps"] == 32 and "epochs" not in found  # 250 samples of 8
    found = apply_presets({"epochs": 2, "batch_size": 4, "accumulation": 2}, SMALL, [5, 9, 1])
    assert found["steps"] == 6  # 2 + 3 + 1 batches, twice, two a step
    one, other = (apply_presets({"batch_size": 8}, SMALL, buckets) for buckets in ([8, 8, 8], [8, 7, 1]))
    assert one["steps"] == other["steps"]
    with pytest.raises(ConfigError, match="epochs: must be a positive number"):
        apply_presets({"epochs": -1}, SMALL, [100])


def test_an_epoch_trains_on_every_picture_of_every_bucket_once(models, data, tmp_path):
    settings, images = resolved(data, tmp_path / "run", models("1.5"), **{**QUICK, "steps": None, "epochs": 1})
    stage = Finetune(settings, tmp_path / "run").open(images)
    seen = [name for number in range(settings.steps * settings.accumulation) for name in stage.data.batch(number).ids]
    assert sorted(seen) == sorted(item.id for item in stage.data.images.items) and len(stage.data) == 4
