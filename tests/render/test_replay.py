"""From pictures and manifests back to settings: ours to the bit, other programs' as far as they say."""

import json
import random
import re

import pytest
from PIL import Image
from prompt_files import jobs_of

from ldm import images
from ldm.diffusion.inpaint import steps_left
from ldm.errors import ConfigError, LdmError, NumericsError
from ldm.pipeline.metadata import parameters
from ldm.render.output.lines import last_lines
from ldm.render.output.manifest import Manifest
from ldm.render.prompts.entry import Entry
from ldm.render.replay.a1111_text import read_infotext, split_fields
from ldm.render.replay.replay import differences, fitted_to, keywords, read_replays

A1111 = """a cat, (best:1.2)
on two lines <lora:style:0.8> <hypernet:old:1>
Negative prompt: bad, worse
and more
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 965400086, Size: 512x768, \
Model hash: 45dee52b01, Model: anything, Denoising strength: 0.5, Hires upscale: 2, Hires upscaler: Latent, \
Lora hashes: "style: abcdef012345, other: 00", ControlNet 0: "preprocessor: canny, model: \\"x\\"", \
ADetailer model: face_yolov8n.pt, Variation seed: 5, Variation seed strength: 0.2, RNG: CPU, Version: v1.10.1"""
COMFY = """a cat
Negative prompt: x
Steps: 20, Sampler: dpmpp_2m_sde_gpu_karras, CFG scale: 8.0, Seed: 5, Size: 64x64, Model: v1-5, Version: ComfyUI, \
Hashes: {"model": "abc", "LORA:x": "1,2"}, Civitai resources: [{"a":"b, c"}]"""
SDCPP = """a cat
Steps: 25, CFG scale: 7.000000, SLG scale: 2.5, Skip layers: [7, 8, 9, ], Guidance: 3.500000, Eta: 0.000000, \
Seed: 42, Size: 512x512, Model: sd-v1-4.ckpt, RNG: cuda, Sampler: euler_a, Version: stable-diffusion.cpp"""


def picture(path, text="", record=None, format="png"):
    path.write_bytes(images.encode(Image.new("RGB", (8, 8)), format, images.Metadata(text, record or {})))
    return path


def replay_of(tmp_path, text="", *changes, record=None):
    (replay,) = read_replays([picture(tmp_path / "old.png", text, record)], changes)
    return replay


def settings_of(tmp_path, text, *changes, record=None):
    replay = replay_of(tmp_path, text, *changes, record=record)
    assert replay.entry.error is None, replay.entry.error
    return dict(replay.entry.settings)


# A1111 and its relatives


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_an_a1111_picture_says_what_it_can_and_names_the_rest(tmp_path, format):
    (replay,) = read_replays([picture(tmp_path / f"old.{format}", A1111, format=format)])
    assert replay.entry.settings == {
        "prompt": "a cat, (best:1.2)\non two lines <lora:style:0.8>",
        "negative_prompt": "bad, worse\nand more",
        "num_inference_steps": 20,
        "sampler": "dpmpp_2m",
        "spacing": "karras",
        "guidance_scale": 7.5,
        "seed": 965400086,
        "width": 512,
        "height": 768,
        "variation_seed": 5,
        "variation_strength": 0.2,
        "hires_scale": 2.0,
        "hires_strength": 0.5,
        "hires_steps": 40,  # A1111 runs as many as before, 20, at the end of 40
    }
    assert replay.notes == (
        "not repeated: prompt: <hypernet:old:1>",
        "not repeated: Hires upscaler: Latent (the image is enlarged by Lanczos here)",
        'not repeated: ControlNet 0: preprocessor: canny, model: "x"',
        "not repeated: ADetailer model: face_yolov8n.pt",
    )
    told = {
        "program": "v1.10.1",
        "model": "anything",
        "model_hash": "45dee52b01",
        "lora": "style: abcdef012345, other: 00",
    }
    assert replay.source == told


