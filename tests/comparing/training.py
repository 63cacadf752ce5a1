"""Fine-tunings and trainings from nothing of a few steps, and what they leave in their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from registry import case, command

QUICK_RUN = {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "resolution": 64, "held_out": 0.0, "device": "cpu"}
QUICK_RUN |= {"precision": "fp32", "warmup": 2, "ema": 0.8, "validate_every": 6, "save_every": 3, "log_every": 1}
QUICK_RUN |= {"samples": 0, "sample_steps": 2, "seed": 3, "prior_images": 0}


def tuning(name: str, model: str = "sd", quick: bool = False, **words: Any) -> None:
    """A case of ldm.finetune; the run is OUT/SECTION/CASE/run."""

    def tune(inputs: Path, out: Path) -> None:
        import ldm

        told = {name: value for name, value in {**QUICK_RUN, **words}.items() if value is not None}
        ldm.finetune(inputs / "captioned", out / "run", inputs / "models" / model, **told)

    case("finetune", quick, name)(tune)


PRIOR = {"prior_prompt": "a dog", "prior_images": 4, "prior_target": "model", "prior_weight": 2.0}
tuning("lora", quick=True, lora_rank=4, caption_dropout=0.3, held_out=0.25, validate_every=3, samples=2)
tuning("full", quick=True, train="full", held_out=0.25, lr_schedule="cosine", snr_gamma=5.0, noise_offset=0.05)
tuning("dora with text encoder", train="dora", lora_rank=2, targets="all", text_encoder=True, accumulation=2)
tuning("full with text encoder", train="full", text_encoder=True, steps=3, optimizer="sgd")
tuning("full of default", "default", train="full", resolution=128, steps=3, batch_size=2)
tuning("lora of default", "default", True, lora_rank=8, targets="all", resolution=128, steps=3, batch_size=2, **PRIOR)
tuning("lora of xl", "xl", lora_rank=4, lora_alpha=2.0, timesteps="logit_normal", timestep_shift=2.0)
tuning("lora of flow", "flow", lora_rank=4, shuffle_tags=True, cache="off", crop="random", flip=0.5)
tuning("full to velocity", train="full", prediction_type="v_prediction", zero_terminal_snr=True, square=True)
tuning("presets", steps=3, **dict.fromkeys(("batch_size", "learning_rate", "warmup", "ema")))


@case("finetune")
def resumed(inputs: Path, out: Path) -> None:
    """Three steps, then three more from their checkpoint."""
    import ldm

    words = {**QUICK_RUN, "lora_rank": 2, "lr_schedule": "constant"}
    given = (inputs / "captioned", out / "run", inputs / "models/sd")
    ldm.finetune(*given, **{**words, "steps": 3})
    ldm.finetune(*given, **words, resume="latest", allow_changed=["steps"])


@case("finetune", name="command")
def finetune_command(inputs: Path, out: Path) -> None:
    """Flags of diffusers' and kohya's scripts, then from that LoRA on."""
    words = ("--pretrained_model_name_or_path", inputs / "models/sd", "--max_train_steps", 4, "--network_dim", 4)
    words += ("--train_batch_size", 2, "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 2, "--seed", 4)
    words += ("--resolution", 64, "--device", "cpu", "--precision", "fp32", "--samples", 0, "--held-out", 0, "-q")
    command("finetune", inputs / "captioned", "-o", out / "run", *words)
    more = (
        "--init",
        out / "run",
        "--steps",
        3,
        "--samples",
        0,
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--batch-size",
        4,
    )
    command("finetune", inputs / "captioned", "-o", out / "on", "--model", inputs / "models/sd", *more, "-q", "seed=9")


TRAINED = {"steps": 4, "batch_size": 4, "workers": 0, "precision": "fp32", "device": "cpu", "warmup": 2, "ema": 0.9}
TRAINED |= {"save_every": 2, "validate_every": 2, "log_every": 1, "validation": 8}
SMALL = {"learning_rate": 0.002, "data": {"resolution": 32, "scenes": {"objects": "everyday"}}}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
STAGES: dict[str, dict[str, Any]] = {
    "autoencoder": {
        "crop": 16,
        "crops": 2,
        "crop_until": 0.5,
        "model": {
            "block_out_channels": [8, 8, 8, 8],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "mid_block_add_attention": False,
        },
    },
    "text": {
        "bank": 256,
        "vocabulary": 560,
        "max_length": 24,
        "tokenizer_captions": 50,
        "model": TOWER,
        "image_tower": {**TOWER, "patch_size": 1},
    },
    "unet": {
        "bank": 512,
        "renew": 2,
        "sample_steps": 2,
        "accumulation": 2,
        "optimizer": "muon",
        "timestep_shift": 2.0,
        "caption_dropout": 0.3,
        "sampler": "dpmpp_sde",
        "data": {
            "resolution": 64,
            "scenes": {"objects": "all", "favourites": ["duck", "pizza"], "still": 0.5},
        },
        "schedule": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "spacing": "trailing"},
        "model": {
            "block_out_channels": [16, 32],
            "layers_per_block": 1,
            "transformer_layers": [0, 1],
            "num_heads": [2, 4],
            "norm_num_groups": 8,
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 4,
        },
    },
}


def training(stage: str, packaged: bool) -> None:
    """A case of ldm.train: a tiny network, or the packaged settings with few steps and scenes."""

    def small(inputs: Path, out: Path) -> None:
        import ldm

        file = out / "settings.json"
        file.write_text(json.dumps({**TRAINED, **SMALL, "stage": stage, **STAGES[stage]}))
        ldm.train(file, out / "run", _parts(stage, inputs / "models/sd"))

    def shipped(inputs: Path, out: Path) -> None:
        import ldm

        few = {**TRAINED, "steps": 2}
        few |= {} if stage == "autoencoder" else {"bank": 256}
        few |= {"vocabulary": 600, "tokenizer_captions": 100} if stage == "text" else {}
        few |= {"sample_steps": 2} if stage == "unet" else {}
        told = [f"{key}={value}" for key, value in few.items()]
        ldm.train(f"emoji/{stage}", out / "run", [*told, *_parts(stage, inputs / "models/default")])

    case("train", not packaged, f"emoji/{stage}".replace("/", " ") if packaged else stage)(
        shipped if packaged else small
    )


def _parts(stage: str, model: Path) -> list[str]:
    needed = {"autoencoder": (), "text": ("vae",), "unet": ("vae", "text")}[stage]
    return [f"{part}={model}" for part in needed]


for _packaged in (False, True):
    for _stage in STAGES:
        training(_stage, _packaged)
