"""The options of diffusers' and kohya's training scripts: what they mean here, and what to do instead of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Alias:
    """Another tool's option: it gives the setting `name`, with `values` renamed; a `switch` sets this value."""

    name: str
    values: Mapping[Any, Any] | None = None
    switch: Any = None


# Learning rate schedules. Restarts and the power of a polynomial stay at their defaults (REFUSED has these options).
SCHEDULERS = {"constant_with_warmup": "constant", "cosine_with_restarts": "cosine", "polynomial": "linear"}
# What else these names mean: the rate falls from the end of the warm-up to 0, and `constant` has no warm-up.
CURVES: dict[str, dict[str, float]] = {
    "linear": {"decay_from": 0.0, "final_lr": 0.0},
    "polynomial": {"decay_from": 0.0, "final_lr": 0.0},
    "cosine": {"final_lr": 0.0},
    "cosine_with_restarts": {"final_lr": 0.0},
    "constant": {"warmup": 0},
}
ALIASES: dict[str, Alias] = {
    # diffusers
    "pretrained_model_name_or_path": Alias("model"),
    "pretrained_vae_model_name_or_path": Alias("vae"),
    "dataset_name": Alias("data"),
    "train_data_dir": Alias("data"),
    "instance_data_dir": Alias("data"),
    "class_data_dir": Alias("prior"),
    "num_class_images": Alias("prior_images"),
    "class_prompt": Alias("prior_prompt"),
    "prior_loss_weight": Alias("prior_weight"),
    "rank": Alias("lora_rank"),
    "lora_layers": Alias("targets"),
    "use_dora": Alias("train", switch="dora"),
    "train_text_encoder": Alias("text_encoder", switch=True),
    "torch_compile": Alias("compile", switch=True),
    "max_train_steps": Alias("steps"),
    "num_train_epochs": Alias("epochs"),
    "train_batch_size": Alias("batch_size"),
    "gradient_accumulation_steps": Alias("accumulation"),
    "lr": Alias("learning_rate"),
    "lr_scheduler": Alias("lr_schedule", SCHEDULERS),
    "lr_warmup_steps": Alias("warmup"),
    "max_grad_norm": Alias("clip"),
    "adam_weight_decay": Alias("weight_decay"),
    "use_8bit_adam": Alias("optimizer", switch="adamw8bit"),
    "ema_decay": Alias("ema"),
    "mixed_precision": Alias("precision", {"no": "fp32", False: "fp32"}),
    "center_crop": Alias("crop", switch="center"),
    "random_flip": Alias("flip", switch=0.5),
    "proportion_empty_prompts": Alias("caption_dropout"),
    "dataloader_num_workers": Alias("workers"),
    "checkpointing_steps": Alias("save_every"),
    "checkpoints_total_limit": Alias("keep"),
    "validation_prompt": Alias("validation_prompts"),
    "num_validation_images": Alias("samples"),
    "validation_steps": Alias("validate_every"),
    "validation_scheduler": Alias("sampler"),
    "offset_noise": Alias("noise_offset", switch=0.1),
    "enable_xformers_memory_efficient_attention": Alias("attention", switch="xformers"),
    # kohya's sd-scripts
    "network_dim": Alias("lora_rank"),
    "network_alpha": Alias("lora_alpha"),
    "network_weights": Alias("init"),
    "reg_data_dir": Alias("prior"),
    "unet_lr": Alias("learning_rate"),
    "optimizer_type": Alias("optimizer", {"AdamW": "adamw", "AdamW8bit": "adamw8bit", "SGD": "sgd"}),
    "max_train_epochs": Alias("epochs"),
    "enable_bucket": Alias("square", switch=False),
    "min_bucket_reso": Alias("min_side"),
    "max_bucket_reso": Alias("max_side"),
    "bucket_reso_steps": Alias("bucket_step"),
    "bucket_no_upscale": Alias("upscale", switch=False),
    "random_crop": Alias("crop", switch="random"),
    "flip_aug": Alias("flip", switch=0.5),
    "caption_dropout_rate": Alias("caption_dropout"),
    "alpha_mask": Alias("masks", switch=True),
    "shuffle_caption": Alias("shuffle_tags", switch=True),
    "keep_tokens": Alias("keep_tags"),
    "max_data_loader_n_workers": Alias("workers"),
    "validation_split": Alias("held_out"),
    "min_snr_gamma": Alias("snr_gamma"),
    "v_parameterization": Alias("prediction_type", switch="v_prediction"),
    "sample_prompts": Alias("prompts_file"),
    "sample_every_n_steps": Alias("validate_every"),
    "validate_every_n_steps": Alias("validate_every"),
    "sample_sampler": Alias("sampler"),
    "lr_scheduler_min_lr_ratio": Alias("final_lr"),
    "save_every_n_steps": Alias("save_every"),
    "save_precision": Alias("save_dtype"),
    "output_name": Alias("name"),
    "log_with": Alias("report_to"),
    "xformers": Alias("attention", switch="xformers"),
    "diffusers_xformers": Alias("attention", switch="xformers"),
    "mem_eff_attn": Alias("attention", switch="chunked"),
    "sdpa": Alias("attention", switch="sdpa"),
}
# What to do instead of options that do not exist here. They are refused unless their value is null or asks for what
# happens anyway: of `name=1|2` these are 1 and 2, of the switch `name?` it is false, of the switch `name!` true.
_INSTEAD = {
    # data
    "columns are found by their names: image or file_name, and text": """
        image_column=image caption_column=text|caption|prompt""",
    "give a folder with the images that are to be trained on, or owner/name of a set on the hub": """
        dataset_config_name dataset_class dataset_config max_train_samples debug_dataset? validation_images
        class_labels_conditioning""",
    "captions are NAME.txt or NAME.caption beside each image, or metadata.jsonl": """
        instance_prompt in_json caption_extension=.txt|.caption caption_extention=.txt|.caption""",
    "name the folder 10_name, or give --epochs": "repeats=1 num_repeats=1 dataset_repeats=1",
    "write the captions as they are to be read": """
        weighted_captions? enable_wildcard? caption_prefix= caption_suffix= caption_separator=, keep_tokens_separator=
        secondary_separator=""",
    "images are resized by Lanczos, --crop and --flip; changes of colour are not supported": """
        image_interpolation_mode=lanczos resize_interpolation=lanczos color_aug? face_crop_aug_range""",
    "masks are alpha channels, or NAME-mask.png beside NAME.png: put them there, and give --masks": """
        masked_loss? conditioning_data_dir""",
    "captions are dropped as a whole: --caption-dropout": """
        token_warmup_min=0|1 token_warmup_step=0|1 caption_dropout_every_n_epochs=0 caption_tag_dropout_rate=0""",
    "name what is to be kept: --prior FOLDER, or --prior-images N": """
        with_prior_preservation? sample_batch_size prior_generation_precision""",
    # the model
    "the tokenizer and the text encoder are the model's, and captions are read up to its length": """
        tokenizer_name tokenizer_max_length=75|77 max_token_length=75|77 clip_skip=0""",
    "write a revision behind the model's name, owner/name@revision; weights are found whatever their variant": """
        revision non_ema_revision variant""",
    "set HF_HOME in the environment": "cache_dir tokenizer_cache_dir",
    "use --train lora, dora or full, --targets for the layers, --text-encoder for the text encoder": """
        network_module=networks.lora network_args network_train_unet_only! network_train_text_encoder_only?
        dim_from_weights!""",
    "continue a LoRA by --init, or merge it into the model before": "base_weights base_weights_multiplier",
    "dropout and limits of the weights are not supported": "lora_dropout=0 network_dropout=0 scale_weight_norms",
    # how it learns
    "the average of the weights is always kept; with --ema 0 it is the weights themselves": "use_ema!",
    "there is one learning rate and one weight decay for all that is trained": """
        scale_lr? text_encoder_lr learning_rate_te learning_rate_te1 learning_rate_te2 block_lr
        adam_weight_decay_text_encoder""",
    "the schedules are constant, linear and cosine (--lr-schedule NAME); restarts are not supported": """
        lr_num_cycles=1 lr_scheduler_num_cycles=1 lr_power=1 lr_scheduler_power=1 lr_scheduler_type= lr_decay_steps=0
        lr_scheduler_args= lr_scheduler_timescale=""",
    "the optimizers are adamw, adamw8bit, muon and sgd (--optimizer NAME), with weight_decay=X and betas=[X,X]": """
        adam_beta1 adam_beta2 adam_epsilon=1e-8 optimizer_args prodigy_beta3 prodigy_decouple
        prodigy_use_bias_correction prodigy_safeguard_warmup schedulefree_wrapper_args use_lion_optimizer?
        optimizer_schedulefree_wrapper?""",
    "the loss is the squared error, which --snr-gamma weights": """
        loss_type=l2 huber_schedule=snr huber_c=0.1 huber_scale=1 dream_training? dream_detail_preservation=1
        do_edm_style_training? debiased_estimation_loss? scale_v_pred_loss_like_noise_pred? v_pred_like_loss""",
    "timesteps are drawn by --timesteps logit_normal and --timestep-shift X": """
        weighting_scheme=uniform|none logit_mean=0 logit_std=1 mode_scale=1.29 timestep_bias_strategy=none
        timestep_bias_begin=0 timestep_bias_end=1000 timestep_bias_portion=0.25 timestep_bias_multiplier=1
        min_timestep=0 max_timestep=1000""",
    "--noise-offset X is the only change of the noise": """
        input_perturbation=0 multires_noise_iterations=0 multires_noise_discount=0.3 ip_noise_gamma=0
        adaptive_noise_scale=0 perlin_noise=0 noise_offset_random_strength? ip_noise_gamma_random_strength?""",
    # progress and saving
    "give it in steps: --validate-every N, --save-every N, --keep N": """
        validation_epochs sample_every_n_epochs validate_every_n_epochs save_every_n_epochs save_n_epoch_ratio
        save_last_n_steps save_last_n_epochs save_last_n_steps_state save_last_n_epochs_state""",
    "validation always uses the same images, noise and timesteps, from before the first step on": """
        max_validation_steps validation_seed sample_at_first!""",
    "the log lies in the run's folder, and trackers use its name and their own variables of the environment": """
        logging_dir tracker_project_name log_tracker_name wandb_run_name log_prefix log_tracker_config wandb_api_key""",
    "nothing is ever uploaded": """
        push_to_hub? async_upload? save_state_to_huggingface? resume_from_huggingface? hub_model_id hub_token
        huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token
        huggingface_repo_visibility""",
    "safetensors are written, of a LoRA in both formats with its alpha": """
        output_kohya_format! save_model_as=safetensors no_metadata?""",
    "write it into the README.md beside the weights": """
        training_comment metadata_author metadata_description metadata_license metadata_tags metadata_title
        metadata_usage_hint metadata_thumbnail metadata_merged_from metadata_trigger_phrase metadata_preprocessor
        metadata_is_negative_embedding""",
    "a checkpoint has the whole state, and --resume continues exactly there": """
        save_state! save_state_on_train_end! skip_until_initial_step? initial_step initial_epoch""",
    "--config FILE takes settings, and every run writes RUN/settings.json": "config_file output_config?",
    # the machine
    "latents and embeddings are cached unless --cache off": """
        cache_latents! cache_latents_to_disk! cache_text_encoder_outputs! cache_text_encoder_outputs_to_disk!
        cache_info! pre_compute_text_embeddings!""",
    "weights are kept in fp32; --precision, --gradient-checkpointing and --attention save time and memory": """
        no_half_vae! allow_tf32? full_bf16? full_fp16? fp8_base? fp8_base_unet? fused_backward_pass? blocks_to_swap
        fused_optimizer_groups enable_npu_flash_attention?""",
    "DeepSpeed is not supported: start as many processes as there are GPUs by torchrun": """
        deepspeed? fp16_master_weights_and_gradients? zero3_init_flag? zero3_save_16bit_model? zero_stage
        offload_optimizer_device offload_optimizer_nvme_path offload_param_device offload_param_nvme_path""",
}
# Options that change nothing of what is learned, and are ignored with a line that says so.
_IDLE = """
    foreach_ema? offload_ema? set_grads_to_none? skip_save_text_encoder? text_encoder_use_attention_mask? debug_loss?
    v2? persistent_data_loader_workers? lowram? highvram? skip_cache_check? disable_mmap_load_safetensors? log_config?
    cpu_offload_checkpointing? ddp_gradient_as_bucket_view? ddp_static_graph? use_safetensors? console_log_simple?
    local_rank vae_batch_size text_encoder_batch_size ddp_timeout console_log_level console_log_file dynamo_backend"""