def test_a_comfyui_picture_in_a1111_style(tmp_path):
    replay = replay_of(tmp_path, COMFY)
    assert replay.notes == ()
    settings = {"sampler": "dpmpp_2m_sde", "spacing": "karras", "seed": 5, "width": 64, "guidance_scale": 8.0}
    assert {name: replay.entry.settings[name] for name in settings} == settings


def test_a_stable_diffusion_cpp_picture(tmp_path):
    replay = replay_of(tmp_path, SDCPP)
    assert replay.notes == (
        "not repeated: SLG scale: 2.5",
        "not repeated: Skip layers: [7, 8, 9, ]",
        "not repeated: RNG: cuda (noise is drawn on the CPU here: the image will differ)",
    )
    settings = dict(replay.entry.settings)
    assert settings["sampler"] == "euler_ancestral" and settings["spacing"] == "linspace" and "eta" not in settings


@pytest.mark.parametrize(
    ("fields", "sampler", "spacing"),
    [
        ("Sampler: DPM++ 2M Karras, ", "dpmpp_2m", "karras"),
        ("Sampler: DPM++ 2M, Schedule type: Automatic, ", "dpmpp_2m", "karras"),
        ("Sampler: DPM++ 2M SDE, Schedule type: Automatic, ", "dpmpp_2m_sde", "exponential"),
        ("Sampler: DPM++ 2M, ", "dpmpp_2m", "linspace"),
        ("Sampler: Euler a, Schedule type: Automatic, ", "euler_ancestral", "linspace"),
        ("Sampler: Euler, Schedule type: SGM Uniform, ", "euler", "sgm_uniform"),
        ("Sampler: DDIM, ", "ddim", "leading"),
        ("Sampler: Euler, Schedule type: DDIM, ", "euler", "leading"),
        ("Sampler: dpm++2m karras, ", "dpmpp_2m", "karras"),
        ("Sampler: euler discrete, ", "euler", "linspace"),
        ("Sampler: euler_normal, ", "euler", "linspace"),
        ("Sampler: euler, Scheduler: sgm_uniform, ", "euler", "sgm_uniform"),
        ("Sampler: LCM, ", "lcm", None),
    ],
)
def test_samplers_and_what_an_absent_schedule_means(tmp_path, fields, sampler, spacing):
    settings = settings_of(tmp_path, f"x\nSteps: 5, {fields}CFG scale: 2, Seed: 1, RNG: CPU")
    assert (settings["sampler"], settings.get("spacing")) == (sampler, spacing)


def test_a_missing_rng_is_the_gpus(tmp_path):
    line = "x\nSteps: 5, Sampler: Euler, CFG scale: 2, Seed: 1, Size: 8x8"
    assert replay_of(tmp_path, line).notes == (
        "not repeated: RNG is not given, so the noise was drawn on a GPU: the image will differ",
    )
    assert replay_of(tmp_path, f"{line}, RNG: CPU").notes == ()
    assert "drawn on the CPU here" in replay_of(tmp_path, f"{line}, RNG: NV").notes[0]


def test_clip_skip_counts_as_a1111_does(tmp_path):
    line = "x\nSteps: 5, Sampler: Euler, CFG scale: 2, RNG: CPU, Seed: 1, Size: 8x8, Clip skip:"
    assert settings_of(tmp_path, f"{line} 2")["clip_skip"] == 1
    assert settings_of(tmp_path, f"{line} 1")["clip_skip"] == 0
    assert "clip_skip" not in settings_of(tmp_path, f"{line} -1")


def test_a_prompt_alone_is_a_prompt(tmp_path):
    replay = replay_of(tmp_path, "a portrait, style: oil, mood: dark, light: soft")
    assert replay.entry.settings["prompt"] == "a portrait, style: oil, mood: dark, light: soft"
    assert replay.notes == ("not given: seed, steps, guidance scale, size, sampler (drawn, or the model's own)",)


