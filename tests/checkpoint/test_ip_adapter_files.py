"""IP-Adapters and vision towers on disk: the public files' names at full width; what does not fit is refused."""

import json
import shutil
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoint.describe import describe
from ldm.checkpoint.ip_adapter import _config, find_ip_adapter, find_vision
from ldm.cli import main
from ldm.errors import ConfigError, LdmError, ModelError
from ldm.nn.ip_adapter import IPAdapter
from ldm.nn.vision import pixels
from tests.conftest import build_tiny_model
from tests.nn.test_unet import CONFIGS, FIXTURES
from tests.nn.test_unet import UNetConfig as Config
from tests.pipeline.test_ip_adapter import TOWER, adapter_file, photo

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", FIXTURES.IP_ADAPTERS)
def test_names_and_shapes_at_full_width(kind):
    shapes = FIXTURES.read(kind)
    unet = Config.from_diffusers(FIXTURES.CONFIGS[FIXTURES.IP_ADAPTERS[kind]])
    config = _config(shapes, types.SimpleNamespace(unet=unet, name="base"), kind)
    with torch.device("meta"):
        state = IPAdapter(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    assert len(config.layers) == (16 if unet.text_width == 768 else 70)


@pytest.mark.parametrize("seed", range(6))
def test_pixels_equal_transformers(seed):
    from transformers import CLIPImageProcessor

    theirs = CLIPImageProcessor(size=28, crop_size=28)(photo(seed), return_tensors="pt").pixel_values
    assert torch.allclose(pixels(photo(seed), 28), torch.as_tensor(theirs), atol=1e-5)


@pytest.fixture(scope="module")
def model():
    return build_tiny_model()


@pytest.fixture
def base(model):
    return types.SimpleNamespace(unet=model.unet.config, name="base", path=None)


@pytest.fixture
def file(model, tmp_path):
    return adapter_file(model.unet, tmp_path / "plain.safetensors", "plain")


def changed(file, path, change):
    state = load_file(file)
    change(state)
    save_file(state, path)
    return path


def test_what_does_not_fit_is_one_line_before_weights_are_read(base, file, tmp_path):
    def refused(path, like=base):
        with pytest.raises(LdmError) as caught:
            find_ip_adapter(path, like)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    full = types.SimpleNamespace(unet=CONFIGS["xl"], name="xl")
    width = full.unet.text_width
    assert f"is for text of width 32, and the model xl is text of width {width}" in refused(file, full)
    flow = types.SimpleNamespace(unet=object(), name="flux")
    assert "go with U-Nets, and flux has none" in refused(file, flow)
    assert "no such IP-Adapter" in refused(tmp_path / "none.safetensors")
    assert "is a folder" in refused(tmp_path)
    assert "expected a file" in refused(7)
    torch.save({"image_proj": {}, "ip_adapter": {}}, tmp_path / "ip-adapter_sd15.bin")
    assert "pickle" in refused(tmp_path / "ip-adapter_sd15.bin")
    other = tmp_path / "other.safetensors"
    with pytest.raises(ModelError, match=r"is an IP-Adapter, which goes with a model \(--ip-adapter\)"):
        describe(file)
    save_file({"lora_unet_x.weight": torch.ones(1)}, other)
    assert "holds no IP-Adapter" in refused(other)
    assert "FaceID" in refused(
        changed(file, other, lambda s: s.update({"ip_adapter.0.to_q_lora.down.weight": torch.ones(1)}))
    )
    face = changed(file, other, lambda s: s.update({"image_proj.proj.0.weight": s.pop("image_proj.proj.weight")}))
    said = refused(face)
    assert "is an IP-Adapter FaceID, which is not supported" in said and "InsightFace" in said
    for name in ("ip-adapter-faceid_sd15.bin", "ip-adapter-faceid-plusv2_sdxl.bin"):  # converting it would not help
        torch.save({}, tmp_path / name)
        assert "is an IP-Adapter FaceID by its name, which is not supported" in refused(tmp_path / name)
    assert "1 missing (ip_adapter.7.to_v_ip.weight)" in refused(
        changed(file, other, lambda s: s.pop("ip_adapter.7.to_v_ip.weight"))
    )
    assert "1 unexpected (ip_adapter.9.to_v_ip.weight)" in refused(
        changed(file, other, lambda s: s.update({"ip_adapter.9.to_v_ip.weight": torch.ones(1)}))
    )
    assert "keys that no IP-Adapter has (ip_adapter.x)" in refused(
        changed(file, other, lambda s: s.update({"ip_adapter.x": torch.ones(1)}))
    )
    assert "holds no whole IP-Adapter" in refused(changed(file, other, lambda s: s.pop("image_proj.norm.weight")))
    nan = changed(file, other, lambda s: s["ip_adapter.1.to_k_ip.weight"].fill_(float("nan")))
    with pytest.raises(ModelError, match="holds NaN"):
        find_ip_adapter(nan, base).load(CPU, torch.float32)


@pytest.fixture
def tower(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(1)
    net = CLIPVisionModelWithProjection(CLIPVisionConfig(**TOWER)).eval()
    net.save_pretrained(tmp_path / "tower")
    return net


def test_towers_alone_and_of_a_whole_clip(base, file, tower, tmp_path):
    from transformers import CLIPConfig, CLIPModel

    adapters = [find_ip_adapter(file, base)]
    mine = find_vision(tmp_path / "tower", adapters, None).load(CPU, torch.float32)
    values = pixels(photo(0), 28)
    with torch.no_grad():
        told = tower(values, output_hidden_states=True)
    assert torch.equal(mine(photo(0), True), told.image_embeds)
    assert torch.equal(mine(photo(0), False), told.hidden_states[-2])
    assert mine(None, True).abs().sum() == 0 and mine(None, False).shape == told.hidden_states[-2].shape
    text = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=20))
    whole.vision_model.load_state_dict(tower.vision_model.state_dict())
    whole.visual_projection.load_state_dict(tower.visual_projection.state_dict())
    whole.save_pretrained(tmp_path / "clip")
    again = find_vision(tmp_path / "clip", adapters, None).load(CPU, torch.float32)
    assert torch.equal(again(photo(0), True), told.image_embeds)


