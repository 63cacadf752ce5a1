"""Settings that other programs wrote, and notation that almost fits ours: read, or refused by name; never drawn."""

import json
import re
import unicodedata

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from prompt_files import entries_of, settings_of

from ldm.errors import ConfigError
from ldm.render.drawing.runner import _prompts
from ldm.render.prompts.files import open_prompts
from ldm.render.prompts.templates import Wildcards, expand
from ldm.render.replay.replay import read_replays

SWARM = {
    "prompt": "a cat",
    "negativeprompt": "dog",
    "seed": 581626448,
    "steps": 25,
    "cfgscale": 4.0,
    "width": 128,
    "height": 64,
    "sampler": "euler",
    "scheduler": "karras",
    "images": 1,
    "swarm_version": "0.9.4.0",
}
FOOOCUS = {
    "prompt": "a cat",
    "negative_prompt": "dog",
    "seed": "581626448",
    "steps": 25,
    "guidance_scale": 4.0,
    "resolution": "(128, 64)",
    "sampler": "euler",
    "scheduler": "karras",
    "metadata_scheme": "fooocus",
    "performance": "Speed",
}
INVOKE = {
    "positive_prompt": "a cat",
    "negative_prompt": "dog",
    "seed": 581626448,
    "steps": 25,
    "cfg_scale": 4.0,
    "width": 128,
    "height": 64,
    "scheduler": "euler_k",
}
NOVEL = {"prompt": "a cat", "uc": "dog", "seed": 581626448, "steps": 25, "scale": 4.0, "width": 128, "height": 64}
NOVEL |= {"sampler": "k_euler", "noise_schedule": "karras"}
READ = {"prompt": "a cat", "negative_prompt": "dog", "seed": 581626448, "num_inference_steps": 25, "sampler": "euler"}
READ |= {"guidance_scale": 4.0, "width": 128, "height": 64}
A1111 = "a cat\nNegative prompt: dog\nSteps: 5, Sampler: Euler, CFG scale: 4, Seed: 3, Size: 128x128, RNG: CPU"


def replay_of(tmp_path, **texts):
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text if isinstance(text, str) else json.dumps(text, indent=2))
    Image.new("RGB", (8, 8)).save(tmp_path / "old.png", pnginfo=chunks)
    (replay,) = read_replays([tmp_path / "old.png"])
    return replay


@pytest.mark.parametrize(
    ("texts", "program"),
    [
        ({"parameters": {"sui_image_params": SWARM, "sui_models": []}}, "SwarmUI"),
        ({"parameters": FOOOCUS, "fooocus_scheme": "fooocus"}, "Fooocus"),
        ({"invokeai_metadata": INVOKE, "invokeai_graph": {"id": "x", "nodes": {}}}, "InvokeAI"),
        ({"Title": "AI", "Description": "a cat", "Comment": NOVEL}, "NovelAI"),
    ],
)
def test_settings_that_programs_write_as_json_are_read(tmp_path, texts, program):
    replay = replay_of(tmp_path, **texts)
    assert replay.entry.error is None, replay.entry.error
    assert READ.items() <= replay.entry.settings.items() and replay.source["program"] == program
    assert program == "NovelAI" or replay.entry.settings["spacing"] == "karras"
    assert not any(note.startswith("not given") for note in replay.notes)


def test_fields_of_json_that_are_not_repeated_are_named(tmp_path):
    notes = replay_of(tmp_path, parameters={"sui_image_params": SWARM | {"loras": ["x"]}}).notes
    assert notes == ("not repeated: text: other fields (images, swarm_version, loras)",)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"parameters": {"sui_image_params": {"model": "x"}}}, "JSON of another program without a prompt (sui_image"),
        ({"parameters": '{"prompt": "a cat", '}, "JSON that is damaged"),
        ({"prompt": {"3": {"class_type": "KSampler"}}, "workflow": {"nodes": []}}, "ComfyUI's graph of nodes"),
        ({"parameters": ["a cat"]}, "JSON of another program"),
        ({"parameters": {"prompt": "a cat", "seed": "many"}}, "(Seed)"),
        ({"Software": "GIMP"}, "holds nothing of how it was drawn"),
    ],
)
def test_other_json_is_refused_by_name(tmp_path, texts, said):
    assert said in str(replay_of(tmp_path, **texts).entry.error)


