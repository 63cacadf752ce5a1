"""A tiny random model with pooled text, v-prediction and zero terminal SNR; and its folder."""

from types import SimpleNamespace

import pytest

from ldm.checkpoint import Model, save_model

MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]


def tiny_tokenizer(length=12):
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{c}</w>" for c in letters), *("".join(pair) for pair in MERGES)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: i for i, word in enumerate(words)}, MERGES, model_max_length=length)


def tiny_text(width=32):
    from transformers import CLIPTextConfig, CLIPTextModel

    from ldm.nn.text import ClipText

    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=width,
    )
    return ClipText(CLIPTextModel(config).eval(), tokenizer)


def tiny_vae(channels=4):
    from ldm.nn.vae import VAE

    return VAE.from_config(
        {
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "block_out_channels": [16, 16],
            "layers_per_block": 1,
            "latent_channels": channels,
            "norm_num_groups": 8,
            "sample_size": 32,
            "scaling_factor": 0.7,
        }
    )


def tiny_model(width=32, channels=4):
    import torch

    from ldm.diffusion.schedule import Schedule
    from ldm.nn.unet import UNet, UNetConfig

    torch.manual_seed(0)
    unet = UNetConfig(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(32, 64),
        layers_per_block=1,
        transformer_layers=(0, 1),
        num_heads=(2, 2),
        cross_attention_dim=width,
        norm_num_groups=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        sample_size=16,
    )
    schedule = Schedule(
        prediction_type="v_prediction",
        beta_schedule="squaredcos_cap_v2",
        rescale_betas_zero_snr=True,
        spacing="trailing",
    )
    return Model(UNet(unet).eval(), tiny_vae(channels), tiny_text(width), schedule, "tiny")


@pytest.fixture(scope="session")
def tiny():
    return tiny_model()


@pytest.fixture(scope="session")
def make():
    """Parts of other models."""
    return SimpleNamespace(text=tiny_text, vae=tiny_vae, model=tiny_model)


@pytest.fixture(scope="session")
def saved(tiny, tmp_path_factory):
    """The model's folder in fp32, in several shards; never to be changed (see `copied`)."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_model(tiny, folder, dtype="fp32", max_shard_mb=0.3, readme="---\ntrained_on: cpu\n---\n# Tiny\n")


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of that folder to break."""
    import shutil

    return shutil.copytree(saved, tmp_path / "tiny")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A function of a kind -> a small model with adapters on it (see lora_cases.Trained)."""
    from tests.checkpoint.lora_cases import Trained

    made: dict = {}

    def get(kind):
        if kind not in made:
            made[kind] = Trained(kind, tmp_path_factory.mktemp("lora"))
        return made[kind]

    return get


@pytest.fixture
def lora_file(tmp_path):
    """Writes tensors as a LoRA file."""
    from safetensors.torch import save_file

    def save(tensors, metadata=None, name="x"):
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata)
        return tmp_path / f"{name}.safetensors"

    return save