def test_towers_that_do_not_fit(base, file, tower, tmp_path):
    adapters = [find_ip_adapter(file, base)]

    def refused(path, kind=ModelError):
        with pytest.raises(kind) as caught:
            find_vision(path, adapters, None)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "needs CLIP's vision tower" in refused(None, ConfigError)
    assert "no such folder" in refused(tmp_path / "none")
    assert "holds no vision tower" in refused(tmp_path)
    assert "expected a folder" in refused(7, ConfigError)
    config = tmp_path / "tower" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "projection_dim": 24}))
    assert "do not fit" in refused(tmp_path / "tower")
    config.write_text(json.dumps({**settings, "model_type": "siglip_vision_model"}))
    assert "holds no vision tower of CLIP" in refused(tmp_path / "tower")
    config.write_text(json.dumps({**settings, "hidden_size": "wide"}))
    assert "the settings cannot be used" in refused(tmp_path / "tower")
    config.write_text(json.dumps(settings))
    wider = tmp_path / "wider"
    shutil.copytree(tmp_path / "tower", wider)
    weights = load_file(wider / "model.safetensors")
    weights["visual_projection.weight"] = torch.ones(24, 24)
    save_file(weights, wider / "model.safetensors")
    (wider / "config.json").write_text(json.dumps({**settings, "projection_dim": 24}))
    assert "is for a vision tower of width 20" in refused(wider)
    (tmp_path / "tower" / "model.safetensors").rename(tmp_path / "tower" / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(tmp_path / "tower")


def test_the_command_says_it_in_one_line_with_its_exit_code(file, tiny_folder, tmp_path, capsys):
    photo(0).save(tmp_path / "a.png")
    words = ["generate", "a cat", "--model", str(tiny_folder), "--ip-adapter", str(file)]
    assert main([*words, "--ip-adapter-image", str(tmp_path / "a.png")]) == 2
    said = capsys.readouterr().err.strip()
    assert "vision tower" in said and len(said.splitlines()) == 1