@pytest.mark.parametrize("prompt", ["{red|blue} cat", "[a:b:0.5] cat", '"quoted" cat', "[cat]"])
def test_a_prompt_that_begins_with_a_bracket_is_a_prompt(tmp_path, prompt):
    assert replay_of(tmp_path, parameters=prompt).entry.settings["prompt"] == prompt


def test_a1111s_text_beside_an_image_is_an_image_to_draw_again(tmp_path):
    (tmp_path / "00001.txt").write_text(A1111)
    (tmp_path / "log.txt").write_text(f"{A1111}\n\n{A1111.replace('Seed: 3', 'Seed: 4')}\n")
    for prompts, sources in ((tmp_path / "00001.txt", ()), (None, [tmp_path / "00001.txt"])):
        (entry,) = _prompts(prompts, sources, [], {}).entries
        assert entry.error is None and entry.settings["prompt"] == "a cat" and entry.settings["seed"] == 3
        assert entry.settings["negative_prompt"] == "dog" and entry.settings["num_inference_steps"] == 5
    assert [entry.settings["seed"] for entry in _prompts(tmp_path / "log.txt", (), [], {}).entries] == [3, 4]


def test_a_list_of_prompts_is_no_text_of_an_image(tmp_path):
    (tmp_path / "list.txt").write_text("a cat\na dog --steps 5\nmotif: blue, style: oil, Seed: none\n")
    assert len(list(_prompts(tmp_path / "list.txt", (), [], {}).entries)) == 3
    with pytest.raises(ConfigError, match="a list of prompts is drawn by ldm render FILE"):
        list(read_replays([tmp_path / "list.txt"]))


@pytest.mark.parametrize("line", ["Negative prompt: dog", "Steps: 5, Sampler: Euler, CFG scale: 4, Seed: 3"])
def test_single_lines_of_that_text_are_bad_lines(tmp_path, line):
    first, second = entries_of(tmp_path, f"a cat\n{line}\n")
    assert first.error is None and "A1111 writes for one image" in str(second.error)


@pytest.mark.parametrize(
    ("line", "flag"), [("a cat —steps 3", "--steps"), ("a cat –w 64", "--w"), ("a cat -steps 30", "--steps")]
)
def test_dashes_that_an_editor_corrected_are_named(tmp_path, line, flag):
    (entry,) = entries_of(tmp_path, line)
    assert f"write {flag}" in str(entry.error)


@pytest.mark.parametrize("line", ["a cat — steps, and size", "a semi-steps cat", "a —bright— cat", "a -1 cat"])
def test_dashes_of_prose_are_text(tmp_path, line):
    assert settings_of(tmp_path, line) == [{"prompt": line}]


@pytest.mark.parametrize("name", ["p.csv", "p.txt"])
def test_excels_line_before_the_header_names_the_delimiter(tmp_path, name):
    assert settings_of(tmp_path, 'sep=;\r\nprompt;steps\r\n"a, b, c";3\r\n', name) == [
        {"prompt": "a, b, c", "num_inference_steps": 3}
    ]


@pytest.fixture
def wildcards(tmp_path):
    for name in ("my colors", "Japanese Art/a", "p+2", "it's (new)", unicodedata.normalize("NFD", "Möbel"), "snake_x"):
        path = tmp_path / "wild" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("teal")
    return Wildcards(tmp_path / "wild")


