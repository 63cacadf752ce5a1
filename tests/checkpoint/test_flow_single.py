"""Single files of SD3 and FLUX: each tensor of public files has its place, back and forth without loss, parts apart."""

import inspect as source_of
import re

import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils as peer
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm import Pipeline
from ldm.checkpoint import load_model
from ldm.checkpoint.convert import convert
from ldm.checkpoint.describe import describe
from ldm.checkpoint.inspect import inspect
from ldm.checkpoint.inspect_text import as_text
from ldm.checkpoint.safety import read_header
from ldm.checkpoint.single import save_single
from ldm.checkpoint.single.flow_settings import flow_configs
from ldm.checkpoint.single.names import Part, destination_of, parts_of
from ldm.checkpoint.single.plan import _shapes_in_folder
from ldm.cli import main
from ldm.errors import ConfigError, ModelError
from tests.flow_models import KINDS, SIDE, build, build_standard, inside, written_apart
from tests.nn.make_fixtures import TRANSFORMERS, read

# Names and shapes as they stand in flux1-dev and flux1-schnell (guidance_in is dev's alone), sd3_medium,
# sd3.5_large and sd3.5_medium; a-b are numbers, W is the width, x|y names.
FLUX = """
img_in.weight W 64
img_in.bias W
txt_in.weight W 4096
txt_in.bias W
time_in|guidance_in.in_layer.weight W 256
vector_in.in_layer.weight W 768
time_in|guidance_in|vector_in.in_layer.bias W
time_in|guidance_in|vector_in.out_layer.weight W W
time_in|guidance_in|vector_in.out_layer.bias W
double_blocks.0-18.img_mod|txt_mod.lin.weight 6W W
double_blocks.0-18.img_mod|txt_mod.lin.bias 6W
double_blocks.0-18.img_attn|txt_attn.qkv.weight 3W W
double_blocks.0-18.img_attn|txt_attn.qkv.bias 3W
double_blocks.0-18.img_attn|txt_attn.norm.query_norm|key_norm.scale 128
double_blocks.0-18.img_attn|txt_attn.proj.weight W W
double_blocks.0-18.img_attn|txt_attn.proj.bias W
double_blocks.0-18.img_mlp|txt_mlp.0.weight 4W W
double_blocks.0-18.img_mlp|txt_mlp.0.bias 4W
double_blocks.0-18.img_mlp|txt_mlp.2.weight W 4W
double_blocks.0-18.img_mlp|txt_mlp.2.bias W
single_blocks.0-37.linear1.weight 7W W
single_blocks.0-37.linear1.bias 7W
single_blocks.0-37.linear2.weight W 5W
single_blocks.0-37.linear2.bias W
single_blocks.0-37.norm.query_norm|key_norm.scale 128
single_blocks.0-37.modulation.lin.weight 3W W
single_blocks.0-37.modulation.lin.bias 3W
final_layer.linear.weight 64 W
final_layer.linear.bias 64
final_layer.adaLN_modulation.1.weight 2W W
final_layer.adaLN_modulation.1.bias 2W
"""
SD3 = """
pos_embed 1 POSITIONS W
x_embedder.proj.weight W 16 2 2
x_embedder.proj.bias W
t_embedder.mlp.0.weight W 256
y_embedder.mlp.0.weight W 2048
t_embedder|y_embedder.mlp.0.bias W
t_embedder|y_embedder.mlp.2.weight W W
t_embedder|y_embedder.mlp.2.bias W
context_embedder.weight W 4096
context_embedder.bias W
joint_blocks.ALL.x_block|context_block.attn.qkv.weight 3W W
joint_blocks.ALL.x_block|context_block.attn.qkv.bias 3W
joint_blocks.ALL.x_block.attn.proj.weight W W
joint_blocks.ALL.x_block.attn.proj.bias W
joint_blocks.ALL.x_block.mlp.fc1.weight 4W W
joint_blocks.ALL.x_block.mlp.fc1.bias 4W
joint_blocks.ALL.x_block.mlp.fc2.weight W 4W
joint_blocks.ALL.x_block.mlp.fc2.bias W
joint_blocks.MORE.context_block.attn.proj.weight W W
joint_blocks.MORE.context_block.attn.proj.bias W
joint_blocks.MORE.context_block.mlp.fc1.weight 4W W
joint_blocks.MORE.context_block.mlp.fc1.bias 4W
joint_blocks.MORE.context_block.mlp.fc2.weight W 4W
joint_blocks.MORE.context_block.mlp.fc2.bias W
joint_blocks.MORE.context_block.adaLN_modulation.1.weight 6W W
joint_blocks.MORE.context_block.adaLN_modulation.1.bias 6W
joint_blocks.LAST.context_block.adaLN_modulation.1.weight 2W W
joint_blocks.LAST.context_block.adaLN_modulation.1.bias 2W
final_layer.linear.weight 64 W
final_layer.linear.bias 64
final_layer.adaLN_modulation.1.weight 2W W
final_layer.adaLN_modulation.1.bias 2W
"""
ONE_ATTENTION = """
joint_blocks.ONE.x_block.adaLN_modulation.1.weight 6W W
joint_blocks.ONE.x_block.adaLN_modulation.1.bias 6W
"""
TWO_ATTENTIONS = """
joint_blocks.0-12.x_block.adaLN_modulation.1.weight 9W W
joint_blocks.0-12.x_block.adaLN_modulation.1.bias 9W
joint_blocks.0-12.x_block.attn2.qkv.weight 3W W
joint_blocks.0-12.x_block.attn2.qkv.bias 3W
joint_blocks.0-12.x_block.attn2.proj.weight W W
joint_blocks.0-12.x_block.attn2.proj.bias W
joint_blocks.0-12.x_block.attn2.ln_q|ln_k.weight 64
"""
NORMS = "joint_blocks.ALL.x_block|context_block.attn.ln_q|ln_k.weight 64\n"
MEDIUM = {"ALL": "0-23", "MORE": "0-22", "LAST": "23", "ONE": "0-23", "POSITIONS": "36864"}
LARGE = {"ALL": "0-37", "MORE": "0-36", "LAST": "37", "ONE": "0-37", "POSITIONS": "36864"}
PUBLIC = {  # kind -> (table, words in it, width, how many tensors the file has)
    "flux_dev": (FLUX, {}, 3072, 780),
    "flux_schnell": (FLUX.replace("|guidance_in", ""), {}, 3072, 776),
    "sd3_medium": (SD3 + ONE_ATTENTION, MEDIUM, 1536, 491),
    "sd35_large": (SD3 + ONE_ATTENTION + NORMS, LARGE, 2432, 923),
    "sd35_medium": (
        SD3 + ONE_ATTENTION + TWO_ATTENTIONS + NORMS,
        {**MEDIUM, "ONE": "13-23", "POSITIONS": "147456"},
        1536,
        491 + 24 * 4 + 13 * 6,
    ),
}


