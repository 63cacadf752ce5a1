"""Small models with adapters that PEFT trained on them, for the tests of LoRA files."""

import numpy as np
import peft
import torch
import transformers.integrations.peft
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict

from ldm import Pipeline
from ldm.checkpoint import load_model
from ldm.checkpoint.lora import match_layers, read_lora, target_at, write_lora
from tests.checkpoint.test_families_folders import DDIM, build

PROMPTS, NEGATIVES, STEPS, SCALE, SIZE = ["a red cat", "a dog"], ["blue", "on red"], 3, 5.0, 64
UNET = {"r": 4, "lora_alpha": 9, "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1"]}
TEXT = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "out_proj", "fc1"]}
# A layer of the U-Net of 1.5.
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
# transformers 5.24 asks for PEFT 0.22, which is not released; PEFT 0.21 does all that these tests need.
transformers.integrations.peft.check_peft_version = lambda **_: None
KINDS = {"1.5": False, "1.5 dora": True, "xl": False}  # whether it is DoRA


def parts(pipe):
    found = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    return found | ({"text_encoder_2": pipe.text_encoder_2} if hasattr(pipe, "text_encoder_2") else {})


def train(pipe, dora, steps=20):
    """Adapters by PEFT on every part, trained towards noise by Adam."""
    for part, module in parts(pipe).items():
        settings = UNET if part == "unet" else TEXT
        module.requires_grad_(False)
        module.add_adapter(peft.LoraConfig(**settings, use_dora=dora, init_lora_weights="gaussian"))
    trained = [p for module in parts(pipe).values() for p in module.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(6)
    x, target = torch.randn((2, 2, 4, 16, 16), generator=generator)
    optimizer = torch.optim.Adam(trained, lr=0.02)
    xl = "text_encoder_2" in parts(pipe)
    for _ in range(steps):
        encoded = pipe.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        more = {}
        if xl:
            more = {"added_cond_kwargs": {"text_embeds": encoded[2], "time_ids": torch.full((2, 6), float(SIZE))}}
        out = pipe.unet(x, torch.tensor([300, 700]), encoded[0], **more).sample
        loss = (out - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def save_as_diffusers_does(pipe, folder):
    """As its training scripts do, with PEFT's settings in the header."""
    layers, settings = {}, {}
    for part, module in parts(pipe).items():
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
        settings[part] = module
    pipe.save_lora_weights(folder, **layers, **_collate_lora_metadata(settings))
    return folder / "pytorch_lora_weights.safetensors"


def fresh(family):
    pipe = build(family.split()[0])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe):
    """diffusers' images (2, H, W, 3), 0..255."""
    import diffusers

    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **DDIM)
    size = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, "guidance_scale": SCALE}
    with torch.no_grad():
        return 255 * pipe(PROMPTS, negative_prompt=NEGATIVES, latents=noise(), output_type="np", **size).images


def noise():
    return torch.randn((len(PROMPTS), 4, SIZE // 4, SIZE // 4), generator=torch.Generator().manual_seed(5))


def ours(folder, prompts=PROMPTS, **other):
    pipe = Pipeline(prompts, folder, negative_prompt=NEGATIVES, dtype="fp32", device="cpu", **other)
    settings = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "sampler": "ddim", "latents": noise()}
    images = pipe.generate(**settings)
    return np.stack([np.asarray(image, dtype=float) for image in images]), images


def apart(one, other):
    return np.abs(one - other).max()


class Trained:
    def __init__(self, kind, folder):
        pipe = fresh(kind)
        pipe.save_pretrained(folder / "model")
        self.folder, self.kind = folder / "model", kind
        train(pipe, KINDS[kind])
        self.file = save_as_diffusers_does(pipe, folder / "theirs")
        self.images = theirs(pipe)
        self.model = load_model(self.folder, "cpu", "fp32")
        self.plain = ours(self.folder)[0]

    def written(self, folder, layout):
        """What diffusers wrote, read and written again by us."""
        lora = read_lora(self.file)
        layers: dict = {}
        for layer, (part, name) in match_layers(lora.header, target_at(self.model)).layers.items():
            layers.setdefault(part, {})[name] = lora.layers[layer]
        return write_lora(folder, self.model, layers, layout)


def pair(layer=f"unet.{Q}", rank=2, inputs=32, outputs=32):
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
    return {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
