"""What a single file of others says of its prediction type, told from headers of full-width files without weights."""

import json
import struct

import pytest

from ldm.checkpoint import check_model
from ldm.checkpoint.families import FAMILIES
from ldm.checkpoint.single import plan_of
from ldm.checkpoint.single.names import originals, parts_of
from ldm.errors import ConfigError, ModelError
from tests.checkpoint.test_families import shapes

ARCHITECTURE = "modelspec.architecture"
V, EPSILON = "v_prediction", "epsilon"


@pytest.fixture(scope="module")
def tables():
    """family -> the table of contents of its single file, at full width, in fp16."""
    found = {}
    for family in ("sd1", "sd2", "xl"):
        parts, table = parts_of(FAMILIES[family].configs(EPSILON)), {}
        for part, names in shapes(FAMILIES[family]).items():
            for key, place in originals(parts[part], names):
                first = names[place.names[0]]
                shape = {"flat": (*first, 1, 1), "transposed": first[::-1]}.get(place.change, first)
                table[key] = (len(place.names) * shape[0], *shape[1:])
        found[family] = table
    return found


@pytest.fixture
def write(tables, tmp_path):
    """A function (family, keys, metadata) -> a sound file that takes no room: zeros in the place of weights."""

    def file(family, keys=(), metadata=None, **others):
        header, end = {"__metadata__": metadata or {}}, 0
        for name, shape in {**tables[family], **dict.fromkeys(keys, (0,)), **others}.items():
            size, start = 2, end
            for side in shape:
                size *= side
            end += size
            header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
        raw = json.dumps(header).encode()
        with (tmp_path / "m.safetensors").open("wb") as handle:
            handle.write(struct.pack("<Q", len(raw)) + raw)
            handle.truncate(8 + len(raw) + end)
        return tmp_path / "m.safetensors"

    return file


@pytest.mark.parametrize(
    "family, keys, metadata, said",
    [
        ("sd1", (), {}, EPSILON),
        ("xl", (), {}, EPSILON),
        ("sd1", ("v_pred",), {}, V),
        ("xl", ("v_pred", "ztsnr"), {}, V),
        ("sd2", (), {"modelspec.prediction_type": "v"}, V),
        ("sd2", (), {"modelspec.prediction_type": "epsilon"}, EPSILON),
        ("sd2", (), {"modelspec.predict_key": "v"}, V),
        ("sd2", (), {"ss_v_parameterization": "True"}, V),
        ("sd2", (), {"ss_v_parameterization": "False"}, EPSILON),
        ("sd2", (), {ARCHITECTURE: "stable-diffusion-v2-768-v"}, V),
        ("sd2", (), {ARCHITECTURE: "stable-diffusion-v2-512/inpainting"}, EPSILON),
        ("sd2", ("v_pred",), {"modelspec.prediction_type": "v"}, V),
    ],
)
def test_it_is_read_from_keys_and_metadata(write, family, keys, metadata, said):
    plan = plan_of(write(family, keys, metadata))
    assert plan.configs["scheduler"]["prediction_type"] == said and plan.family == family
    zero = "ztsnr" in keys
    assert plan.configs["scheduler"]["rescale_betas_zero_snr"] is zero and plan.ignored == {}
    assert plan.configs["scheduler"]["timestep_spacing"] == ("trailing" if zero else "leading")
    side = {"sd1": 64, "sd2": 96 if said == V else 64, "xl": 128}[family]
    assert plan.configs["unet"]["sample_size"] == side


def test_a_2x_file_that_does_not_say_it_is_refused(write):
    path = write("sd2")
    with pytest.raises(ModelError, match=r"Stable Diffusion 2.x, and its prediction type is not in the file") as error:
        check_model(path)
    assert "give --prediction-type epsilon" in str(error.value) and str(error.value).startswith(str(path))
    for asked, said in (("epsilon", EPSILON), ("v", V), ("v_prediction", V)):
        assert check_model(path, prediction_type=asked) == path
        assert plan_of(path, said).configs["scheduler"]["prediction_type"] == said
    with pytest.raises(ConfigError, match=r"unknown prediction type 'velocity'"):
        check_model(path, prediction_type="velocity")


YAML = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    {}\n"
SGM = "denoiser_config: {{params: {{scaling_config: {{target: sgm.modules.diffusionmodules.denoiser_scaling.{}}}}}}}"


@pytest.mark.parametrize(
    "text, said",
    [
        (YAML.format('parameterization: "v"'), V),
        (YAML.format("linear_start: 0.00085"), EPSILON),
        (YAML.format(SGM.format("VScaling")), V),
        (YAML.format(SGM.format("EpsScaling")), EPSILON),
    ],
)
def test_it_is_read_from_a_yaml_beside_the_file(write, text, said):
    path = write("sd2")
    path.with_suffix(".yaml").write_text(text)
    assert plan_of(path).configs["scheduler"]["prediction_type"] == said


@pytest.mark.parametrize("text", ["a: 1", "model: 3", "", "- 1"])
def test_a_yaml_of_another_kind_says_nothing_or_is_refused(write, text):
    path = write("sd2")
    path.with_suffix(".yaml").write_text(text)
    with pytest.raises(ModelError, match=r"not in the file|must be a mapping"):
        check_model(path)


def test_two_ways_of_telling_it_have_to_agree(write):
    path = write("sd2", ("v_pred",), {"modelspec.prediction_type": "epsilon"})
    said = "modelspec.prediction_type says epsilon, the key v_pred says v_prediction; give --prediction-type"
    with pytest.raises(ModelError, match=said):
        check_model(path)
    assert plan_of(path, EPSILON).configs["scheduler"]["prediction_type"] == EPSILON


def test_inpainting_files_are_known_and_other_files_are_named(write):
    conv = {"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}
    plan = plan_of(write("sd1", **conv))
    assert plan.family == "sd1-inpainting" and plan.configs["unet"]["in_channels"] == 9
    with pytest.raises(ModelError, match="an upscaler"):
        check_model(write("sd2", **{"model.diffusion_model.input_blocks.0.0.weight": (320, 7, 3, 3)}))
    with pytest.raises(ModelError, match="Playground"):
        check_model(write("xl", ("edm_mean",)))
    assert plan_of(write("sd1", ("stranger",))).leftovers == ("stranger",)
    inside = "model.diffusion_model.stranger.weight"
    with pytest.raises(ModelError, match=rf"1 keys that belong to no part of the model \({inside}\)"):
        check_model(write("sd1", (inside,)))
