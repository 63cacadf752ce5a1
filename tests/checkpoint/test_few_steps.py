"""What says that a file was made for few steps, and what does not."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoint.describe import describe
from ldm.checkpoint.few_steps import KEY, KINDS, Sampling, named, of_lora, of_model, read_key
from ldm.checkpoint.inspect import inspect
from ldm.checkpoint.inspect_text import as_text
from ldm.checkpoint.lora import read_lora_header
from ldm.errors import ModelError

BLOCK = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"
ATTENTION = (f"{BLOCK}_attn1_to_q", f"{BLOCK}_attn2_to_out_0")
ALL = (*ATTENTION, f"{BLOCK}_ff_net_2", "lora_unet_mid_block_resnets_0_conv1")
ALL += ("lora_unet_mid_block_resnets_0_time_emb_proj",)
SGM = tuple(
    layer.replace("_conv1", "_in_layers_2").replace("_time_emb_proj", "_emb_layers_1").replace("mid_", "middle_")
    for layer in ALL
)
XL = {"cross_attention_dim": 2048, "sample_size": 128}


def lora(folder, name, layers=ALL, metadata=None, ranks=(2,)):
    tensors = {}
    for i, layer in enumerate(layers):
        rank = ranks[i % len(ranks)]
        tensors |= {f"{layer}.lora_down.weight": torch.zeros(rank, 8), f"{layer}.lora_up.weight": torch.zeros(8, rank)}
        tensors[f"{layer}.alpha"] = torch.tensor(float(rank))
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors", metadata)
    return folder / f"{name}.safetensors"


def told(*args, **more):
    return of_lora(read_lora_header(lora(*args, **more)))


@pytest.mark.parametrize("metadata", [{"ldm_words": "[]"}, {"ss_training_comment": "written by ldm 0.1.0"}])
def test_a_fine_tuning_of_ours_is_no_few_step_file_for_its_layers(tmp_path, metadata):
    assert "changes the layers that few-step LoRAs change" in told(tmp_path, "mine").line
    assert told(tmp_path, "mine", metadata=metadata) is None


@pytest.mark.parametrize("layers", [ALL, SGM], ids=["diffusers' names", "the original code's"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lcm-lora-sdv1-5", ("LCM", "lcm", None, 4, 1.0, None)),
        ("sdxl_lightning_8step_lora", ("Lightning", "euler", "trailing", 8, 1.0, None)),
        ("Hyper-SDXL-2steps-lora", ("Hyper-SD", "ddim", "trailing", 2, 1.0, None)),
        ("Hyper-SD15-1step-lora", ("Hyper-SD", "tcd", None, 1, 1.0, 1.0)),
        ("Hyper-SDXL-8steps-CFG-lora", ("Hyper-SD", "ddim", "trailing", 8, 5.0, None)),
        ("dmd2_sdxl_4step_lora_fp16", ("DMD2", "lcm", "trailing", 4, 1.0, None)),
        ("TCD-SDXL-LoRA", ("TCD", "tcd", None, 4, 1.0, None)),
        ("pcm_sd15_lcmlike_lora_converted", ("PCM", "lcm", None, 4, 1.0, None)),
        ("pcm_sdxl_smallcfg_2step_converted", ("PCM", "tcd", "trailing", 2, 1.0, None)),
        ("pcm_sd15_normalcfg_16step_converted", ("PCM", "tcd", "trailing", 16, 7.5, None)),
        ("sd_xl_turbo_lora_v1", ("Turbo", "euler_ancestral", "trailing", 4, 1.0, None)),
    ],
)
def test_layers_and_name_together_decide(tmp_path, name, expected, layers):
    found = told(tmp_path, name, layers)
    s = found.sampling
    kind = (s.kind, s.sampler, s.spacing, s.num_inference_steps, s.guidance_scale, s.eta)
    assert kind == expected and not found.doubtful
    assert found.line.startswith(f"{name}.safetensors: {expected[0]} (by its layers and name); where nothing else")


def test_a_folder_gives_its_files_name(tmp_path):
    file = lora(tmp_path / "lcm-lora-sdv1-5", "pytorch_lora_weights")
    assert of_lora(read_lora_header(file.parent)).sampling.kind == "LCM"


@pytest.mark.parametrize(
    ("layers", "metadata", "ranks"),
    [
        (ATTENTION, None, (2,)),
        (ALL, {"ss_network_dim": "2"}, (2,)),  # a trainer's notes
        (ALL, None, (2, 4)),
        ((*ALL, "lora_te_text_model_encoder_layers_0_mlp_fc1"), None, (2,)),
    ],
    ids=["attention alone", "noted", "two ranks", "with a text encoder"],
)
def test_a_name_alone_warns_and_decides_nothing(tmp_path, layers, metadata, ranks):
    found = told(tmp_path, "my_lightning_4step", layers, metadata, ranks)
    assert found.sampling is None and found.doubtful
    assert "give --sampler euler --spacing trailing --steps 4 --guidance-scale 1" in found.line
    assert told(tmp_path, "style", layers, metadata, ranks) is None


def test_layers_alone_are_told(tmp_path):
    found = told(tmp_path, "style")
    assert found.sampling is None and not found.doubtful and "if it is one, its page says sampler" in found.line


@pytest.mark.parametrize("name", ["turbocharged", "calcmap", "lcmx", "tcdish", "hypersdx", "a red cat", "stepmother"])
def test_parts_of_words_are_no_names(name):
    assert named(name) is None


def test_our_key_in_the_header_decides_whatever_the_name(tmp_path):
    settings = {"sampler": "LCM", "num_inference_steps": 2, "guidance_scale": 1.5}
    found = told(tmp_path, "sdxl_lightning_4step", ATTENTION, {KEY: json.dumps(settings)})
    assert found.sampling.defaults == {"sampler": "lcm", "num_inference_steps": 2, "guidance_scale": 1.5}
    assert read_key('{"sampler": "tcd", "eta": 0.5}', "x").eta == 0.5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be understood"),
        ("[]", "cannot be understood"),
        ("{}", "cannot be understood"),
        ('{"sampler": "eulr"}', "did you mean 'euler'"),
        ('{"sampler": "euler", "spaceing": "karras"}', "did you mean 'spacing'"),
        ('{"sampler": "euler", "num_inference_steps": 0}', "says 0 steps"),
        ('{"sampler": "euler", "guidance_scale": NaN}', "guidance nan"),
        ('{"sampler": "euler", "eta": 0.5}', "takes no eta"),
    ],
)
def test_a_malformed_key_is_one_line(text, said):
    with pytest.raises(ModelError, match=f"^x: .*{said}") as refused:
        read_key(text, "x")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "scheduler", "unet", "kind"),
    [
        ("m", {"_class_name": "LCMScheduler"}, {}, "LCM"),
        ("m", {"_class_name": "TCDScheduler"}, {}, "TCD"),
        (
            "m",
            {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
            {**XL, "sample_size": 64},
            "Turbo",
        ),
        ("sd-turbo", {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, {}, "Turbo"),
        ("m", {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, XL, None),
        ("m", {"_class_name": "PNDMScheduler"}, {**XL, "sample_size": 64}, None),
    ],
)
def test_models_by_their_settings(name, scheduler, unet, kind):
    found = of_model(name, scheduler, unet, {})
    assert (None if found is None else found.sampling.kind) == kind


def test_a_models_name_alone_warns_and_its_scheduler_decides(changed_folder):
    folder = changed_folder("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"})
    info = describe(folder)
    assert info.few == KINDS["LCM"] and info.card == KINDS["LCM"].defaults
    assert any("LCM (by its LCMScheduler)" in note for note in info.notes)
    assert inspect(folder)["few_steps"] == {"kind": "LCM", **KINDS["LCM"].defaults}
    renamed = folder.rename(folder.with_name("my_turbo"))
    settings = json.loads((renamed / "scheduler/scheduler_config.json").read_text())
    (renamed / "scheduler/scheduler_config.json").write_text(json.dumps({**settings, "_class_name": "DDIMScheduler"}))
    info = describe(renamed)
    assert (
        info.few is None and "sampler" not in info.card and "its name says Turbo, nothing inside does" in info.doubts[0]
    )
    assert inspect(renamed)["notes"] == [*info.doubts]


def test_inspect_tells(tmp_path):
    info = inspect(lora(tmp_path, "lcm-lora"))
    assert info["few_steps"] == {"kind": "LCM", "sampler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0}
    assert "few steps        kind LCM, sampler lcm, num_inference_steps 4, guidance_scale 1.0" in as_text(info)


def test_what_cannot_work_is_remarked_and_all_else_is_not():
    turbo = KINDS["Turbo"]
    assert turbo.remarks({}) == turbo.remarks(turbo.defaults) == turbo.remarks({"guidance_scale": [1, 0]}) == []
    (line,) = turbo.remarks({"guidance_scale": 7, "sampler": "Euler a"})
    assert line == "Turbo was made without guidance: with 7 colours burn"
    (line,) = turbo.remarks({"num_inference_steps": 30})
    assert line == "Turbo was made for 4 steps, not 30"
    (line,) = KINDS["LCM"].remarks({"sampler": "DPM++ 2M Karras", "guidance_scale": 2})
    assert line == "LCM was made for the sampler lcm: DPM++ 2M Karras may draw rubbish"


@pytest.mark.parametrize("kind", KINDS)
def test_each_kinds_settings_can_be_given_on_the_command_line(kind):
    found: Sampling = KINDS[kind]
    words = found.options.split()
    assert words[words.index("--sampler") + 1] == found.sampler and found.remarks(found.defaults) == []