@pytest.mark.parametrize(
    ("field", "said", "change"),
    [
        ("Sampler: DPM fast", "(Sampler): unknown sampler 'DPM fast'", "sampler=euler"),
        ("Schedule type: KL Optimal", "(Schedule type): unknown spacing 'KL Optimal'", "spacing=karras"),
        ("Schedule type: KL Optimal", "--set spacing=VALUE", "spacing=Automatic"),
        ("Steps: many", "(Steps): expected a whole number, got 'many'", "steps=3"),
        ("Size: 5", "(Size): expected WIDTHxHEIGHT", "size=64x64"),
        ("CFG scale: nan", "(CFG scale): expected a number", "cfg=3"),
        ("Seed: 99999999999999999999", "(Seed): ", "seed=1"),
    ],
)
def test_a_value_that_cannot_be_taken_is_an_error_that_a_change_mends(tmp_path, field, said, change):
    names = {"Steps": 5, "Sampler": "Euler", "CFG scale": 2, "Seed": 1, "Size": "8x8", "RNG": "CPU"}
    key, value = field.split(": ")
    line = "x\n" + ", ".join(f"{name}: {text}" for name, text in {**names, key: value}.items())
    assert said in str(replay_of(tmp_path, line).entry.error)
    assert settings_of(tmp_path, line, change)