def public(kind):
    """Name -> shape of a published file."""
    table, words, width, count = PUBLIC[kind]
    for word, text in words.items():
        table = table.replace(word, text)
    shapes = {}
    for line in table.split("\n"):
        if line:
            name, *sides = line.split()
            shape = tuple(width * int(side[:-1] or 1) if side.endswith("W") else int(side) for side in sides)
            shapes |= dict.fromkeys(unfolded(name), shape)
    assert len(shapes) == count
    return shapes


def unfolded(name):
    """joint_blocks.0-2.x|y.weight -> the six names."""
    names = [""]
    for part in name.split("."):
        numbers = re.fullmatch(r"(\d+)-(\d+)", part)
        words = map(str, range(int(numbers[1]), int(numbers[2]) + 1)) if numbers else part.split("|")
        names = [f"{start}.{word}" for word in words for start in names]
    return [one[1:] for one in names]


@pytest.mark.parametrize("kind", PUBLIC)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_every_tensor_of_public_files_has_its_place_at_full_width(kind, prefix):
    shapes = {prefix + name: shape for name, shape in public(kind).items()}
    configs = flow_configs(shapes, kind)
    theirs = {key: value for key, value in TRANSFORMERS[kind].items() if key != "sample_size"}
    assert {key: configs["transformer"][key] for key in theirs} == theirs
    part = parts_of(configs)["transformer"]
    found = {}
    for key, shape in shapes.items():
        destination = destination_of(part, key)
        pairs = zip(destination.names, _shapes_in_folder(shape, destination, key, "file"), strict=True)
        assert not found.keys() & set(destination.names)
        found |= dict(pairs)
    assert found == read(kind)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (folder, our model of it, the file that we write of it); `standard` ones' files are without settings."""
    made = {}

    def of(kind, standard=False):
        if (kind, standard) not in made:
            root = tmp_path_factory.mktemp("flow")
            pipe = (build_standard if standard else build)(kind)
            pipe.save_pretrained(root / "folder")
            model = load_model(root / "folder", "cpu", "fp32", cache=False)
            file = save_single(model, root / "one.safetensors", torch.float32)
            if standard:
                save_file(load_file(file), file)
            made[kind, standard] = root / "folder", model, file
        return made[kind, standard]

    return of