def _named(text: str) -> tuple[str, tuple[Any, ...]]:
    """An option as the tables above write it: its name, and the values that ask for what happens anyway."""
    name, equals, values = text.partition("=")
    if equals:
        return name, (None, *values.split("|"))
    return name.rstrip("!?"), (None, True) if name.endswith("!") else (None, False) if name.endswith("?") else (None,)


# Name -> (values that are accepted and ignored, what to do instead).
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    name: (neutral, hint) for hint, names in _INSTEAD.items() for name, neutral in map(_named, names.split())
}
IDLE = frozenset(name.rstrip("?") for name in _IDLE.split())
FOREIGN = frozenset([*ALIASES, *REFUSED, *IDLE])
# Options without a value, and options that take any number of values.
FOREIGN_SWITCHES = frozenset(
    name.rstrip("!?") for names in (*_INSTEAD.values(), _IDLE) for name in names.split() if name[-1] in "!?"
)
FOREIGN_SWITCHES |= {name for name, alias in ALIASES.items() if alias.switch is not None}
MANY = {"network_args", "optimizer_args", "lr_scheduler_args", "schedulefree_wrapper_args", "text_encoder_lr"}
MANY |= {"base_weights", "base_weights_multiplier", "validation_images"}


def alias_table() -> str:
    """The options of other tools beside ours, as --help prints them."""
    rows: dict[str, list[str]] = {}
    for foreign, alias in ALIASES.items():
        value = f" {str(alias.switch).lower()}" if alias.switch is not None else ""
        rows.setdefault(f"{alias.name}{value}", []).append(foreign)
    width = max(len(ours) for ours in rows)
    return "\n".join(f"  {ours:<{width}}  {', '.join(foreign)}" for ours, foreign in rows.items())
