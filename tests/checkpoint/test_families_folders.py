"""Folders of Stable Diffusion 1.5, 2.1-v and XL as diffusers writes them, at a small width: our images are theirs."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from ldm import Pipeline
from ldm.checkpoint import load_model, save_model
from ldm.checkpoint.parts import load_text_from
from ldm.errors import ConfigError, ModelError
from ldm.nn.text import XLText
from tests.comparing.inputs import random_vae
from tests.conftest import MAX_LENGTH, tiny_tokenizer

PROMPTS, NEGATIVES = ["a red cat", "a dog and a blue dog"], ["blue", "a dog on red"]
STEPS, SCALE, SIZE = 5, 7.5, 64
SAMPLERS = {
    "euler": "EulerDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
BETAS |= {"timestep_spacing": "leading"}
DDIM = {"clip_sample": False, "set_alpha_to_one": False}  # as Stable Diffusion's own files say
FAMILIES = ("1.5", "2.1-v", "xl")


def text_encoder(act, width, seed, projected=False, **ids):
    """A random text encoder whose words differ, and CLIP's tokenizer that pads as the model's own does."""
    import transformers

    tokenizer = tiny_tokenizer()
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
        **{"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1, **ids},
    )
    torch.manual_seed(seed)
    model = (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)
    model.get_input_embeddings().weight.data.normal_(0, 1)
    if projected:
        model.text_projection.weight.data.normal_(0, 0.3)
    return model.eval(), tokenizer


def networks(**settings):
    """A U-Net and a VAE, scaled until text matters and images have contrast."""
    import diffusers

    torch.manual_seed(1)
    common = {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 16,
    }
    unet = diffusers.UNet2DConditionModel(**{**common, **settings}).eval()
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_v", "attn2.to_out.0")):
            module.weight.data *= 4
    unet.conv_out.weight.data *= 3
    return unet, random_vae()


def build(family):
    """diffusers' own pipeline of the family."""
    import diffusers

    if family == "xl":
        first, tokenizer = text_encoder("quick_gelu", 32, 2)
        second, tokenizer_2 = text_encoder("gelu", 48, 3, projected=True, eos_token_id=2)
        tokenizer_2.pad_token = "!"
        unet, vae = networks(
            cross_attention_dim=80,
            attention_head_dim=[2, 4],
            use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2],
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
        )
        scheduler = diffusers.EulerDiscreteScheduler.from_config({**BETAS, **DDIM})  # so on the hub
        return diffusers.StableDiffusionXLPipeline(
            vae, first, second, tokenizer, tokenizer_2, unet, scheduler, add_watermarker=False
        )
    if family == "1.5":
        text, tokenizer = text_encoder("quick_gelu", 32, 2, eos_token_id=2)
        unet, vae = networks(cross_attention_dim=32, attention_head_dim=4)
        scheduler = diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False)
    else:
        text, tokenizer = text_encoder("gelu", 48, 2)
        tokenizer.pad_token = "!"
        unet, vae = networks(cross_attention_dim=48, attention_head_dim=[2, 4], use_linear_projection=True)
        scheduler = diffusers.DDIMScheduler(**BETAS, **DDIM, prediction_type="v_prediction")
    return diffusers.StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, None, False)


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """family -> (diffusers' pipeline, the folder that it saved, our model of it)."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp("families") / family
        pipe = build(family)
        pipe.save_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        found[family] = pipe, folder, load_model(folder, "cpu", "fp32", cache=False)
    return found


def noise():
    return torch.randn((len(PROMPTS), 4, SIZE // 4, SIZE // 4), generator=torch.Generator().manual_seed(5))


def theirs(pipe, sampler, negatives=NEGATIVES):
    """(images (B, H, W, 3) in 0..255, final latents) of diffusers' pipeline."""
    import diffusers

    own = DDIM if sampler == "ddim" else {}
    pipe.scheduler = getattr(diffusers, SAMPLERS[sampler]).from_config(pipe.scheduler.config, **own)
    kept = []

    def keep(pipe, step, timestep, kwargs):
        kept.append(kwargs["latents"].clone())
        return kwargs

    size = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, "guidance_scale": SCALE}
    out = pipe(PROMPTS, negative_prompt=negatives, latents=noise(), output_type="np", callback_on_step_end=keep, **size)
    return 255 * out.images, kept[-1]