def test_changes_replace_what_is_said(tmp_path):
    settings = settings_of(
        tmp_path, A1111, "steps=50", "sampler=euler", "size=64x64", "prompt=a dog", "spacing=Automatic"
    )
    assert settings["num_inference_steps"] == 50 and settings["sampler"] == "euler" and "spacing" not in settings
    assert (settings["width"], settings["height"], settings["prompt"]) == (64, 64, "a dog")
    assert settings["seed"] == 965400086 and settings["guidance_scale"] == 7.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("stpes=50", "did you mean 'steps'"),
        ("steps", "expected KEY=VALUE"),
        ("=5", "expected KEY=VALUE"),
        ("steps=0", "steps: 0 is outside"),
        ("sampler=eular", "did you mean 'euler'"),
        ("cn=x.png", "say controlnet, control_image"),
    ],
)
def test_bad_changes_are_refused_before_anything_is_read(tmp_path, change, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_replays([tmp_path], [change])


def test_sources_that_say_nothing(tmp_path):
    with pytest.raises(ConfigError, match="no such image"):
        read_replays([tmp_path / "nowhere.png"])
    assert "holds nothing of how it was drawn" in str(replay_of(tmp_path).entry.error)
    (tmp_path / "text.png").write_text("no picture")
    replays = list(read_replays([tmp_path / "text.png", picture(tmp_path / "good.png", A1111)]))
    assert "cannot be read as an image" in str(replays[0].entry.error) and replays[1].entry.error is None
    (tmp_path / "manifest.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds no jobs"):
        list(read_replays([tmp_path / "manifest.jsonl"]))


def test_every_character_of_the_fields_is_in_a_field_or_in_the_rest():
    line = 'Steps: 4, nonsense here, "x": y, A b: "q, r: \\"s\\"", Empty:, J: {"a": "}, {"}, Long: [1, [2, 3], ], z'
    fields, rest = split_fields(line)
    assert fields == [("Steps", "4"), ("A b", 'q, r: "s"'), ("Empty", ""), ("Long", "[1, [2, 3], ]")]
    assert rest == ["nonsense here", '"x": y', 'J: {"a": "}', '{"}', "z"]


def test_lines_behind_the_fields_are_fields_too():
    text = read_infotext("p\nSteps: 4, Sampler: Euler, Seed: 5\nVersion: ComfyUI 1.0\nTemplate: a {b|c}")
    assert text.prompt == "p" and dict(text.fields)["Template"] == "a {b|c}" and len(text.fields) == 5


def test_damaged_texts_raise_nothing_but_ldm_errors(tmp_path):
    """Cut, doubled, shuffled and overwritten texts, through the whole reader; and none takes long."""
    from ldm.render.replay.a1111_settings import a1111_settings
    from ldm.render.replay.overrides import Changes

    draw, seen = random.Random(7), {"read": 0, "refused": 0}
    pieces = [*',:"\\\n[{}]é🐈\0\ud800', "Steps: ", "Negative prompt:", "-1", "Sampler: ", "Size: 1x", "Seed: 1e999"]
    pieces += ["Hires x: ", "<lora:", ">", "9" * 400, "nan", '"\\', "Clip skip: "]
    for _ in range(6000):
        text = draw.choice([A1111, COMFY, SDCPP])
        for _ in range(draw.randrange(1, 8)):
            i, j = sorted(draw.randrange(len(text) + 1) for _ in range(2))
            text = draw.choice([text[:i] + text[j:], text[:i] + draw.choice(pieces) + text[i:], text[j:] + text[:i]])
        try:
            settings, notes, _ = a1111_settings(read_infotext(text), tmp_path, Changes.read([]))
            assert isinstance(settings.get("prompt", ""), str) and all("\n" not in note for note in notes)
            json.dumps(settings)
            seen["read"] += 1
        except LdmError as error:
            assert "\n" not in str(error)
            seen["refused"] += 1
    assert min(seen.values()) > 300


@pytest.mark.parametrize(
    "unit", ["a", "a:", 'a:"', "ab: [", "ab: {", "ab: [{", '"', "\\", ",", "Steps: 1, ", "[", 'ab: "\\']
)
def test_long_texts_are_read_in_linear_time(unit):
    import time

    text = unit * (100_000 // len(unit))
    start = time.perf_counter()
    read_infotext(text)
    assert time.perf_counter() - start < 5


# Ours


def record_of(**more):
    common = {"prompt": "a cat", "negative_prompt": "", "seed": 7, "guidance_scale": 4.0, "num_inference_steps": 3}
    common |= {
        "guidance": "apg",
        "guidance_rescale": 0.5,
        "apg_eta": 0.1,
        "pag_layers": None,
        "height": 32,
        "width": 64,
    }
    common |= {"sampler": "ddim", "spacing": None, "eta": 0.5, "latents": None, "timesteps": None, "clip_skip": 1}
    common |= {"model": "default", "model_hash": "ab" * 32, "commit": None, "schedule": {"x": 1}, "dtype": "bf16"}
    common |= {"device": "cpu", "threads": 2, "cpu_capability": "AVX2", "versions": {"ldm": "1", "torch": "2.13"}}
    return common | {"truncated": "", "unknown_words": [], "attention": "auto", "offload": False} | more


def replay_of_record(folder, record):
    """Without the way through a picture's file."""
    from ldm.render.replay import replay
    from ldm.render.replay.overrides import Changes

    entry = Entry("old.png", 1, "", None)
    return replay._replay(entry, lambda: replay._of_metadata(record, folder, Changes.read([])), Changes.read([]))


def test_our_record_says_every_setting(tmp_path):
    replay = replay_of(tmp_path, "ignored", record=record_of())
    expected = {"prompt": "a cat", "negative_prompt": "", "seed": 7, "guidance_scale": 4.0, "num_inference_steps": 3}
    expected |= {
        "guidance": "apg",
        "guidance_rescale": 0.5,
        "apg_eta": 0.1,
        "height": 32,
        "width": 64,
        "sampler": "ddim",
    }
    assert replay.entry.settings == {**expected, "eta": 0.5, "clip_skip": 1, "model": "default"}
    assert replay.notes == ()
    own, call = keywords(replay)
    assert own == {"prompt": "a cat", "negative_prompt": "", "model": "default", "dtype": "bf16"}
    assert call["guidance"] == "apg" and call["seed"] == 7 and "prompt" not in call


def test_a_negative_prompt_that_is_none_stays_none(tmp_path):
    assert settings_of(tmp_path, "", record=record_of(negative_prompt=None))["negative_prompt"] is None


def test_explicit_noise_levels_stand_in_place_of_steps_until_steps_are_changed(tmp_path):
    record = record_of(timesteps=[900, 500.5])
    settings = settings_of(tmp_path, "", record=record)
    assert settings["timesteps"] == (900, 500.5) and "num_inference_steps" not in settings
    settings = settings_of(tmp_path, "", "steps=9", record=record)
    assert "timesteps" not in settings and settings["num_inference_steps"] == 9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"latents": "given"}, "given latents"),
        ({"guidance": "apgg"}, "unknown guidance"),
        ({"apg_eta": "x"}, "apg_eta"),
        ({"sampler": 5}, "unknown sampler"),
        ({"prompt": ["a"]}, "expected a text"),
        ({"lora": [{"path": "gone.safetensors", "weight": 1}]}, "gone.safetensors"),
        ({"lora": 5}, "lora"),
        ({"width": None, "seed": "x"}, "seed"),
    ],
)
def test_records_that_cannot_be_repeated_are_named(tmp_path, change, said):
    replay = replay_of(tmp_path, record=record_of(**change))
    assert said in str(replay.entry.error) and "\n" not in str(replay.entry.error)