def assert_same(one, other):
    assert one.unet.config == other.unet.config and one.schedule == other.schedule
    assert (one.vae.scaling_factor, one.vae.shift_factor) == (other.vae.scaling_factor, other.vae.shift_factor)
    assert type(one.text) is type(other.text) and one.text.tokens == other.text.tokens
    networks = ((model.unet, model.vae.module, *model.text.modules) for model in (one, other))
    for a, b in zip(*networks, strict=True):
        for (name, p), (same, q) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
            assert name == same and p.dtype == q.dtype and torch.equal(p, q), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_becomes_a_file_and_a_folder_again_to_the_bit(models, kind, tmp_path):
    _, model, file = models(kind)
    again = load_model(file, "cpu", "fp32", cache=False)
    assert_same(model, again)
    assert describe(file, hashed=True).hash == again.hash
    assert_same(model, load_model(convert(file, tmp_path / "folder"), "cpu", "fp32", cache=False))
    info = inspect(file)
    assert info["prediction_type"] == "flow" and "transformer" in info["parts"] and not info["unapplied"]


def flux_peer(width):
    """diffusers' conversion for another width than the 3072 that is written in it."""
    text = source_of.getsource(peer.convert_flux_transformer_checkpoint_to_diffusers).replace("3072", str(width))
    scope = dict(vars(peer))
    exec(text, scope)
    return scope["convert_flux_transformer_checkpoint_to_diffusers"]


@pytest.mark.parametrize("kind", ["sd3", "sd35", "flux_dev"])
def test_files_are_what_diffusers_converts(models, kind):
    _, model, file = models(kind)
    sd3 = peer.convert_sd3_transformer_checkpoint_to_diffusers
    convert_one = sd3 if kind.startswith("sd3") else flux_peer(model.unet.config.width)
    same(convert_one(inside(file, "model.diffusion_model.")), model.unet.state_dict())
    vae = peer.convert_ldm_vae_checkpoint(load_file(file), dict(model.vae.module.config))
    same(vae, model.vae.module.state_dict())
    (*_, t5), clips = model.text.encoders, model.text.clips
    same(peer.convert_sd3_t5_checkpoint_to_diffusers(load_file(file)), t5.model.state_dict(), ("encoder.embed_tokens",))
    for clip, name in zip(clips, ("clip_l", "clip_g")):
        theirs = peer.convert_ldm_clip_checkpoint(load_file(file), f"text_encoders.{name}.transformer.")
        ours = {key.removeprefix("text_model."): one for key, one in clip.model.state_dict().items()}
        same({key.removeprefix("text_model."): one for key, one in theirs.items()}, ours)


def same(theirs, ours, missing=()):
    wanted = {name: tensor for name, tensor in ours.items() if not name.startswith(missing or "\0")}
    assert theirs.keys() == wanted.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(("kind", "tokenizer"), [("sd35", "tokenizer_3"), ("flux_dev", "tokenizer_2")])
def test_files_without_settings_are_read(models, kind, tokenizer):
    folder, model, file = models(kind, standard=True)
    assert not read_header(file).metadata
    assert_same(model, load_model(file, "cpu", "fp32", cache=False, text_encoders=folder / tokenizer))


@pytest.fixture(scope="module")
def apart(models, tmp_path_factory):
    """FLUX.1-dev in the files that people have: transformer, VAE, both text encoders, and a tokenizer's folder."""
    folder, model, file = models("flux_dev", standard=True)
    file, _, texts = written_apart(file, folder, tmp_path_factory.mktemp("apart"))
    return file, folder / "vae", texts, model


