"""A tiny random model as a complete diffusers folder, built once a session with the package's own writer."""

import json
import os

import pytest


def pytest_configure(config):
    """CUDA is hidden from all tests but those marked gpu, whose results do not depend on whether there is a card."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


if "PYTEST_XDIST_WORKER" in os.environ:  # two workers with two threads each would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

WORDS = ("a", "cat", "dog", "red", "blue", "on", "and")
MAX_LENGTH = 16  # tokens, start and end included


def tiny_tokenizer():
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


def tiny_text(width=32):
    import transformers

    from ldm.nn.text import ClipText

    tokenizer = tiny_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return ClipText(transformers.CLIPTextModel(config).eval(), tokenizer, frozenset(WORDS))


def tiny_vae(latent_channels=4, **more):
    """Factor 8."""
    from ldm.nn.vae import VAE

    config = {
        "_class_name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [8, 8, 8, 8],
        "layers_per_block": 1,
        "latent_channels": latent_channels,
        "norm_num_groups": 4,
        "sample_size": 32,
        "scaling_factor": 0.5,
        **more,
    }
    vae = VAE.from_config(config)
    vae.module.eval()
    return vae


def build_tiny_model(seed=0):
    """A Model of about 200 thousand random parameters: pictures of 32x32 from latents 4x4, v-prediction."""
    import torch

    from ldm.checkpoint import Model
    from ldm.diffusion.schedule import Schedule
    from ldm.nn.unet import UNet, UNetConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = UNetConfig(
            block_out_channels=(32, 64),
            layers_per_block=1,
            transformer_layers=(1, 0),
            num_heads=(4, 4),
            cross_attention_dim=32,
            norm_num_groups=8,
            sample_size=4,
        )
        unet, vae, text = UNet(config).eval(), tiny_vae(), tiny_text()
    schedule = Schedule(
        prediction_type="v_prediction",
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=True,
        spacing="trailing",
        steps_offset=1,
    )
    return Model(unet, vae, text, schedule, "tiny", None, "", {})


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The path of a tiny model's diffusers folder, in fp32. Never write into it: copy it."""
    from ldm.checkpoint import save_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(build_tiny_model(), folder, dtype="fp32")
    return folder


@pytest.fixture
def changed_folder(tiny_folder, tmp_path):
    """A function (file, {key: value}) -> the path of a copy of the tiny model with a JSON file changed, no manifest."""
    import shutil

    def change(name, values):
        folder = tmp_path / "changed"
        shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink(missing_ok=True)
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, **values}))
        return folder

    return change