def ours(model, sampler, negatives=NEGATIVES, **other):
    """The same of ours; the latents are those that are decoded."""
    kept, decode = [], model.vae.decode
    model.vae.decode = lambda latents, tile=None: kept.append(latents) or decode(latents, tile)
    try:
        pipe = Pipeline(PROMPTS, model, negative_prompt=negatives)
        settings = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "sampler": sampler, "latents": noise()}
        images = pipe.generate(**settings, **other)
    finally:
        del model.vae.decode
    return pixels(images), torch.cat(kept)


def pixels(images):
    return np.stack([np.asarray(image, dtype=float) for image in images])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_images_are_those_of_diffusers(families, family, sampler):
    pipe, _, model = families[family]
    images, latents = theirs(pipe, sampler)
    mine, final = ours(model, sampler)
    assert np.abs(mine - images).max() <= 1
    assert (final - latents).norm() <= 1e-4 * latents.norm()
    # that could not be by chance: images have contrast, and what is wrong shows
    assert images.std() > 25 and np.abs(images[0] - images[1]).max() > 5
    swapped, _ = ours(model, sampler, NEGATIVES[::-1])
    assert all(np.abs(a - b).max() > 5 for a, b in zip(swapped, images))
    schedule = model.schedule
    other = "epsilon" if schedule.prediction_type == "v_prediction" else "v_prediction"
    wrong = dataclasses.replace(model, schedule=dataclasses.replace(schedule, prediction_type=other))
    assert all(np.abs(a - b).max() > 5 for a, b in zip(ours(wrong, sampler)[0], images))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_negative_prompt_and_an_empty_one_differ_for_xl_as_in_diffusers(families, sampler):
    pipe, _, model = families["xl"]
    images = {}
    for negatives in (None, ""):
        expected, latents = theirs(pipe, sampler, None if negatives is None else [""] * len(PROMPTS))
        images[negatives], final = ours(model, sampler, negatives)
        assert np.abs(images[negatives] - expected).max() <= 1
        assert (final - latents).norm() <= 1e-4 * latents.norm()
    assert np.abs(images[None] - images[""]).max() > 5