def test_parts_come_from_files_of_their_own(apart, tmp_path, capsys):
    file, vae, texts, model = apart
    given = {"vae": vae, "text_encoders": texts, "device": "cpu", "dtype": "fp32"}
    loaded = load_model(file, "cpu", "fp32", vae=vae, text_encoders=texts)
    assert_same(model, loaded)
    few = {"num_inference_steps": 2, "seed": 3, "height": SIDE, "width": SIDE}
    (image,), (whole,) = Pipeline("a cat", file, **given).generate(**few), Pipeline("a cat", model).generate(**few)
    assert image.tobytes() == whole.tobytes()
    words = [word for text in texts for word in ("--text-encoders", str(text))]
    options = ["--vae", str(vae), *words]
    out = tmp_path / "cat.png"
    small = ["--steps", "2", "--seed", "3", "--height", str(SIDE), "--width", str(SIDE)]
    assert main(["generate", "a cat", "--model", str(file), *options, *small, "-o", str(out), "--dtype", "fp32"]) == 0
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(whole))
    assert main(["convert", str(file), str(tmp_path / "folder"), *options]) == 0
    assert_same(model, load_model(tmp_path / "folder", "cpu", "fp32", cache=False))
    folder = vae.parent  # one folder has them all
    assert_same(model, load_model(file, "cpu", "fp32", vae=vae, text_encoders=folder, cache=False))
    assert (
        describe(file, hashed=True, vae=vae, text_encoders=texts).hash
        != describe(file, hashed=True, vae=vae, text_encoders=[folder]).hash
    )  # sharded or not, names apart: other files


def test_what_is_missing_is_named_in_one_line(apart, models, capsys):
    file, vae, (clip, t5, tokenizer), _ = apart
    for given, said in (
        ({}, "holds no VAE and no CLIP-L and no T5"),
        ({"vae": vae}, "holds no CLIP-L and no T5"),
        ({"vae": vae, "text_encoders": [clip]}, "holds no T5"),
        ({"vae": vae, "text_encoders": [clip, t5]}, "holds no T5's tokenizer"),
    ):
        with pytest.raises(ModelError, match=f"{said};") as caught:
            Pipeline("a cat", file, device="cpu", **given)
        assert "--vae" in caught.value.hint or given
        assert "--text-encoders" in caught.value.hint
    info = inspect(file)
    assert info["family"] == "flux-dev" and "holds no CLIP-L" in as_text(info)
    folder, _, sd3 = models("sd35", standard=True)
    for wrong, said in (
        ([clip, clip, t5, tokenizer], "too many"),
        ([vae], "no text encoder"),
        ([file], "no text encoder"),
        (["nowhere"], "no such text encoder"),
        (["x" * 5000], "no such text encoder"),
        ("~nobody-of-this-name/t5", "no such text encoder"),
    ):
        with pytest.raises(ModelError, match=said):
            load_model(file, "cpu", "fp32", vae=vae, text_encoders=wrong)
    for wrong in (5, [5], [None], {"a": 1}):
        with pytest.raises(ConfigError, match="text_encoders: expected paths"):
            load_model(file, "cpu", "fp32", vae=vae, text_encoders=wrong)
    with pytest.raises(ModelError, match="has text encoders already"):
        Pipeline("a cat", folder, device="cpu", text_encoders=[clip])
    with pytest.raises(ConfigError, match="predicts the flow"):
        Pipeline("a cat", sd3, device="cpu", prediction_type="v", text_encoders=folder / "tokenizer_3")


