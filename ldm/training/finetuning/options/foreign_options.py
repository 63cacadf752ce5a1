"""The words of diffusers' and kohya's training scripts: those that are taken, as what, and those that are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ALWAYS = (True, None)  # neutral values of a switch that asks for what happens anyway
NEVER = (False, None)
UNSAID = (None,)


@dataclass(frozen=True)
class Alias:
    """Another tool's word for one of ours; `values`: what theirs are called here; `switch`: it stands for this one."""

    word: str
    values: Mapping[Any, Any] | None = None
    switch: Any = None


# Their learning rates, where restarts and the power of a polynomial are left as they stand there (REFUSED has them).
SCHEDULERS = {"constant_with_warmup": "constant", "cosine_with_restarts": "cosine", "polynomial": "linear"}
# What a schedule is under their name: it falls from the end of the warm-up to 0, and `constant` has no warm-up.
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
    "save_precision": Alias("save_dtype", {"float": "fp32"}),
    "output_name": Alias("name"),
    "log_with": Alias("report_to"),
    "xformers": Alias("attention", switch="xformers"),
    "diffusers_xformers": Alias("attention", switch="xformers"),
    "mem_eff_attn": Alias("attention", switch="chunked"),
    "sdpa": Alias("attention", switch="sdpa"),
}
# What is known and not there: (values that change nothing, what to do instead, words). The first words are diffusers'.
_GROUPS: tuple[tuple[tuple, str, str], ...] = (
    # what is trained on
    ((None, "image"), "columns are found by their names: call it image or file_name", "image_column"),
    ((None, "text", "caption", "prompt"), "columns are found by their names: call it text", "caption_column"),
    (UNSAID, "name the set as owner/name, or give a folder", "dataset_config_name dataset_class"),
    (UNSAID, "give a folder with fewer pictures", "max_train_samples"),
    (NEVER, "say what is to be kept: --prior FOLDER, or --prior-images N", "with_prior_preservation"),
    (UNSAID, "is chosen by itself for the pictures of --prior-images", "sample_batch_size prior_generation_precision"),
    (UNSAID, "captions come with the pictures: NAME.txt beside each, or metadata.jsonl", "instance_prompt in_json"),
    (UNSAID, "is not for a model that draws from text", "validation_images class_labels_conditioning"),
    ((None, "lanczos"), "pictures are resized by Lanczos", "image_interpolation_mode resize_interpolation"),
    (
        (None, ".txt", ".caption"),
        "captions are found in .txt and .caption files by themselves",
        "caption_extension caption_extention",
    ),
    ((None, 1), "name the folder 10_name, or say --epochs", "repeats num_repeats dataset_repeats"),
    (UNSAID, "give the folder of pictures; kohya's 10_name folders are read", "dataset_config"),
    (NEVER, "is not supported: it would break the cache", "color_aug"),
    (UNSAID, "is not supported: --crop random, --flip", "face_crop_aug_range"),
    (NEVER, "masks are not supported", "alpha_mask masked_loss"),
    (UNSAID, "masks are not supported", "conditioning_data_dir"),
    (NEVER, "write the captions as they are to be read", "weighted_captions enable_wildcard"),
    (
        (None, ""),
        "write the captions as they are to be read",
        "caption_prefix caption_suffix keep_tokens_separator secondary_separator",
    ),
    ((None, ",", ", "), "the parts of a caption stand between commas", "caption_separator"),
    ((None, 0, 1), "is not supported: --caption-dropout", "token_warmup_min token_warmup_step"),
    ((None, 0), "is not supported: --caption-dropout", "caption_dropout_every_n_epochs caption_tag_dropout_rate"),
    ((None, 75, 77), "captions are read up to the text encoder's own length", "tokenizer_max_length max_token_length"),
    (UNSAID, "the tokenizer is the model's", "tokenizer_name"),
    ((None, 0), "the text encoder is used as the model has it", "clip_skip"),
    (NEVER, "--dry-run shows the counts", "debug_dataset"),
    # the model
    (UNSAID, "write it behind the name: --model owner/name@revision", "revision non_ema_revision"),
    (UNSAID, "the weights are found by themselves, whatever their variant", "variant"),
    (UNSAID, "set HF_HOME in the environment", "cache_dir tokenizer_cache_dir"),
    ((None, "networks.lora"), "LoRA and DoRA are supported: --train lora, --train dora", "network_module"),
    (UNSAID, "say --targets for the layers, --train dora for DoRA", "network_args"),
    (ALWAYS, "the text encoder is trained with --text-encoder alone", "network_train_unet_only"),
    (NEVER, "the U-Net is always trained", "network_train_text_encoder_only"),
    (ALWAYS, "a LoRA that is gone on from brings its own ranks", "dim_from_weights"),
    (UNSAID, "go on from a LoRA by --init, or merge it into the model before", "base_weights base_weights_multiplier"),
    ((None, 0), "dropout is not supported: --caption-dropout", "lora_dropout network_dropout"),
    (UNSAID, "is not supported: lower the learning rate, or --lora-alpha", "scale_weight_norms"),
    # how it learns
    (ALWAYS, "an average of the weights is always kept; ema=0 makes it the weights themselves", "use_ema"),
    (NEVER, "say the learning rate itself", "scale_lr"),
    (
        UNSAID,
        "there is one learning rate for all that is trained",
        "text_encoder_lr learning_rate_te learning_rate_te1 learning_rate_te2 block_lr",
    ),
    (UNSAID, "there is one weight decay for all that is trained", "adam_weight_decay_text_encoder"),
    ((None, 1), "restarts are not supported", "lr_num_cycles lr_scheduler_num_cycles"),
    ((None, 1), "polynomial schedules are not supported", "lr_power lr_scheduler_power"),
    (
        (None, "", 0),
        "there are constant, linear and cosine: --lr-schedule NAME",
        "lr_scheduler_type lr_scheduler_args lr_scheduler_timescale lr_decay_steps",
    ),
    (UNSAID, "say both: betas=[0.9,0.99]", "adam_beta1 adam_beta2"),
    ((None, 1e-8), "is 1e-8", "adam_epsilon"),
    (UNSAID, "say weight_decay=X and betas=[X,X]", "optimizer_args"),
    (
        UNSAID,
        "there are adamw, adamw8bit, muon and sgd: --optimizer NAME",
        "prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup schedulefree_wrapper_args",
    ),
    (
        NEVER,
        "there are adamw, adamw8bit, muon and sgd: --optimizer NAME",
        "use_lion_optimizer optimizer_schedulefree_wrapper",
    ),
    (NEVER, "is not supported", "dream_training do_edm_style_training"),
    ((None, 1), "is not supported", "dream_detail_preservation"),
    (NEVER, "is not supported; --snr-gamma weighs the loss", "debiased_estimation_loss"),
    (NEVER, "is not supported; --snr-gamma weighs the loss", "scale_v_pred_loss_like_noise_pred"),
    (UNSAID, "is not supported; --snr-gamma weighs the loss", "v_pred_like_loss"),
    ((None, "l2", "snr", 0.1, 1), "the loss is the squared error", "loss_type huber_schedule huber_c huber_scale"),
    ((None, "uniform", "none"), "say --timesteps logit_normal, or --timestep-shift X", "weighting_scheme"),
    ((None, 0, 1, 1.29), "say --timesteps logit_normal, or --timestep-shift X", "logit_mean logit_std mode_scale"),
    ((None, "none"), "say --timestep-shift X", "timestep_bias_strategy"),
    (
        (None, 0, 0.25, 1, 1000),
        "say --timestep-shift X",
        "timestep_bias_begin timestep_bias_end timestep_bias_portion timestep_bias_multiplier",
    ),
    ((None, 0), "all timesteps are trained; --timestep-shift moves their middle", "min_timestep"),
    ((None, 1000), "all timesteps are trained; --timestep-shift moves their middle", "max_timestep"),
    (
        (None, 0),
        "is not supported; --noise-offset is near",
        "input_perturbation multires_noise_iterations ip_noise_gamma adaptive_noise_scale perlin_noise",
    ),
    ((None, 0.3), "is not supported; --noise-offset is near", "multires_noise_discount"),
    (NEVER, "is not supported", "noise_offset_random_strength ip_noise_gamma_random_strength"),
    # progress
    (UNSAID, "say it in steps: --validate-every N", "validation_epochs sample_every_n_epochs validate_every_n_epochs"),
    (UNSAID, "it is always of the same pictures, noise and timesteps", "max_validation_steps validation_seed"),
    (ALWAYS, "the grid is drawn before the first step too", "sample_at_first"),
    (UNSAID, "the log and its page lie in the run's folder", "logging_dir"),
    (UNSAID, "it is the name of the run's folder", "tracker_project_name log_tracker_name wandb_run_name log_prefix"),
    (UNSAID, "set what the tracker's package reads in the environment", "log_tracker_config wandb_api_key"),
    # saving
    (NEVER, "nothing is ever uploaded", "push_to_hub async_upload save_state_to_huggingface resume_from_huggingface"),
    (
        UNSAID,
        "nothing is ever uploaded",
        "hub_model_id hub_token huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token "
        "huggingface_repo_visibility",
    ),
    (ALWAYS, "both formats are always written", "output_kohya_format"),
    ((None, "safetensors"), "only safetensors is written", "save_model_as"),
    (NEVER, "a LoRA's alpha is always written", "no_metadata"),
    (
        UNSAID,
        "write it into the README.md beside the weights",
        "training_comment metadata_author metadata_description metadata_license metadata_tags metadata_title "
        "metadata_usage_hint metadata_thumbnail metadata_merged_from metadata_trigger_phrase metadata_preprocessor "
        "metadata_is_negative_embedding",
    ),
    (UNSAID, "say it in steps: --save-every N", "save_every_n_epochs save_n_epoch_ratio"),
    (
        UNSAID,
        "say --keep N",
        "save_last_n_steps save_last_n_epochs save_last_n_steps_state save_last_n_epochs_state",
    ),
    (ALWAYS, "a checkpoint always has the whole state", "save_state save_state_on_train_end"),
    (NEVER, "--resume goes on exactly where the run was", "skip_until_initial_step"),
    (UNSAID, "--resume goes on exactly where the run was", "initial_step initial_epoch"),
    (UNSAID, "say --config FILE, with the names of these options", "config_file"),
    (NEVER, "every run leaves RUN/settings.json, which --config takes", "output_config"),
    # the machine
    (
        ALWAYS,
        "latents and embeddings are cached unless --cache off",
        "cache_latents cache_latents_to_disk cache_text_encoder_outputs cache_text_encoder_outputs_to_disk cache_info "
        "pre_compute_text_embeddings",
    ),
    (ALWAYS, "the VAE works in fp32", "no_half_vae"),
    (NEVER, "is not supported: --precision bf16 is faster", "allow_tf32"),
    (NEVER, "what is trained stays fp32: --precision bf16, --precision fp16", "full_bf16 full_fp16"),
    (NEVER, "is not supported: --gradient-checkpointing saves memory", "fp8_base fp8_base_unet fused_backward_pass"),
    (UNSAID, "is not supported: --gradient-checkpointing saves memory", "blocks_to_swap fused_optimizer_groups"),
    (NEVER, "say --attention NAME", "enable_npu_flash_attention"),
    (
        NEVER,
        "DeepSpeed is not supported: start as many processes as there are GPUs by torchrun",
        "deepspeed fp16_master_weights_and_gradients zero3_init_flag zero3_save_16bit_model",
    ),
    (
        UNSAID,
        "DeepSpeed is not supported: start as many processes as there are GPUs by torchrun",
        "zero_stage offload_optimizer_device offload_optimizer_nvme_path offload_param_device offload_param_nvme_path",
    ),
)
REFUSED: dict[str, tuple[tuple, str]] = {
    word: (neutral, sentence) for neutral, sentence, words in _GROUPS for word in words.split()
}
# What changes nothing of what is learned, and is not there: said in one line. Switches, then words with a value.
_IDLE = (
    "foreach_ema offload_ema set_grads_to_none skip_save_text_encoder text_encoder_use_attention_mask debug_loss v2 "
    "persistent_data_loader_workers lowram highvram skip_cache_check disable_mmap_load_safetensors log_config "
    "cpu_offload_checkpointing ddp_gradient_as_bucket_view ddp_static_graph use_safetensors console_log_simple "
)
_IDLE_VALUES = "local_rank vae_batch_size text_encoder_batch_size ddp_timeout console_log_level console_log_file "
_IDLE_VALUES += "dynamo_backend"
IDLE = frozenset(f"{_IDLE} {_IDLE_VALUES}".split())
# Of the words above those that stand alone, and those that take any number of values.
ALONE = frozenset(_IDLE.split()) | {word for word, (neutral, _) in REFUSED.items() if neutral in (ALWAYS, NEVER)}
ALONE |= {word for word, alias in ALIASES.items() if alias.switch is not None}
MANY = {"network_args", "optimizer_args", "lr_scheduler_args", "schedulefree_wrapper_args", "text_encoder_lr"}
MANY |= {"base_weights", "base_weights_multiplier", "validation_images"}