def test_where_the_folder_says_so_no_negative_prompt_is_the_empty_one(families, tmp_path):
    _, folder, model = families["xl"]
    shutil.copytree(folder, tmp_path / "xl")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] is True and model.text.zero_empty
    (tmp_path / "xl/model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    changed = load_model(tmp_path / "xl", "cpu", "fp32", cache=False)
    nothing, empty = (ours(changed, "euler", negatives)[0] for negatives in (None, ""))
    assert np.array_equal(nothing, empty) and np.array_equal(empty, ours(model, "euler", "")[0])


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_the_text_of_xl_is_that_of_diffusers(families, clip_skip):
    pipe, _, model = families["xl"]
    states, _, pooled, _ = pipe.encode_prompt(PROMPTS, device="cpu", clip_skip=clip_skip or None)
    found = model.text.encode(PROMPTS, clip_skip)
    assert torch.allclose(found.states, states, atol=1e-5) and torch.allclose(found.pooled, pooled, atol=1e-5)
    assert model.text.width == 80 and len(model.text.modules) == 2 and found.mask is None
    with pytest.raises(ConfigError, match="clip_skip"):
        model.text.encode(PROMPTS, 2)  # of three layers


def test_an_xl_image_is_the_same_alone_in_a_batch_and_from_the_folder(families):
    _, folder, model = families["xl"]
    settings = {"num_inference_steps": 3, "guidance_scale": SCALE, "seed": 7, "num_images": 2}
    several = Pipeline(PROMPTS, model, negative_prompt=None).generate(**settings)
    alone = Pipeline(PROMPTS[1], folder, negative_prompt=None, device="cpu", dtype="fp32").generate(
        **{**settings, "num_images": 1}
    )
    assert np.array_equal(pixels(several)[2], pixels(alone)[0])
    assert several.metadata[2]["negative_prompt"] is None and several.metadata[2]["width"] == SIZE
    wide = Pipeline(PROMPTS[0], model).generate(**{**settings, "num_images": 1}, width=SIZE + 32)
    assert wide[0].size == (SIZE + 32, SIZE)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_again_the_folder_is_what_diffusers_would_write_and_reads(families, family, tmp_path):
    import diffusers

    pipe, folder, model = families[family]
    saved = save_model(model, tmp_path / "saved", dtype="fp32")
    theirs_index, index = (json.loads((root / "model_index.json").read_text()) for root in (folder, saved))
    theirs_index["scheduler"] = index["scheduler"]  # ours is written as DDIM's
    assert index == theirs_index
    again = load_model(saved, "cpu", "fp32", cache=False)
    for one, other in zip(model.text.modules, again.text.modules, strict=True):
        assert type(one) is type(other)
        pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
        assert all(n == m and torch.equal(a, b) for (n, a), (m, b) in pairs)
    read = type(pipe).from_pretrained(saved, local_files_only=True)
    assert isinstance(read, diffusers.DiffusionPipeline)
    read.set_progress_bar_config(disable=True)
    assert np.abs(theirs(read, "ddim")[0] - ours(again, "ddim")[0]).max() <= 1


def test_a_long_prompt_of_xl_is_read_whole_and_not_told_as_cut(families, capsys):
    model = families["xl"][2]
    long = " ".join(["a dog"] * MAX_LENGTH)
    settings = {"num_inference_steps": 1, "sampler": "euler", "seed": 1}
    one, other = (Pipeline(prompt, model).generate(**settings) for prompt in (long, f"{long} on red"))
    assert one[0].tobytes() != other[0].tobytes()
    assert other.metadata[0]["truncated"] == "" and "too long" not in capsys.readouterr().err


@pytest.mark.parametrize("family", ["1.5", "xl"])
def test_half_precision_variants_and_shards_load(families, family, tmp_path):
    pipe, _, model = families[family]
    pipe.save_pretrained(tmp_path / "fp16", variant="fp16", max_shard_size="150KB")
    names = {path.name for path in (tmp_path / "fp16").rglob("*.json")}
    assert {"diffusion_pytorch_model.safetensors.index.fp16.json", "model.safetensors.index.fp16.json"} <= names
    again = load_model(tmp_path / "fp16", "cpu", "fp32", cache=False)
    for one, other in zip((model.unet, *model.text.modules), (again.unet, *again.text.modules), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_xl_parts_that_do_not_belong_together_are_refused(families, tmp_path):
    _, folder, model = families["xl"]
    cases = {
        "unet/config.json": ({"projection_class_embeddings_input_dim": 70}, "pooled text of width 22, this one has 24"),
        "text_encoder_2/config.json": ({"hidden_size": 64}, "for text of width 80, this one has 96"),
    }
    for i, (name, (values, said)) in enumerate(cases.items()):
        copy = shutil.copytree(folder, tmp_path / str(i))
        (copy / name).write_text(json.dumps({**json.loads((copy / name).read_text()), **values}))
        with pytest.raises(ModelError, match=said):
            load_model(copy, "cpu", "fp32")
    with pytest.raises(ModelError, match="no projection"):
        XLText(model.text.first, model.text.first, True)
    assert isinstance(load_text_from(folder), XLText)