def test_damaged_records_raise_nothing_but_ldm_errors(tmp_path):
    draw, refused, names = random.Random(3), 0, sorted(record_of(lora=[], vae="x", emphasis="original", sigmas=None))
    values = [
        None,
        5,
        -1,
        1e999,
        float("nan"),
        "",
        "x\0",
        "\ud800",
        [],
        [1],
        ["a", {}],
        {},
        {"torch": []},
        True,
        10**30,
    ]
    values += [[{"path": None, "weight": "x"}], [[None, None]], "a/b", "y" * 5000, [[]]]
    for _ in range(3000):
        record = record_of() | {draw.choice(names): draw.choice(values) for _ in range(draw.randrange(1, 5))}
        replay = replay_of_record(tmp_path, record)
        refused += replay.entry.error is not None
        if replay.entry.error is None:
            assert all("\n" not in line for line in (*replay.notes, *differences(replay.source, record_of())))
    assert 500 < refused < 2900


def test_loras_of_a_record_come_back_with_their_weights(tmp_path):
    file = tmp_path / "red.safetensors"
    file.touch()
    lora = {"name": "red", "path": str(file), "weight": -0.5, "hash": "00", "short_hash": "00"}
    replay = replay_of(tmp_path, record=record_of(lora=[lora | {"text_weight": 0.25}]))
    assert keywords(replay)[0]["lora"] == [(str(file), -0.5, 0.25)]
    replay = replay_of(tmp_path, record=record_of(lora=[lora]))
    assert replay.entry.settings["lora"] == ((str(file), -0.5),) and keywords(replay)[0]["lora"] == [(str(file), -0.5)]


def test_a_record_of_a_newer_version_names_what_it_does_not_know(tmp_path):
    assert "not repeated: vortex: 3" in replay_of(tmp_path, record=record_of(vortex=3)).notes[0]


def test_our_parameters_text_alone_says_the_same(tmp_path):
    record = record_of(
        sampler="dpmpp_2m", spacing="karras", prompt='say "hi", (you:1.2)\n# no', negative_prompt="a: b, c"
    )
    replay = replay_of(tmp_path, parameters({**record, "threads": 1}))
    same = ("prompt", "negative_prompt", "seed", "guidance_scale", "num_inference_steps", "sampler", "spacing", "width")
    assert {name: replay.entry.settings[name] for name in same} == {name: record[name] for name in same}
    assert not [note for note in replay.notes if "RNG" in note]


@pytest.mark.parametrize("skipped", [0, 1, 3])
def test_our_parameters_text_tells_the_layers_that_are_left_out(tmp_path, skipped):
    record = record_of(sampler="dpmpp_2m", spacing="karras", eta=None, clip_skip=skipped)
    assert settings_of(tmp_path, parameters(record)).get("clip_skip", 0) == skipped


def test_a_manifest_gives_each_job_once(tmp_path):
    jobs = jobs_of(["a cat --d 1", "a dog --d 2 --l 3", "a cow --d 3"])
    with Manifest(tmp_path) as ledger:
        for job in jobs[:2]:
            ledger.save(job, b"picture of " + job.key.encode())
        ledger.fail(jobs[0], NumericsError("later, after its file was taken away"))
        ledger.fail(jobs[2], NumericsError("NaN"))
        ledger.fail(jobs[2], NumericsError("NaN again"))
    assert [(line["status"], line["seed"]) for line in last_lines(tmp_path)] == [
        ("done", 1),
        ("done", 2),
        ("failed", 3),
    ]
    for source in (tmp_path, tmp_path / "manifest.jsonl"):
        replays = list(read_replays([source], ["steps=50"]))
        assert [dict(replay.entry.settings) for replay in replays] == [
            {**job.settings, "num_inference_steps": 50} for job in jobs
        ]
    again = jobs_of([dict(replay.entry.settings) for replay in read_replays([tmp_path])])
    assert [job.key for job in again] == [job.key for job in jobs]


