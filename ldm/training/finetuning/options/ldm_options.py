"""Our own words, each with the setting's key, and the command line's options among them."""

from __future__ import annotations

import dataclasses

from ldm.training.settings import FinetuneSettings

OWN = ("stage", "data", "workers")  # fields of FinetuneSettings that are not words as they stand
_DATA = next(f.default_factory for f in dataclasses.fields(FinetuneSettings) if f.name == "data")
KEYS: dict[str, str] = {f.name: f.name for f in dataclasses.fields(FinetuneSettings) if f.name not in OWN}
KEYS |= {f.name: f"data.{f.name}" for f in dataclasses.fields(_DATA)}
NULLABLE = {f.name for f in dataclasses.fields(FinetuneSettings) if "None" in str(f.type)}
NULLABLE |= {f"data.{f.name}" for f in dataclasses.fields(_DATA) if "None" in str(f.type)}
KEYS |= {"data": "data.folder", "epochs": "epochs", "prompts_file": "validation_prompts"}


# The command line's options by group: word -> (what stands for its value; None: a switch, what it does).
OPTIONS: dict[str, dict[str, tuple[str | None, str]]] = {
    "what is trained": {
        "model": ("MODEL", "a diffusers folder, a .safetensors file or a hub id (the shipped model)"),
        "vae": ("PATH", "another VAE's folder or file"),
        "train": ("KIND", "lora, dora or full: the whole U-Net (lora)"),
        "lora_rank": ("N", "(16)"),
        "lora_alpha": ("X", "the update is scaled by alpha / rank (the rank)"),
        "targets": ("NAME,…", "attention, transformer, all-linear, all, or names of layers or their ends"),
        "text_encoder": (None, "train the text encoder too (CLIP alone)"),
        "init": ("FILE", "a LoRA or DoRA to go on from"),
    },
    "how long": {
        "steps": ("N", "optimizer steps (from the number of pictures)"),
        "epochs": ("X", "instead of steps: passes over the pictures"),
        "batch_size": ("N", "pictures that go through the network at once"),
        "accumulation": ("N", "of these batches make a step (1)"),
        "learning_rate": ("X", ""),
        "lr_schedule": ("NAME", "constant, linear, cosine"),
        "warmup": ("N", "steps in which the learning rate rises"),
        "optimizer": ("NAME", "adamw, adamw8bit, muon, sgd (adamw)"),
        "ema": ("X", "decay of the average of the weights that is kept; 0: the weights themselves"),
        "seed": ("N", "(0)"),
    },
    "the loss": {
        "prediction_type": ("NAME", "epsilon, v_prediction, sample, flow (what the model says)"),
        "snr_gamma": ("X", "min-SNR weighting; null: none (5)"),
        "noise_offset": ("X", "(0)"),
        "timesteps": ("NAME", "uniform or logit_normal (uniform)"),
        "timestep_shift": ("X", "above 1: more often at high noise (1)"),
        "zero_terminal_snr": (None, "rescale the schedule, in a run with --train full"),
        "prior": ("FOLDER", "captioned pictures of what must be kept, mixed into each step"),
        "prior_images": ("N", "instead: N pictures of what the model knows, drawn by itself before training"),
        "prior_prompt": ("TEXT", "what those show; the default model knows what it knows"),
        "prior_weight": ("X", "(1)"),
        "prior_target": ("WHAT", "pictures, or model: what it answered before, for LoRA and DoRA (pictures)"),
    },
    "the pictures": {
        "resolution": ("PIXELS", "(the model's)"),
        "captions": ("HOW", "auto, or names: of folders and files (auto)"),
        "split": ("NAME", "(train)"),
        "square": (None, "no buckets: every picture is cropped to a square"),
        "min_side": ("PIXELS", "of a bucket"),
        "max_side": ("PIXELS", "of a bucket"),
        "bucket_step": ("PIXELS", "(8, above 256 pixels 64)"),
        "crop": ("HOW", "center or random; random needs --cache off (center)"),
        "flip": ("X", "share of the pictures that is mirrored (0)"),
        "caption_dropout": ("X", "share that is trained without its caption (0.1)"),
        "shuffle_tags": (None, "the parts of a caption between commas in another order each time"),
        "keep_tags": ("N", "of these so many stay at the beginning (0)"),
        "held_out": ("X", "share of the pictures that is kept for validation (0.05)"),
        "max_bad": ("X", "share of the pictures that may be unusable (0.05)"),
        "allow_empty_captions": (None, "train on pictures without captions too"),
        "cache": ("FOLDER", "of latents and embeddings, or off (RUN/cache)"),
    },
    "progress": {
        "validate_every": ("N", "steps between two validation losses and sample grids"),
        "validation_prompts": (
            "TEXT",
            "of the sample grid; may be given several times (captions of held-out pictures)",
        ),
        "prompts_file": ("FILE", "the same from a file, one a line"),
        "samples": ("N", "pictures of the grid, where captions are drawn (8)"),
        "report_to": ("NAME,…", "tensorboard, wandb"),
    },
    "saving": {
        "save_every": ("N", "steps between two checkpoints"),
        "keep": ("N", "checkpoints (2)"),
        "export": ("WHICH", "last, or best: the lowest validation loss (last)"),
        "save_dtype": ("NAME", "fp32, bf16, fp16 (a LoRA's fp32, a model's bf16)"),
        "name": ("NAME", "of the file for A1111 and ComfyUI (the run's folder)"),
    },
    "the machine": {
        "device": ("NAME", "auto, cpu, cuda, mps"),
        "precision": ("NAME", "auto, bf16, fp16, fp32 (auto)"),
        "compile": (None, "torch.compile of the U-Net: a minute or more at the start"),
        "gradient_checkpointing": (None, "compute activations again instead of keeping them"),
        "attention": ("NAME", "of the U-Net: auto, sdpa, chunked, xformers"),
        "workers": ("N", "threads that read pictures where nothing is cached (1)"),
    },
}
SWITCHES = frozenset(word for group in OPTIONS.values() for word, (value, _) in group.items() if value is None)
TEXTS = ("model", "vae", "init", "prior", "captions", "split", "cache", "validation_prompts", "prompts_file", "name")
TEXTS += ("data", "prior_prompt")  # values that are never read as numbers
PATHS = ("model", "vae", "init", "prior", "cache", "prompts_file", "name", "data", "folder")