@pytest.mark.parametrize("name", ["my colors", "Japanese Art/a", "p+2", "it's (new)", "Möbel", "MY Colors", "snake_x"])
def test_wildcards_have_the_names_that_people_give_to_files(wildcards, name):
    assert expand(f"a __{name}__ cat, __{name}__", 0, wildcards) == "a teal cat, teal"


def test_a_missing_wildcard_of_any_name_is_an_error(wildcards):
    with pytest.raises(ConfigError, match=r"no wildcard your colors in .*; did you mean 'my colors'"):
        expand("a __your colors__ cat", 0, wildcards)
    with pytest.raises(ConfigError, match="no folder to look in"):
        expand("a __my colors__ cat", 0, Wildcards())


@pytest.mark.parametrize("text", ["a __ b __ c", "snake__case and more__text", "__init", "a__b c__"])
def test_underscores_within_words_and_alone_are_text(wildcards, text):
    assert expand(text, 0, wildcards) == text


def test_hires_fix_has_words_in_prompt_lines(tmp_path):
    settings = {"prompt": "a cat", "hires_scale": 2.0, "hires_strength": 0.5, "hires_steps": 4}
    line = "a cat --hr_scale 2 --hires_strength 0.5 --hr_second_pass_steps 4"
    assert settings_of(tmp_path, line) == [settings]


def test_names_typed_by_people_find_files_of_another_unicode_form(tmp_path):
    from ldm.checkpoint.lora import find_lora
    from ldm.file_names import spelt_alike

    decomposed = unicodedata.normalize("NFD", "Möbel")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / f"{decomposed}.safetensors").touch()
    file = next((tmp_path / "sub").iterdir())
    for name in ("Möbel", "Möbel.safetensors", "sub/Möbel"):
        assert find_lora(name, tmp_path) == file
    with pytest.raises(ConfigError, match="no LoRA is named"):
        find_lora("other/Möbel", tmp_path)
    (tmp_path / f"{decomposed}.png").touch()
    assert spelt_alike(tmp_path / "Möbel.png").name == f"{decomposed}.png"
    assert settings_of(tmp_path, "a cat --image Möbel.png")[0]["image"].endswith(f"{decomposed}.png")
    assert spelt_alike(tmp_path / "nö.png") == tmp_path / "nö.png"


def test_a_flow_model_has_its_own_spacing_whatever_the_text_says(tmp_path):
    """The shipped model is one: A1111's texts always mean a spacing, which no image of it could have."""
    from ldm.render.replay.replay import fitted_to

    (tmp_path / "a.txt").write_text(A1111.replace("Sampler: Euler", "Sampler: Euler, Schedule type: Karras"))
    (replay,) = read_replays([tmp_path / "a.txt"])
    fitted = fitted_to(replay, "default")
    assert replay.entry.settings["spacing"] == "karras" and "spacing" not in fitted.entry.settings
    assert fitted.notes[-1] == "not repeated: spacing: karras (a flow model has its own)"
    (asked,) = read_replays([tmp_path / "a.txt"], ["spacing=beta"])
    assert fitted_to(asked, "default", ["spacing=beta"]).entry.settings["spacing"] == "beta"
    assert fitted_to(replay, tmp_path / "no model") is replay


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!DOCTYPE html>\n<p>a cat</p>\n", "is HTML or XML, no list of prompts"),
        ("{\\rtf1\\ansi a cat}\n", "is RTF"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of git-lfs"),
    ],
)
def test_files_whose_lines_are_no_prompts_are_refused_as_a_whole(tmp_path, text, said):
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)):
        open_prompts(tmp_path / "p.txt")


def test_json_over_several_lines_is_read_under_the_name_that_the_refusal_asks_for(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text('\n[\n  {"prompt": "a cat", "seed": 3}\n]\n')
    with pytest.raises(ConfigError, match=r"is JSON over several lines; give it a name that ends in \.json"):
        open_prompts(path)
    (entry,) = open_prompts(path.rename(tmp_path / "p.json")).entries
    assert (entry.settings["prompt"], entry.settings["seed"]) == ("a cat", 3)