def test_a_rendered_folder_gives_the_same_jobs_again(tiny_folder, tmp_path):
    """With every setting that a line cannot say: keys hash all of them, so equal keys are equal pictures."""
    from ldm.pipeline import Pipeline
    from ldm.render.drawing.runner import render
    from ldm.render.jobs.jobs import Plan
    from ldm.render.jobs.resolve import Resolver

    prompts = [
        "a cat --s 2",
        "a {red|blue} dog --n a cat --d 7",
        "a cat --s 2",
        {"prompt": "a \\{cat\\}", "seed": [3, 4]},
    ]
    drawing = {"sampler": "euler_ancestral", "spacing": "karras", "clip_skip": 1, "emphasis": "no_norm"}
    drawing |= {"guidance": "apg", "guidance_scale": 3, "guidance_interval": (0, 0.8), "num_inference_steps": 3}
    folder = render(prompts, tmp_path, model=str(tiny_folder), **drawing).folder
    jobs = list(Plan((replay.entry for replay in read_replays([folder])), {}, Resolver()))
    lines = list(last_lines(folder))
    assert [(job.key, dict(job.settings)) for job in jobs] == [(line["key"], line["settings"]) for line in lines]
    (replay,) = read_replays([folder / lines[-1]["path"]], [f"model={tiny_folder}"])
    own, call = keywords(replay)
    with Image.open(folder / lines[-1]["path"]) as picture:
        assert Pipeline(**own).generate(**call)[0].tobytes() == picture.tobytes()


def test_what_will_differ_is_said_in_one_line_each():
    record = record_of(lora=[{"name": "red", "short_hash": "abcdef012345"}])
    assert differences(record, record) == []
    other = record_of(model="other", model_hash="cd" * 32, dtype="fp32", versions={"torch": "3.0"})
    assert differences(record, {**other, "lora": [{"name": "red", "short_hash": "ffff"}]}) == [
        "the image was drawn by default (hash ababababab), this model is other (hash cdcdcdcdcd): it will differ",
        "LoRA red had the hash abcdef0123, this one has ffff: it will differ",
        "dtype was bf16, is fp32: the last bits may differ",
        "torch was 2.13, is 3.0: the last bits may differ",
    ]
    assert differences({"model": "x", "model_hash": "ab" * 5, "lora": "red: abcdef0123, y: 1"}, record) == []
    (line,) = differences({"model": "x", "model_hash": "45dee52b", "program": "v1"}, record)
    assert "45dee52b" in line and line.endswith("or its hash is of the old kind")
    (line,) = differences({"model": "sd-v1-4.ckpt"}, record)
    assert "of unknown hash" in line


def test_a_picture_of_the_default_model_comes_out_to_the_bit(tmp_path):
    from ldm import Pipeline

    asked = {"seed": 5, "num_inference_steps": 2, "guidance_scale": 2.5, "sampler": "dpmpp_2m"}
    first = Pipeline("a red car", negative_prompt="a cat").generate(**asked)
    first.save(tmp_path / "old.png")
    (replay,) = read_replays([tmp_path / "old.png"])
    own, call = keywords(replay)
    again = Pipeline(**own).generate(**call)
    assert again[0].tobytes() == first[0].tobytes()
    assert differences(replay.source, again.metadata[0]) == []
    (changed,) = read_replays([tmp_path / "old.png"], ["steps=3"])
    own, call = keywords(changed)
    assert Pipeline(**own).generate(**call)[0].tobytes() != first[0].tobytes()