def changed(file, path, change, **metadata):
    """A copy of a file after `change(tensors)`."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, path, metadata)
    return path


def test_an_sd3_file_without_t5_is_read_with_clip_alone(models, tmp_path, capsys):
    _, _, file = models("sd35", standard=True)

    def drop(tensors):
        for key in [key for key in tensors if ".t5xxl." in key or "clip_l.transformer.text_projection" in key]:
            del tensors[key]
        tensors["text_encoders.clip_l.logit_scale"] = torch.ones(())

    short = changed(file, tmp_path / "short.safetensors", drop)
    found = load_model(short, "cpu", "fp32", cache=False)
    assert "holds no T5" in capsys.readouterr().err
    assert found.text.t5 is None and len(found.text.clips) == 2
    assert torch.equal(found.text.first.model.text_projection.weight, torch.eye(found.text.first.width))
    assert found.text.encode(["a red cat"]).states.shape[1:] == (77 + 256, 192)


def test_plain_fp8_is_read_and_said_and_scaled_fp8_refused_by_its_name(models, tmp_path, capsys):
    folder, model, file = models("flux_dev", standard=True)
    eight = {}

    def narrow(tensors):
        for key in (key for key in tensors if key.startswith(("model.", "text_encoders.t5xxl"))):
            eight[key] = tensors[key] = tensors[key].to(torch.float8_e4m3fn)

    small = changed(file, tmp_path / "fp8.safetensors", narrow)
    loaded = load_model(small, "cpu", "bf16", cache=False, text_encoders=folder / "tokenizer_2")
    assert "float8_e4m3fn" in capsys.readouterr().err
    key, name = "single_blocks.0.linear2.weight", "single_transformer_blocks.0.proj_out.weight"
    want = eight[f"model.diffusion_model.{key}"].float()
    assert torch.equal(loaded.unet.state_dict()[name].float(), want)
    assert (want - model.unet.state_dict()[name]).abs().max() > 1e-3  # fp8 it is
    info = inspect(small)
    assert "fp8_e4m3" in info["dtypes"] and "float8_e4m3fn" in as_text(info)
    for mark, said in (("scaled_fp8", "scaled fp8"), ("double_blocks.0.img_mlp.0.scale_weight", "scaled fp8")):
        scaled = changed(
            small,
            tmp_path / "scaled.safetensors",
            lambda tensors, mark=mark: tensors.update({f"model.diffusion_model.{mark}": torch.ones(2)}),
        )
        with pytest.raises(ModelError, match=said):
            Pipeline("a cat", scaled, device="cpu", text_encoders=folder / "tokenizer_2")
        info = inspect(scaled)
        assert info["kind"] == "other" and said in info["what"]


def test_relatives_are_refused_by_their_names(models, tmp_path):
    _, _, file = models("flux_dev", standard=True)
    for name, said in (("distilled_guidance_layer.in_proj.weight", "Chroma"), ("controlnet_x.weight", "ControlNet")):
        mark = f"model.diffusion_model.{name}"
        other = changed(file, tmp_path / "x.safetensors", lambda t, mark=mark: t.update({mark: torch.ones(2, 2)}))
        with pytest.raises(ModelError, match=said):
            load_model(other, "cpu", "fp32")
        assert said in inspect(other)["what"]
    key = "model.diffusion_model.img_in.weight"
    wide = changed(file, tmp_path / "fill.safetensors", lambda t: t.update({key: t[key].repeat(1, 6)}))
    with pytest.raises(ModelError, match="channels in"):
        load_model(wide, "cpu", "fp32", text_encoders=file.parent / "folder" / "tokenizer_2")
    with pytest.raises(ModelError, match="belong to no part"):
        extra = "model.diffusion_model.double_blocks.0.img_extra.weight"
        load_model(changed(file, tmp_path / "y.safetensors", lambda t: t.update({extra: torch.ones(2)})), "cpu", "fp32")


@pytest.mark.parametrize("form", ["folder", "file"])
def test_t5_stays_in_bf16_where_the_rest_is_fp16(models, form, tmp_path, capsys):
    folder, _, file = models("flux_schnell")
    loaded = load_model(folder if form == "folder" else file, "cpu", torch.float16, cache=False)
    assert "T5 is kept in bf16" in capsys.readouterr().err
    assert loaded.text.t5.dtype == torch.bfloat16 and loaded.text.first.dtype == loaded.dtype == torch.float16
    large = dict(loaded.text.t5.model.named_parameters())
    with torch.no_grad():  # as T5 XXL's feed-forward layers do, these overflow fp16 alone
        for name, weight in large.items():
            weight.mul_(300 if ".wo." in name or ".wi_" in name else 1)
    states = loaded.text.encode(["a red cat"]).states
    assert states.isfinite().all()
    loaded.text.t5.to(torch.float16)
    assert not loaded.text.encode(["a red cat"]).states.isfinite().all()


def test_a_part_is_a_stack_of_unequal_pieces():
    part = Part("transformer", ("",), {}, stacks=parts_of(flow_configs(public("flux_dev"), ""))["transformer"].stacks)
    assert destination_of(part, "single_blocks.3.linear1.weight").rows(21504) == [3072, 3072, 3072, 12288]
    assert destination_of(part, "final_layer.adaLN_modulation.1.bias").change == "swapped"
