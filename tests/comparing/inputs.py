"""What both commits of `compare_commits.py` are given: models, LoRAs, images, prompt files and captioned images.

Made by torch, diffusers, transformers and Pillow alone, and never by ldm, so that no commit has a hand in it. All is
seeded: on one machine and with one set of libraries the folder comes out the same.

    INPUTS/models/{default,sd,flow,inpaint,xl,t5}   INPUTS/loras   INPUTS/images   INPUTS/prompts   INPUTS/captioned
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

WORDS = ("a", "cat", "dog", "red", "blue", "on", "and")
MAX_LENGTH = 16  # tokens of the tiny tokenizer, start and end included
SIDE = 64  # pixels of the tiny models
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
BLOCK = "down_blocks.{level}.attentions.0.transformer_blocks.0"


def make_inputs(folder: Path, default_model: Path) -> Path:
    """Write everything into `folder`, which must not exist; `default_model` is copied as the default model."""
    folder.mkdir(parents=True)
    shutil.copytree(default_model, folder / "models/default")
    for name in ("sd", "flow", "inpaint", "xl", "t5"):
        write_model(name, folder / "models" / name)
    _write_loras(folder / "loras")
    _write_images(folder / "images")
    _write_prompts(folder / "prompts")
    write_captioned(folder / "captioned")
    return folder


# Models


def _tiny_tokenizer() -> Any:
    """CLIP's tokenizer with every byte and a few whole words."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in WORDS:
        left = word[0]
        for i in range(1, len(word)):
            right = word[i] + ("</w>" if i == len(word) - 1 else "")
            if left + right not in tokens:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def _clip(width: int, seed: int, act: str = "quick_gelu", projected: bool = False, **ids: int) -> tuple[Any, Any]:
    """A random CLIP text encoder whose words differ, and its tokenizer."""
    import transformers

    tokenizer = _tiny_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        hidden_act=act,
        projection_dim=24,
        bos_token_id=0,
        **{"eos_token_id": 2, "pad_token_id": 1, **ids},
    )
    torch.manual_seed(seed)
    model = (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)
    model.get_input_embeddings().weight.data.normal_(0, 1)
    if projected:
        model.text_projection.weight.data.normal_(0, 0.3)
    return model.eval(), tokenizer


def _t5(width: int) -> tuple[Any, Any]:
    """A random T5 encoder, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=8, **special)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    ids = {"vocab_size": 16, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(3)
    model = T5EncoderModel(T5Config(**sizes, **ids, feed_forward_proj="gated-gelu")).eval()
    model.shared.weight.data.normal_(0, 1)
    return model, tokenizer


def _unet(**settings: Any) -> Any:
    """A random U-Net, scaled until the text matters and images have contrast."""
    import diffusers

    common = {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": SIDE // 4,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    }
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(**{**common, **settings}).eval()
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_v", "attn2.to_out.0")):
            module.weight.data *= 4
    unet.conv_out.weight.data *= 3
    return unet


def random_vae(**settings: Any) -> Any:
    """A random autoencoder of factor 4, which the tests use too; `settings` are diffusers' that differ."""
    import diffusers

    torch.manual_seed(2)
    sizes = {"block_out_channels": [8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": SIDE}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    vae = diffusers.AutoencoderKL(**{**blocks, **sizes, "scaling_factor": 0.18215, **settings}).eval()
    vae.decoder.conv_out.weight.data *= 2
    return vae


XL_UNET = {
    "cross_attention_dim": 80,
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 24,
}
FLOW = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLOW |= {"flow_shift": 2.0, "algorithm_type": "dpmsolver++", "num_train_timesteps": 1000}


def write_model(name: str, folder: Path) -> None:
    """A tiny random model as a diffusers folder."""
    import diffusers

    vae, scheduler = random_vae(), diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False)
    if name == "xl":
        (first, tokenizer), (second, tokenizer_2) = _clip(32, 2), _clip(48, 3, "gelu", projected=True)
        tokenizer_2.pad_token = "!"
        parts = (vae, first, second, tokenizer, tokenizer_2, _unet(**XL_UNET))
        scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading")
        diffusers.StableDiffusionXLPipeline(*parts, scheduler, add_watermarker=False).save_pretrained(folder)
        return
    text, tokenizer = _clip(32, 2)
    unet = _unet(in_channels=9 if name == "inpaint" else 4)
    pipe = diffusers.StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, None, False)
    pipe.save_pretrained(folder)
    if name == "flow":
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(FLOW))
    elif name == "t5":
        _put_t5(folder)
    elif name == "inpaint":
        _change_json(folder / "model_index.json", _class_name="StableDiffusionInpaintPipeline")