def hires_of(tmp_path, strength, *changes, more="", version="v1.10.1"):
    line = f"x\nSteps: 20, Sampler: Euler a, Seed: 1, Size: 64x64, Denoising strength: {strength}, Hires upscale: 2"
    return settings_of(tmp_path, f"{line}{more}, RNG: CPU, Version: {version}", *changes).get("hires_steps")


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.5, 0.55, 0.7, 1])
def test_a1111s_hires_steps_are_those_that_are_run(tmp_path, strength):
    """setup_img2img_steps: steps = int(requested / min(strength, 0.999)), of which the last `requested` are run."""
    for more, ran in ((", Hires steps: 10", 10), (", Hires steps: 0", 20), ("", 20)):
        steps = hires_of(tmp_path, strength, more=more)
        assert steps_left(steps, strength) == ran and steps in (int(ran / min(strength, 0.999) + x) for x in (0, 1))
    assert hires_of(tmp_path, strength, "steps=12") == hires_of(tmp_path, strength, more=", Hires steps: 12")


def test_hires_steps_that_are_changed_or_unknown(tmp_path):
    assert hires_of(tmp_path, 0.5, "hires_steps=7", more=", Hires steps: 10") == 7
    assert hires_of(tmp_path, 0.5, "hires_strength=0.25", more=", Hires steps: 10") == 40
    assert hires_of(tmp_path, 0.5, version="ldm 0.1.0") is None  # of ours they are as many as before
    line = "x\nSteps: 20, Sampler: Euler a, Seed: 1, Hires upscale: 2, Hires steps: 10, RNG: CPU, Version: v1.10.1"
    replay = replay_of(tmp_path, line)
    assert "hires_steps" not in replay.entry.settings and "not repeated: Hires steps: 10" in replay.notes[0]
    error = replay_of(tmp_path, f"{line}, Denoising strength: 0.005").entry.error
    assert "the end of 2,000, and 1000 are the most" in str(error)


@pytest.mark.parametrize(("steps", "strength", "ran"), [(None, 0.7, 14), (10, 0.7, 7), (10, 0.5, 5), (11, 0.5, 5)])
def test_our_hires_steps_are_written_as_a1111_counts_and_come_back(tmp_path, steps, strength, ran):
    settings = {"num_inference_steps": 20, "hires_scale": 2.0, "hires_steps": steps, "hires_strength": strength}
    text = parameters(record_of(sampler="dpmpp_2m", spacing="karras", eta=None, **settings))
    assert f"Hires steps: {ran}, " in text
    assert steps_left(settings_of(tmp_path, text)["hires_steps"], strength) == ran
    assert settings_of(tmp_path, "", record=record_of(**settings)).get("hires_steps") == steps  # the chunk is exact


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ("Sampler: Euler, Schedule type: Uniform", None),
        ("Sampler: DPM++ 2M, Schedule type: Uniform", "Schedule type: Uniform (linspace has other timesteps here"),
        ("Sampler: DPM++ 2M", "Schedule type: Uniform (linspace has other timesteps here with dpmpp_2m and 20 steps)"),
        ("Sampler: Euler, Schedule type: DDIM", None),
        ("Sampler: Euler, Schedule type: DDIM, Steps: 30", "Schedule type: DDIM"),
        ("Sampler: Euler, Schedule type: Align Your Steps", "Schedule type: Align Your Steps"),
        ("Sampler: DPM++ 2M, Schedule type: Karras", None),
        ("Sampler: DPM++ 2M, Version: ldm 0.1.0", "not given: spacing"),
        ("Sampler: LCM, Version: ldm 0.1.0", None),
    ],
)
def test_a_schedule_type_with_other_timesteps_is_noted(tiny_folder, tmp_path, fields, note):
    steps = "" if "Steps:" in fields else "Steps: 20, "
    (replay,) = read_replays(
        [picture(tmp_path / "a.png", f"x\n{steps}{fields}, CFG scale: 2, Seed: 1, Size: 8x8, RNG: CPU")]
    )
    notes = fitted_to(replay, tiny_folder).notes
    assert len(notes) == (note is not None) and (note is None or note in notes[0])
