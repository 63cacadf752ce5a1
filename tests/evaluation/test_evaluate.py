"""Lists of prompts and scores: drawn again as committed, told apart by renderers that are right and wrong."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm.cli import main
from ldm.config import build
from ldm.data.emoji import SceneConfig, Scenes, find, held_out, objects
from ldm.errors import ConfigError, DataError, LdmError, ModelError
from ldm.evaluation import LISTS, Prompt, evaluate, open_list, real_images
from ldm.evaluation.lists import _parse, folder
from ldm.evaluation.scores import shuffle
from ldm.training import read_settings
from tests.make_prompt_lists import DRAWN, file_text


def perfect(prompts):
    """Draws the true scene of each caption."""
    by_text = {p.text: p for p in prompts}
    return lambda texts, seeds: real_images([by_text[t] for t in texts], seeds)


def noise(texts, seeds):
    return [np.random.default_rng(s).integers(0, 256, (128, 128, 3)).astype(np.uint8) for s in seeds]


@pytest.mark.parametrize("name", DRAWN)
def test_drawing_a_list_again_gives_the_committed_file(name):
    path = folder() / f"{name}.tsv"
    assert path.read_text(encoding="utf-8") == file_text(name)
    assert open_list(path)[1] == open_list(name)[1] == DRAWN[name][1]()
    assert len(open_list(name)[1]) == int(name.rpartition("-")[2])


def test_the_lists_are_those_of_the_folder():
    assert set(LISTS) == {path.stem for path in folder().glob("*.tsv")} == {*DRAWN, "strangers-100"}


def test_the_list_of_strangers_words_asks_for_a_hundred_different_things():
    name, prompts = open_list("strangers")
    assert name == "strangers-100" and len(prompts) == len({p.text for p in prompts}) == 100
    assert len({p.objects[0].lookalike_class for p in prompts}) >= 95 and {p.kind for p in prompts} == {"single"}
    for p in prompts:
        assert p.held_out == bool(p.colour and held_out(("on", p.objects[0].codepoints, p.colour)))
        assert p.text.endswith(f"{p.colour} background") == (p.colour is not None)
    assert 10 <= sum(p.colour is not None for p in prompts) <= 40


@pytest.mark.parametrize("name, each", [("everyday-30", 6), ("everyday-100", 20), ("tuning-60", 12)])
def test_everyday_lists_hold_what_they_say(name, each):
    prompts = open_list(name)[1]
    kept = name != "tuning-60"
    assert all(p.objects[0].everyday and p.held_out == kept for p in prompts)
    assert all(held_out(("on", p.objects[0].codepoints, p.colour)) == kept for p in prompts)
    assert set(Counter(p.objects[0].group for p in prompts).values()) == {each}
    assert len({(p.objects, p.colour) for p in prompts}) == len(prompts)
    assert len({p.objects for p in prompts}) >= len(prompts) - (name == "everyday-100")
    assert len({p.objects[0].group for p in prompts[:5]}) == 5  # so that the first n are spread
    used = Counter(p.colour for p in prompts)
    assert len(used) == 12 and max(used.values()) <= len(prompts) / 12 + 2


def test_the_small_list_asks_for_what_the_small_settings_train():
    prompts = open_list("small")[1]
    small, whole = (read_settings(f"emoji/{name}", ["vae=x", "text=x"]) for name in ("small", "unet"))
    scenes = build(SceneConfig, small.data.scenes)
    assert {p.objects for p in prompts} == {(find(word),) for word in scenes.oversampled}
    assert set(Counter(p.objects for p in prompts).values()) == {4} and len(set(prompts)) == 60
    assert set(Counter(p.objects[0].group for p in prompts).values()) == {12}
    assert not any(p.held_out for p in prompts) and scenes.kinds == {"single": 1.0}
    same = ("model", "schedule", "optimizer", "timesteps", "timestep_shift")
    assert all(getattr(small, name) == getattr(whole, name) for name in same)


def test_the_list_of_all_objects_marks_what_was_trained_on():
    prompts = open_list("all-200")[1]
    assert len({p.objects for p in prompts}) == 200
    for p in prompts:
        assert p.held_out == held_out(("on", p.objects[0].codepoints, p.colour))
    assert 100 < sum(p.held_out for p in prompts) < 200


def test_arranged_lists_are_held_out():
    for name, family in (("pairs-20", "pair"), ("counts-20", "count"), ("cards-20", "card")):
        prompts = open_list(name)[1]
        assert {p.family for p in prompts} == {family}
        assert len({(p.objects, p.kind) for p in prompts}) == 20
        for p in prompts:
            codes = [o.codepoints for o in p.objects]
            if family == "card":
                said = [("card", code, colour) for code, colour in zip(codes, p.detail.split(","))]
            else:
                said = [(p.detail, *codes)] if family == "pair" else [("count", *codes, int(p.detail))]
            assert p.held_out and all(map(held_out, said))


def test_unknown_things_are_judged_by_clearness_and_background_alone(capsys):
    prompts = open_list("unknown")[1]
    words = {word for thing in objects() for name in thing.words for word in name.lower().split()}
    assert len(prompts) == 30 and not any(p.text.split()[1] in words for p in prompts)
    stand_ins = real_images([Prompt("", (find("cat"),), p.colour) for p in prompts], range(30))
    report = evaluate(prompts="unknown", n=4, renderer=lambda texts, seeds: stand_ins[: len(texts)])
    score = report["score"]
    assert (score["named"], score["first"], score["background"]) == (0, 0, 4) and score["match_p05"] > 0.8
    assert report["real"] is None and report["shuffled"] is None
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[:5] == ["all", "-", "-", "4/4", "100"]


def test_plain_captions():
    texts = {p.text for name in LISTS for p in open_list(name)[1]}
    assert "a fox on a black background" in texts
    assert any("on an orange background" in t for t in texts) and not any("a orange" in t for t in texts)


def test_prompts_of_drawn_scenes():
    kinds = {"single": 1, "pair": 1, "count": 1, "card": 1}
    scenes = Scenes(SceneConfig(kinds=kinds), 3)
    for i in range(40):
        spec = scenes.spec(i)
        prompt = Prompt.of(spec)
        assert prompt.family == spec.kind and prompt.colour == (spec.colour if spec.mentioned else None)
        assert _parse(prompt.line(), "") == prompt


def test_a_perfect_renderer_and_its_report(tmp_path, capsys):
    prompts = open_list("everyday-30")[1]
    report = evaluate(prompts="everyday-30", out=tmp_path / "new", n=15, renderer=perfect(prompts))
    score = report["score"]
    assert score["n"] == score["first"] == score["five"] == score["background"] == 15
    assert report["real"]["first"] == 15 and report["shuffled"]["first"] == 0 and report["autoencoder"] is None
    assert len(report["groups"]) == 5 and sum(g["n"] for g in report["groups"].values()) == 15
    assert [p["seed"] for p in report["images"]] == list(range(1, 16))
    assert json.loads((tmp_path / "new" / "scores.json").read_text()) == report
    sheet = Image.open(tmp_path / "new" / "sheet.png")
    assert sheet.width > 10 * 128 and sheet.height > 2 * 128
    assert sheet.getpixel((2, 2)) == (40, 150, 60)  # a green frame
    printed = capsys.readouterr().out
    assert "15/15 100 %" in printed and "Food & Drink" in printed and "shuffled captions" in printed


def test_a_renderer_of_noise(tmp_path):
    report = evaluate(prompts="everyday-30", n=10, renderer=noise, controls=False, out=tmp_path)
    assert report["score"]["first"] == 0 and report["score"]["match_p50"] < 0.1
    assert "real" not in report
    assert Image.open(tmp_path / "sheet.png").getpixel((2, 2)) == (205, 40, 40)


def test_the_command_hands_its_options_on(tiny_folder, tmp_path, capsys):
    words = ["evaluate", str(tiny_folder), "--prompts", "tuning", "-n", "2", "--steps", "1", "--seed", "50"]
    words += ["--guidance-scale", "1", "--sampler", "euler", "--dtype", "fp32", "--no-controls", "-o", str(tmp_path)]
    assert main(words) == 0
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["settings"] == {
        "num_inference_steps": 1, "guidance_scale": 1.0, "sampler": "euler", "dtype": "fp32"
    }  # fmt: skip
    assert [p["seed"] for p in report["images"]] == [51, 52] and report["list"] == "tuning-60"
    assert "tuning-60, 2 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        (["/nowhere/model"], "/nowhere/model"),
        (["--prompts", "everyday-31"], "did you mean 'everyday-30'"),
        (["-n", "0"], "n: must be a whole number from 1 up"),
        (["--steps", "0"], "steps"),
        (["--guidance-scale", "nan"], "guidance_scale"),
        (["--batch-size", "0"], "batch_size"),
        (["--lora", "/no/such.safetensors"], "/no/such.safetensors"),
        (["--fast", "--vae", "weights/default"], "fast: is for the default model, and another vae is given"),
        (["--seed", "-5"], "seed"),
        (["--font", "/no/such.ttf"], "/no/such.ttf"),
        (["-o", "/proc/scores"], "/proc"),
    ],
)
def test_the_command_refuses_in_one_line(words, said, capsys):
    assert main(["evaluate", *words]) in (2, 4)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_seeds_and_texts_reach_the_renderer():
    prompts, asked = open_list("cards-20")[1], []

    def renderer(texts, seeds):
        asked.extend(zip(texts, seeds))
        return real_images(prompts[: len(texts)], seeds)

    report = evaluate(prompts="cards-20", n=3, seed=100, renderer=renderer, controls=False)
    assert asked == [(p.text, s) for p, s in zip(prompts, (101, 102, 103))]
    assert report["score"]["first"] == 3


def test_prompts_given_in_python_and_in_a_file(tmp_path):
    given = [("a kitty", "cat"), ("a dog on red", "1F415", "red")]
    name, prompts = open_list(given)
    assert name == "given" and prompts[0].colour is None and prompts[1].colour == "red"
    path = tmp_path / "mine.tsv"
    path.write_text("# mine\n\n" + "\n".join(p.line() for p in prompts) + "\n", encoding="utf-8")
    assert open_list(path)[1] == prompts
    report = evaluate(prompts=given, renderer=perfect(prompts))
    assert report["score"]["first"] == 2 and report["score"]["background_n"] == 1
    assert report["real"]["n"] == 2 and report["shuffled"]["first"] == 0


def test_shuffling_needs_two_classes_in_balance():
    cats, dogs = [Prompt("", open_list([("x", w)])[1][0].objects, None) for w in ("cat", "dog")]
    assert shuffle([cats, cats, dogs]) is None
    assert shuffle([cats, dogs, cats, dogs]) == [dogs, cats, dogs, cats]


def test_the_pipeline_draws(tiny_folder, tmp_path):
    out = tmp_path / "scores"
    report = ldm.evaluate(tiny_folder, "tuning", out, n=3, batch_size=2, num_inference_steps=2, dtype="fp32")
    again = ldm.evaluate(tiny_folder, "tuning", n=3, num_inference_steps=2, dtype="fp32", controls=False)
    assert report["score"] == again["score"] and report["score"]["first"] == 0
    assert report["settings"] == {"num_inference_steps": 2, "dtype": "fp32"}
    assert (out / "sheet.png").is_file() and report["list"] == "tuning-60"
    assert report["autoencoder"]["n"] == report["real"]["first"] == 3  # through an untrained autoencoder: mud
    assert report["autoencoder"]["first"] == 0 and "autoencoder" not in again


@pytest.mark.parametrize(
    "arguments, error, said",
    [
        ({"prompts": "everyday-31"}, DataError, "did you mean 'everyday-30'"),
        ({"prompts": "/nowhere/list.tsv"}, DataError, "neither a list of prompts nor a file"),
        ({"prompts": []}, DataError, "no prompt"),
        ({"prompts": ["a cat"]}, DataError, "expected (prompt, object)"),
        ({"prompts": [("a cat", "catt")]}, DataError, "did you mean 'cat'"),
        ({"prompts": [("a cat", "cat", "rde")]}, DataError, "did you mean 'red'"),
        ({"n": 0}, ConfigError, "n: must be a whole number from 1 up"),
        ({"model": "/nowhere/model"}, ModelError, "/nowhere/model"),
        ({"sampler": "eular"}, ConfigError, "eular"),
        ({"num_inference_stepz": 3}, ConfigError, "num_inference_stepz"),
    ],
)
def test_what_is_refused(arguments, error, said, tiny_folder):
    with pytest.raises(error) as refused:
        evaluate(**{"model": tiny_folder, "prompts": "everyday-30", **arguments})
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "line, said",
    [
        ("a cat\t1F408\tred\tsingle", "five columns"),
        ("a cat\t1F408\tredd\tsingle\t0", "unknown colour 'redd'"),
        ("a cat\tFFFFF\tred\tsingle\t0", "no object"),
        ("a cat\t1F408 1F415\tred\tsingle\t0", "does not fit 2 objects"),
        ("a cat\t1F408\tred\tcount:9\t0", "does not fit"),
        ("a cat\t1F408\tred\tcard:rot\t0", "does not fit"),
        ("# nothing but a comment", "no prompt"),
    ],
)
def test_files_that_are_no_lists(line, said, tmp_path):
    path = tmp_path / "list.tsv"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(LdmError, match=said):
        open_list(path)


def test_a_file_that_is_no_text_and_a_renderer_that_loses_images(tmp_path):
    (tmp_path / "list.tsv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match="cannot be read"):
        open_list(tmp_path / "list.tsv")
    with pytest.raises(ConfigError, match="0 images for 2 prompts"):
        evaluate(prompts="everyday-30", n=2, renderer=lambda texts, seeds: [])
