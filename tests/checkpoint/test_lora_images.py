"""LoRA and DoRA in images: trained by PEFT, drawn here and in diffusers; several at once; tags in prompts."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm import Pipeline
from ldm.checkpoint import load_model
from ldm.checkpoint.lora import find_lora, match_layers, read_lora, target_at, target_of, with_loras
from ldm.checkpoint.single import save_single
from ldm.errors import ConfigError, ModelError
from ldm.images import read_metadata
from ldm.nn.lora import clone_shared_weights, merge, unmerge
from ldm.render.replay.verify import verify
from tests.checkpoint.lora_cases import KINDS, PROMPTS, SIZE, Q, apart, fresh, ours, pair, theirs


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_trained_is_drawn_as_diffusers_draws_it(trained, kind):
    case = trained(kind)
    lora = read_lora(case.file)
    moved = sum(layer.up.abs().max() > 1e-3 for layer in lora.layers.values())
    assert moved >= 0.9 * len(lora.layers)  # XL never uses the last layer of its first text encoder
    assert {(e.rank, e.alpha) for e in lora.header.entries.values()} == {(4, 9.0), (3, 5.0)}
    assert lora.header.dora == KINDS[kind] and lora.header.assumed == 0
    drawn, images = ours(case.folder, lora=case.file)
    assert apart(drawn, case.images) <= 1
    assert apart(drawn, case.plain) > 5  # off
    (told,) = images.metadata[0]["lora"]
    assert (told["path"], told["weight"], told["hash"]) == (str(case.file), 1.0, lora.hash)


@pytest.mark.parametrize("kind", ["1.5", "xl"])
def test_alpha_matters(trained, kind, tmp_path):
    case = trained(kind)
    tensors = load_file(case.file)
    save_file(tensors, tmp_path / "bare.safetensors", {"format": "pt"})
    assert apart(ours(case.folder, lora=tmp_path / "bare.safetensors")[0], case.images) > 5


@pytest.mark.parametrize("layout", ["peft", "kohya"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_we_write_diffusers_draws_as_we_do(trained, kind, layout, tmp_path, caplog):
    case = trained(kind)
    file = case.written(tmp_path / "mine", layout)
    drawn, _ = ours(case.folder, lora=file.parent)
    assert apart(drawn, case.images) <= 1
    if layout == "kohya" and KINDS[kind]:
        return  # diffusers drops dora_scale
    pipe = fresh(kind)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    assert apart(theirs(pipe), drawn) <= 1


@pytest.mark.parametrize("layout", ["peft", "kohya"])
@pytest.mark.parametrize("kind", ["1.5 dora", "xl"])
def test_writing_and_reading_keeps_every_bit(trained, kind, layout, tmp_path):
    case = trained(kind)
    one, other = read_lora(case.file), read_lora(case.written(tmp_path / "mine", layout).parent)
    assert other.header.unknown == () and other.header.assumed == 0 and len(other.layers) == len(one.layers)
    target = target_at(case.folder)
    theirs_at, mine_at = (
        {place: lora.layers[n] for n, place in match_layers(lora.header, target).layers.items()}
        for lora in (one, other)
    )
    assert theirs_at.keys() == mine_at.keys()
    for place, update in theirs_at.items():
        again = mine_at[place]
        assert torch.equal(update.down, again.down) and torch.equal(update.up, again.up)
        assert update.alpha == again.alpha and (update.magnitude is None) == (again.magnitude is None)
        assert update.magnitude is None or torch.equal(update.magnitude, again.magnitude)


def test_headers_and_card_tell_alpha_and_rank(trained, tmp_path):
    case = trained("xl")
    with safe_open(case.written(tmp_path / "mine", "peft"), "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"], settings["text_encoder_2.lora_alpha"]) == (4, 9, 5)
    with safe_open(case.written(tmp_path / "kohya xl", "kohya"), "pt") as file:
        metadata, alpha = file.metadata(), file.get_tensor("lora_unet_input_blocks_3_1_proj_in.alpha")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "9")
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0" and alpha.shape == () and alpha == 9
    card = (tmp_path / "kohya xl" / "README.md").read_text()
    assert "rank 3, 4, alpha 5, 9" in card and "kohya xl.safetensors" in card and len(card.splitlines()) < 20


# Several pipelines, several LoRAs


def test_two_pipelines_of_one_model_do_not_disturb_each_other(trained, lora_file):
    case = trained("1.5")
    other = lora_file(pair("text_encoder.encoder.layers.0.mlp.fc2", inputs=64) | pair())
    settings = {"num_inference_steps": 2, "sampler": "ddim", "seed": 3, "height": SIZE, "width": SIZE}
    shared = load_model(case.folder, "cpu", "fp32")
    before = {name: tensor.clone() for name, tensor in shared.unet.state_dict().items()}
    pipes = [Pipeline("a cat", case.folder, lora=lora, dtype="fp32", device="cpu") for lora in (None, case.file, other)]
    first = [np.asarray(pipe.generate(**settings)[0], dtype=float) for pipe in pipes]
    again = [np.asarray(pipe.generate(**settings)[0], dtype=float) for pipe in reversed(pipes)][::-1]
    assert min(apart(first[0], first[1]), apart(first[0], first[2]), apart(first[1], first[2])) > 5
    assert all(apart(one, two) == 0 for one, two in zip(first, again))
    assert load_model(case.folder, "cpu", "fp32") is shared
    assert all(torch.equal(tensor, before[name]) for name, tensor in shared.unet.state_dict().items())


def test_weights_add_up_and_cancel(trained):
    case = trained("1.5")
    assert apart(ours(case.folder, lora=[(case.file, 0.8), (case.file, -0.8)])[0], case.plain) <= 1
    assert apart(ours(case.folder, lora=[(case.file, 0.6), (case.file, 0.4)])[0], case.images) <= 1
    assert apart(ours(case.folder, lora=(case.file, -1.0))[0], case.plain) > 5


@pytest.mark.parametrize("kind", ["1.5", "1.5 dora"])
def test_a_weight_is_diffusers_adapter_weight(trained, kind, tmp_path):
    case, pipe = trained(kind), fresh(kind)
    file = case.written(tmp_path / "mine", "peft")  # of its own file, diffusers drops half without a word
    pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name="one")
    pipe.set_adapters(["one"], [0.5])
    drawn, _ = ours(case.folder, lora=(case.file, 0.5), dora_scaling="peft")
    assert apart(drawn, theirs(pipe)) <= 1 and apart(drawn, case.images) > 5


def test_unmerging_gives_back_the_bits_of_the_model(trained):
    case = trained("1.5")
    lora, copied = read_lora(case.file), clone_shared_weights(case.model.unet)
    places = match_layers(lora.header, target_at(case.model)).layers
    updates = {name: [(lora.layers[layer], 0.7)] for layer, (part, name) in places.items() if part == "unet"}
    kept = merge(copied, updates)
    assert not torch.equal(copied.state_dict()[f"{Q}.weight"], case.model.unet.state_dict()[f"{Q}.weight"])
    unmerge(copied, kept)
    assert all(torch.equal(t, copied.state_dict()[name]) for name, t in case.model.unet.state_dict().items())


def test_a_loaded_model_stays_as_it_is_and_a_saved_pipeline_has_the_lora_in_it(trained, tmp_path):
    case = trained("1.5")
    drawn, _ = ours(case.model, lora=case.file)
    assert apart(drawn, case.images) <= 1 and apart(ours(case.model)[0], case.plain) == 0
    Pipeline("", case.folder, lora=case.file, dtype="fp32", device="cpu").save(tmp_path / "merged")
    assert apart(ours(tmp_path / "merged")[0], drawn) == 0


@pytest.mark.parametrize("seed", [0, 4])
def test_an_image_with_a_lora_keeps_its_bits_in_every_batch(trained, seed):
    case = trained("1.5")
    settings = {"num_inference_steps": 2, "sampler": "ddim", "height": SIZE, "width": SIZE}
    pipe = Pipeline("a cat", case.folder, lora=case.file, dtype="fp32", device="cpu")
    batch = pipe.generate(num_images=5, seed=seed, **settings)
    alone = pipe.generate(seed=seed + 3, **settings)
    assert np.array_equal(np.asarray(batch[3]), np.asarray(alone[0]))


# Tags in prompts


@pytest.fixture
def lora_dir(trained, tmp_path):
    folder = tmp_path / "loras"
    (folder / "deeper" / "other").mkdir(parents=True)
    shutil.copy(trained("1.5").file, folder / "deeper" / "red.safetensors")
    save_file(pair(), folder / "deeper" / "other" / "pytorch_lora_weights.safetensors")
    return folder


def test_tags_choose_for_their_prompt_alone_and_are_recorded(trained, lora_dir, tmp_path):
    case = trained("1.5")
    tagged, images = ours(
        case.folder, ["a <lora:red:0.5> red cat", "a dog<lora:red><lora:other:-0.25>"], lora_dir=lora_dir
    )
    red, other = lora_dir / "deeper/red.safetensors", lora_dir / "deeper/other/pytorch_lora_weights.safetensors"
    assert apart(tagged[:1], ours(case.folder, lora=(red, 0.5))[0][:1]) == 0
    assert apart(tagged[1:], ours(case.folder, lora=[red, (other, -0.25)])[0][1:]) == 0
    assert [record["prompt"] for record in images.metadata] == PROMPTS
    told = [[(lora["name"], lora["weight"]) for lora in record["lora"]] for record in images.metadata]
    assert told == [[("red", 0.5)], [("red", 1.0), ("other", -0.25)]]
    path = images.save(tmp_path / "out")[1]
    written = read_metadata(path)
    hashes = [read_lora(file).short_hash for file in (red, other)]
    assert written.ldm["lora"] == images.metadata[1]["lora"]
    assert written.parameters.startswith("a dog <lora:red:1> <lora:other:-0.25>\nNegative prompt: on red\n")
    assert f'Lora hashes: "red: {hashes[0]}, other: {hashes[1]}"' in written.parameters


def test_text_encoder_and_unet_have_their_own_weights(trained, lora_dir, tmp_path):
    case, red = trained("1.5"), lora_dir / "deeper/red.safetensors"
    base, lora = load_model(case.folder), read_lora(red)
    assert {part for part, _ in match_layers(lora.header, target_of(base)).layers.values()} >= {"unet", "text_encoder"}
    both, text, unet = (with_loras(base, [(lora, weight)]) for weight in ((0.5, -0.25), 0.5, -0.25))
    for network, other in ((both.unet, unet.unet), (both.text.modules[0], text.text.modules[0])):
        for name, value in network.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    calls = [("a <lora:red:0.5:-0.25> cat", {"lora_dir": lora_dir}), ("a cat", {"lora": (red, -0.25, 0.5)})]
    settings = {"num_inference_steps": 2, "width": SIZE, "height": SIZE, "seed": 3}
    images, same, other = (
        Pipeline(prompt, case.folder, **given).generate(**settings)
        for prompt, given in [*calls, ("a cat", {"lora": (red, -0.25)})]
    )
    assert images[0].tobytes() == same[0].tobytes() != other[0].tobytes()
    (record,) = images.metadata
    assert (record["lora"][0]["weight"], record["lora"][0]["text_weight"]) == (-0.25, 0.5)
    (path,) = images.save(tmp_path / "out")
    assert read_metadata(path).parameters.startswith("a cat <lora:red:0.5:-0.25>")
    (verdict,) = verify(path, model=case.folder).verdicts
    assert verdict.result == "same bytes", verdict


def test_names_are_looked_up_and_never_guessed(lora_dir):
    assert find_lora("other", lora_dir).parent.name == "other"
    with pytest.raises(ConfigError, match="no LoRA is named 'rad'; did you mean 'red'"):
        find_lora("rad", lora_dir)
    assert find_lora("deeper/red", lora_dir) == lora_dir / "deeper/red.safetensors"
    with pytest.raises(ConfigError, match="no LoRA is named"):
        find_lora("shallower/red", lora_dir)
    shutil.copy(lora_dir / "deeper/red.safetensors", lora_dir / "red.safetensors")
    with pytest.raises(ConfigError, match="2 LoRAs are named 'red'"):
        find_lora("red", lora_dir)


def test_single_files_take_loras_and_are_fitted_before_any_weight_is_read(trained, lora_file, tmp_path, monkeypatch):
    case = trained("1.5")
    model = save_single(case.model, tmp_path / "model.safetensors", torch.float32)
    assert apart(ours(model, lora=case.file)[0], case.images) <= 1
    monkeypatch.setattr("ldm.checkpoint.load_model", None)
    with pytest.raises(ModelError, match="this LoRA is for cross_attention_dim 1024, this model has 32"):
        Pipeline("a cat", model, lora=lora_file(pair(Q.replace("attn1.to_q", "attn2.to_k"), inputs=1024)))
