"""LoRAs of SD3 and FLUX: read by the names of diffusers, kohya, ComfyUI and OneTrainer, and written."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import Pipeline
from ldm.checkpoint import load_model
from ldm.checkpoint.inspect import inspect
from ldm.checkpoint.lora import read_lora, target_at, target_of, with_loras
from ldm.checkpoint.lora.write import write_lora
from ldm.checkpoint.single.flow_names import flow_layers
from ldm.errors import ModelError
from ldm.nn.lora import LowRank, layers_of
from ldm.nn.mmdit import MMDiT, MMDiTConfig
from tests.flow_models import CHANNELS, SIDE, TOKENS, build, packed

RANK, ALPHA = 2, 4.0


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (diffusers' pipeline, its folder, our model)."""
    made = {}
    for kind in ("flux_schnell", "sd35"):
        pipe, folder = build(kind), tmp_path_factory.mktemp("flow") / kind
        pipe.save_pretrained(folder)
        made[kind] = pipe, folder, load_model(folder, "cpu", "fp32", cache=False)
    return made


def matrices(rows, columns, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, columns, generator=g), 0.3 * torch.randn(rows, RANK, generator=g)


def originals(model, form):
    """(tensors of a file with the original code's layers, what each of our layers is to gain)."""
    layers, tensors, gains = layers_of(model.unet), {}, {}
    down_name, up_name = ("lora_A", "lora_B") if form == "comfyui" else ("lora_down", "lora_up")
    for seed, (old, names) in enumerate(flow_layers(model.unet.config).items()):
        if "blocks" not in old:
            continue
        rows = [layers[name].weight.shape[0] for name in names]
        down, up = matrices(sum(rows), layers[names[0]].weight.shape[1], seed)
        key = f"diffusion_model.{old}" if form == "comfyui" else "lora_unet_" + old.replace(".", "_")
        tensors |= {f"{key}.{down_name}.weight": down, f"{key}.{up_name}.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
        whole = ALPHA / RANK * (up @ down)
        gains |= dict(zip(names, whole.split(rows)))
    return {key: tensor.contiguous() for key, tensor in tensors.items()}, gains


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
@pytest.mark.parametrize("kind", ["flux_schnell", "sd35"])
def test_layers_that_files_hold_as_one_are_parted(models, kind, form, tmp_path):
    _, folder, model = models[kind]
    tensors, gains = originals(model, form)
    save_file(tensors, tmp_path / "one.safetensors")
    changed = with_loras(model, [(read_lora(tmp_path / "one.safetensors"), 0.5)]).unet
    for name, layer in layers_of(model.unet).items():
        expected = layer.weight + 0.5 * gains[name] if name in gains else layer.weight
        assert torch.allclose(changed.get_submodule(name).weight, expected, atol=1e-5), name
    assert len(gains) > 20 and target_at(folder) == target_of(model)
    found = inspect(tmp_path / "one.safetensors")
    assert found["title"] == ("FLUX.1" if kind == "flux_schnell" else "Stable Diffusion 3")


def test_an_original_name_is_where_the_original_code_has_that_layer():
    """Against diffusers' own conversion of a file of FLUX in its original names."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    config = MMDiTConfig.from_diffusers({"_class_name": "FluxTransformer2DModel", "guidance_embeds": True})
    with torch.device("meta"):
        shapes = {name: tuple(layer.weight.shape) for name, layer in layers_of(MMDiT(config)).items()}
    table, file = flow_layers(config), {}
    for number, (old, names) in enumerate(table.items()):
        rows = sum(shapes[name][0] for name in names)
        file |= {f"{old}.weight": torch.full((rows, 1), float(number)), f"{old}.bias": torch.zeros(rows)}
    file |= {f"final_layer.adaLN_modulation.1.{kind}": torch.zeros(6144) for kind in ("weight", "bias")}
    for i in range(config.num_layers):
        for side in ("img", "txt"):
            file |= {f"double_blocks.{i}.{side}_attn.norm.{n}_norm.scale": torch.zeros(1) for n in ("query", "key")}
    for i in range(config.num_single_layers):
        file |= {f"single_blocks.{i}.norm.{n}_norm.scale": torch.zeros(1) for n in ("query", "key")}
    theirs = convert_flux_transformer_checkpoint_to_diffusers(file)
    for number, names in enumerate(table.values()):
        assert all(theirs[f"{name}.weight"].unique().tolist() == [number] for name in names)
        assert all(len(theirs[f"{name}.weight"]) == shapes[name][0] for name in names)
    assert set(shapes) == {name for names in table.values() for name in names} | {"norm_out.linear"}


def drawn(pipe, latents):
    size = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "guidance_scale": 0.0}
    return 255 * pipe("a red cat", latents=packed(latents), output_type="np", max_sequence_length=TOKENS, **size).images


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_what_is_written_is_read_again_and_by_diffusers(models, layout, tmp_path):
    pipe, folder, model = models["flux_schnell"]
    names = [name for name in layers_of(model.unet) if ".attn.to_" in name or name.endswith("proj_mlp")]
    updates = {}
    for seed, name in enumerate(names):
        updates[name] = LowRank(*matrices(*layers_of(model.unet)[name].weight.shape, seed), ALPHA)
    file = write_lora(tmp_path / "style", model, {"unet": updates}, layout)
    latents = torch.randn((1, CHANNELS, SIDE // 4, SIDE // 4), generator=torch.Generator().manual_seed(5))
    settings = {"num_inference_steps": 2, "latents": latents, "height": SIDE, "width": SIDE}
    images = Pipeline("a red cat", folder, lora=file, device="cpu", dtype="fp32").generate(**settings)
    mine = np.stack([np.asarray(image, dtype=float) for image in images])
    plain = Pipeline("a red cat", folder, device="cpu", dtype="fp32").generate(**settings)
    assert np.abs(mine - np.asarray(plain[0], dtype=float)).max() > 5
    if layout == "kohya":
        assert all(key.startswith("lora_transformer_") for key in load_file(file))
        return
    try:
        pipe.load_lora_weights(str(tmp_path / "style"))
        assert np.abs(drawn(pipe, latents) - mine).max() <= 1
    finally:
        pipe.unload_lora_weights()


def test_a_lora_of_another_model_is_refused(models, tmp_path):
    for kind, other in (("flux_schnell", "sd35"), ("sd35", "flux_schnell")):
        save_file(originals(models[kind][2], "kohya")[0], tmp_path / f"{kind}.safetensors")
        with pytest.raises(ModelError, match="another model"):
            Pipeline("a", models[other][1], lora=tmp_path / f"{kind}.safetensors", device="cpu")
