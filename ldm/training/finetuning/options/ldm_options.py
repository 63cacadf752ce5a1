"""The settings of a fine-tuning by the names of their options, and the options of the command line among them."""

from __future__ import annotations

import dataclasses

from ldm.training.settings import FinetuneSettings

NO_OPTIONS = ("stage", "data", "workers")  # fields of FinetuneSettings that are no options; data.workers is one
_DATA = next(f.default_factory for f in dataclasses.fields(FinetuneSettings) if f.name == "data")
KEYS: dict[str, str] = {f.name: f.name for f in dataclasses.fields(FinetuneSettings) if f.name not in NO_OPTIONS}
KEYS |= {f.name: f"data.{f.name}" for f in dataclasses.fields(_DATA)}
NULLABLE = {f.name for f in dataclasses.fields(FinetuneSettings) if "None" in str(f.type)}
NULLABLE |= {f"data.{f.name}" for f in dataclasses.fields(_DATA) if "None" in str(f.type)}
KEYS |= {"data": "data.folder", "epochs": "epochs", "prompts_file": "validation_prompts"}


# The command line's options by group: name -> (what stands for its value; None: a switch, what it does).
OPTIONS: dict[str, dict[str, tuple[str | None, str]]] = {
    "what is trained": {
        "model": ("MODEL", "a diffusers folder, a .safetensors file or a hub id (the shipped model)"),
        "vae": ("PATH", "another VAE's folder or file"),
        "text_encoders": ("PATH", "what a file of SD3 or FLUX lacks of CLIP and T5; several times"),
        "train": ("KIND", "lora, dora or full: the whole network (lora)"),
        "lora_rank": ("N", "(16; a small model: 32)"),
        "lora_alpha": ("X", "the update is scaled by alpha / rank (the rank)"),
        "targets": (
            "NAME,…",
            "attention, transformer, all-linear, all, or names of layers or their ends (attention; small: all)",
        ),
        "text_encoder": (None, "train the text encoder too (CLIP alone)"),
        "init": ("FILE", "a LoRA or DoRA to continue"),
        "control": ("KIND", "train a ControlNet instead: edges, lineart, segmentation, … or a folder of conditions"),
        "control_init": ("NET", "the ControlNet to go on from (the U-Net's own way down)"),
        "control_channels": ("N,…", "widths of its levels, for a smaller one than the U-Net's (the U-Net's)"),
        "control_embedding": ("N,…", "widths of what reads the control image (16,32,96,256)"),
    },
    "how long": {
        "steps": ("N", "optimizer steps (by the number of images and the model's size)"),
        "epochs": ("X", "instead of steps: passes over the images"),
        "batch_size": ("N", "images that go through the network at once (by the model and the memory)"),
        "accumulation": ("N", "batches of a step (by the model and the memory)"),
        "learning_rate": ("X", "(by the model's size)"),
        "lr_schedule": ("NAME", "constant, linear, cosine (cosine)"),
        "warmup": ("N", "steps in which the learning rate rises"),
        "optimizer": ("NAME", "adamw, adamw8bit, muon, sgd (adamw)"),
        "ema": ("X", "decay of the average of the weights that is saved; 0: the weights themselves"),
        "seed": ("N", "(0)"),
    },
    "the loss": {
        "prediction_type": ("NAME", "epsilon, v_prediction, sample, flow (the model's)"),
        "snr_gamma": ("X", "min-SNR weighting; null: none (5; small models and flow: none)"),
        "noise_offset": ("X", "(0)"),
        "timesteps": ("NAME", "uniform or logit_normal (uniform; small models, SD3 and FLUX: logit_normal)"),
        "timestep_shift": (
            "X",
            "above 1: train more often at high noise; null: as the model is drawn with (1; small: 2; SD3, FLUX: null)",
        ),
        "embedded_guidance": ("X", "value of FLUX.1-dev's guidance input in training (1)"),
        "zero_terminal_snr": (None, "rescale the schedule, with --train full"),
        "prior": ("FOLDER", "captioned images of what the model must keep, trained in each step"),
        "prior_images": (
            "N",
            "instead: N images that the model draws itself before training (0; the default model: 320)",
        ),
        "prior_prompt": ("TEXT", "what these show (of the default model: what it was trained on)"),
        "prior_weight": ("X", "(1; the default model: 3)"),
        "prior_target": (
            "WHAT",
            "images, or model: what it predicted before, for LoRA and DoRA (images; the default model: model)",
        ),
    },
    "the images": {
        "resolution": ("PIXELS", "(the model's)"),
        "captions": ("HOW", "auto, names: of folders and files, or whole: a file is one caption (auto)"),
        "split": (
            "NAME",
            "of data that has splits, or all (train, if 95 %% of the images are in it; else you are asked)",
        ),
        "layout": ("NAME", "of a folder that can be read in several ways: files, kohya, metadata, tars, parquet"),
        "exclude": ("PATTERN,…", "files and folders that are left out: 'sample/*', '*.gif'"),
        "square": (None, "no buckets: every image is cropped to a square"),
        "min_side": ("PIXELS", "of a bucket"),
        "max_side": ("PIXELS", "of a bucket"),
        "bucket_step": ("PIXELS", "(8, above 256 pixels 64)"),
        "crop": ("HOW", "center or random; random needs --cache off (center)"),
        "flip": ("X", "share of the images that is mirrored (0)"),
        "caption_dropout": ("X", "share of the images that is trained without its caption (0.1; the default model: 0)"),
        "masks": (None, "learn only what an alpha channel, or NAME-mask.png beside the image, shows"),
        "shuffle_tags": (None, "shuffle the comma-separated parts of a caption each time"),
        "keep_tags": ("N", "parts that stay at the beginning (0)"),
        "held_out": ("X", "share of the images that is kept for validation (0.05)"),
        "max_bad": ("X", "share of the images that may be unusable (0.05)"),
        "allow_empty_captions": (None, "train on images without captions too"),
        "cache": ("FOLDER", "of latents and embeddings, or off (RUN/cache)"),
    },
    "progress": {
        "validate_every": ("N", "steps between two validation losses and sample grids"),
        "validation_prompts": (
            "TEXT",
            "of the sample grid; may be given several times (captions of held-out images)",
        ),
        "prompts_file": ("FILE", "the same from a file, one a line"),
        "samples": ("N", "images of the grid, where captions are drawn (8)"),
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
        "gradient_checkpointing": (None, "compute activations twice instead of keeping them"),
        "attention": ("NAME", "of the U-Net: auto, sdpa, chunked, xformers"),
        "workers": ("N", "threads that read images where nothing is cached (1)"),
    },
}
SWITCHES = frozenset(name for group in OPTIONS.values() for name, (value, _) in group.items() if value is None)
TEXTS = ("model", "vae", "init", "prior", "captions", "split", "cache", "validation_prompts", "prompts_file", "name")
TEXTS += (
    "data",
    "prior_prompt",
    "layout",
    "exclude",
    "control",
    "control_init",
    "text_encoders",
)  # never read as numbers
PATHS = ("model", "vae", "init", "prior", "cache", "prompts_file", "name", "data", "folder", "control")
PATHS += ("control_init", "text_encoders")