def _put_t5(folder: Path) -> None:
    """T5 in the place of the text encoder of a folder."""
    for part, made in zip(("text_encoder", "tokenizer"), _t5(32)):
        shutil.rmtree(folder / part)
        made.save_pretrained(folder / part)
    parts = {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"]}
    _change_json(folder / "model_index.json", **parts)


def _change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# LoRAs


def _write_loras(folder: Path) -> None:
    """Of the tiny model in the layouts of PEFT, kohya and kohya's DoRA; of the default model in PEFT's."""
    folder.mkdir()
    source = torch.Generator().manual_seed(5)

    def pair(rank: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        down = torch.randn(rank, inputs, generator=source)
        return down, 0.2 * torch.randn(outputs, rank, generator=source)

    def peft(layers: dict[str, tuple[int, int]], rank: int) -> dict[str, torch.Tensor]:
        found = {}
        for layer, (inputs, outputs) in layers.items():
            found[f"{layer}.lora_A.weight"], found[f"{layer}.lora_B.weight"] = pair(rank, inputs, outputs)
        return found

    block, wide = (f"unet.{BLOCK.format(level=level)}" for level in (0, 1))
    text = "text_encoder.text_model.encoder.layers.1.self_attn"
    plain = {f"{block}.attn1.to_q": (32, 32), f"{block}.attn2.to_k": (32, 32), f"{text}.q_proj": (32, 32)}
    save_file(peft(plain, 2), folder / "peft.safetensors")
    of_default = {f"{wide}.attn2.to_v": (192, 192), f"{wide}.attn1.to_q": (192, 192)}
    save_file(peft(of_default, 4), folder / "default.safetensors")
    flat = "lora_unet_" + BLOCK.format(level=0).replace(".", "_")
    for name in ("kohya", "dora"):
        tensors = {}
        for layer in (f"{flat}_attn2_to_v", f"{flat}_attn1_to_out_0", "lora_te_text_model_encoder_layers_0_mlp_fc1"):
            outputs = 64 if layer.endswith("fc1") else 32
            tensors[f"{layer}.lora_down.weight"], tensors[f"{layer}.lora_up.weight"] = pair(3, 32, outputs)
            tensors[f"{layer}.alpha"] = torch.tensor(2.0)
            if name == "dora":
                tensors[f"{layer}.dora_scale"] = 0.5 + torch.rand(outputs, 1, generator=source)
        save_file(tensors, folder / f"{name}.safetensors")


# Images, prompts, captions

A1111 = """a red cat on blue
Negative prompt: a dog
Steps: 4, Sampler: DPM++ 2M Karras, CFG scale: 5, Seed: 41, Size: 64x64, Clip skip: 2"""


def _image(number: int, width: int, height: int) -> Image.Image:
    """Smooth noise."""
    noise = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def _mask(side: int) -> Image.Image:
    """A white box with grey edges on black."""
    values = np.zeros((side, side), dtype=np.uint8)
    values[side // 4 : -side // 4, side // 8 : -side // 4] = 100
    values[side // 4 + 4 : -side // 4 - 4, side // 8 + 4 : -side // 4 - 4] = 255
    return Image.fromarray(values)


def _write_images(folder: Path) -> None:
    folder.mkdir()
    for side in (64, 128):
        _image(side, side, side).save(folder / f"image-{side}.png")
        _mask(side).save(folder / f"mask-{side}.png")
    _image(3, 80, 64).save(folder / "wide.png")
    text = PngInfo()
    text.add_text("parameters", A1111)
    _image(4, SIDE, SIDE).save(folder / "a1111.png", pnginfo=text)


PLAIN = """# lines of three syntaxes, with templates and wildcards
a red cat
a {red|blue} cat on __thing__
a red cat
--prompt "a blue dog" --negative_prompt "a cat" --steps 3 --cfg_scale 4.5 --seed 11 --sampler_name "DPM++ 2M Karras"
a dog --n a red cat --w 72 --h 56 --d 5 --s 2 --l 7.5 --ss euler_a
{2$$a cat|a dog|red|blue} and a ((cat:1.2), [dog]) --batch_size 2
a cat --stepz 3
a (red:1.4) cat BREAK a [cat:dog:0.5] on [red|blue] --n_iter 2 --seed 3 --clip_skip 2
a <lora:kohya:0.6> cat --d 9
"""
ROWS = (
    "prompt,seed,steps,image,strength,mask_image,name\n"
    "a red cat,4,4,../images/image-64.png,0.5,,from-image\n"
    '"a dog, on blue",5,4,../images/image-64.png,0.9,../images/mask-64.png,masked\n'
    "a cat,,2,,,,\n"
)


def _write_prompts(folder: Path) -> None:
    (folder / "words").mkdir(parents=True)
    (folder / "words/thing.txt").write_text("red\nblue\na {dog|cat}\n")
    (folder / "plain.txt").write_text(PLAIN)
    (folder / "table.csv").write_text(ROWS)
    groups = [
        {"prompt": "a red cat", "seed": [3, 9], "cfg_scale": 1, "num_inference_steps": 2},
        {"prompt": "a cat", "image": "../images/wide.png", "denoising_strength": 0.6, "seed": 2, "steps": 4},
        {"prompt": "a dog", "lora": {"../loras/peft.safetensors": 0.7}, "size": [64, 80], "name": "with lora"},
        {"prompt": "a blue dog", "negative": "red", "sampler": "ddim", "eta": 0.5, "spacing": "karras", "n_iter": 2},
    ]
    (folder / "groups.json").write_text(json.dumps(groups))
    (folder / "default.txt").write_text("a cat on a blue background --d 3\n{a dog|two pizzas} --s 3\n")
    (folder / "grid.txt").write_text("a red cat\na blue dog --d 8\n")


def write_captioned(folder: Path) -> None:
    """Eight captioned images of two shapes."""
    folder.mkdir()
    for i in range(8):
        _image(20 + i, *((SIDE, SIDE) if i % 4 else (80, 48))).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {('red', 'blue')[i % 2]} {('cat', 'dog')[i // 2 % 2]}, on {i}")
