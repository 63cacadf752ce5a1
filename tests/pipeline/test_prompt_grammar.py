"""Prompts as people write them, through to the picture: emphasis, chunks, editing, skipped layers, what is reported."""

import pytest
import torch

from ldm.checkpoint import load_model
from ldm.errors import ConfigError
from ldm.nn.text import encode_weighted, tokenize
from ldm.pipeline import Pipeline
from ldm.prompts import parse
from tests.conftest import build_tiny_model

FOUR = {"num_inference_steps": 4, "sampler": "euler", "seed": 3}
LONG = "a cat, a dog, a red car, " * 12  # three chunks
DISTINCT = ["a (cat:1.4)", "a [cat]", "a cat BREAK a dog", LONG, "a [cat:dog:2]", "a [cat|dog]", "a cat"]


def draw(prompt, tiny_folder, negative="", **words):
    images = Pipeline(prompt, model=tiny_folder, negative_prompt=negative).generate(**{**FOUR, **words})
    return [image.tobytes() for image in images]


def test_each_notation_changes_the_picture_and_is_the_same_in_any_batch(tiny_folder):
    together = draw(DISTINCT, tiny_folder)
    assert len(set(together)) == len(DISTINCT)
    alone = [draw(prompt, tiny_folder)[0] for prompt in DISTINCT]
    assert alone == together
    turned = draw(DISTINCT[::-1], tiny_folder, batch_size=3)
    assert turned == together[::-1]


def test_a_prompt_that_means_itself_is_the_plain_one(tiny_folder):
    plain, *others = draw(["a cat", "a (cat:1)", "a [cat:dog:4]", "a [dog:cat:0]", "a [cat|cat]"], tiny_folder)
    assert others == [plain] * 4


def test_editing_changes_the_text_from_its_step_on(tiny_folder):
    model, seen = load_model(tiny_folder, dtype="fp32"), []
    forward = model.unet.forward

    def watched(x, timesteps, states, **other):
        seen.append(states[-1:].clone())  # the prompt's, behind the negative one
        return forward(x, timesteps, states, **other)

    model.unet.forward = watched
    try:
        Pipeline("a [cat:dog:0.5]", model=model).generate(**FOUR)
    finally:
        del model.unet.forward
    cat, dog = (model.text.encode([text]).states for text in ("a cat", "a dog"))
    assert [torch.equal(states, text) for states, text in zip(seen, (cat, cat, dog, dog))] == [True] * 4


def test_negative_prompts_have_the_same_notation(tiny_folder):
    plain, weighted, edited, long = (
        draw("a cat", tiny_folder, negative=n) for n in ("dog", "(dog:1.5)", "[dog::1]", LONG)
    )
    assert len({*plain, *weighted, *edited, *long}) == 4
    assert draw("a cat", tiny_folder, negative=LONG, guidance_scale=1) == draw("a cat", tiny_folder, guidance_scale=1)


def test_clip_skip_and_emphasis_reach_the_encoder(tiny_folder):
    prompt, model = "a (red:1.5) cat", build_tiny_model()
    for name, layer in model.text.modules[0].named_modules():
        if name.endswith("final_layer_norm"):  # else the mean that emphasis restores is nothing
            torch.nn.init.constant_(layer.bias, 0.2)
    plain, skipped, no_norm = (draw(prompt, model, **w) for w in ({}, {"clip_skip": 1}, {"emphasis": "no_norm"}))
    assert len({*plain, *skipped, *no_norm}) == 3
    text = load_model(tiny_folder, dtype="fp32").text
    tokens = tokenize(text, parse("a cat"))
    last, before = (encode_weighted(text, [tokens], clip_skip=skip).states for skip in (0, 1))
    assert not torch.equal(last, before)
    with pytest.raises(ConfigError, match="clip_skip 99 is impossible"):
        draw(prompt, tiny_folder, clip_skip=99)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat AND a dog", "AND .* is not supported"),
        ("(" * 200 + "cat", "nested more than 100 deep"),
        ("(cat:1000)", "beyond 100"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(prompt, message, tiny_folder):
    with pytest.raises(ConfigError, match=rf"prompt\[1\]: .*{message}"):
        Pipeline(["a cat", prompt], model=tiny_folder)
    with pytest.raises(ConfigError, match="negative_prompt: "):
        Pipeline("a cat", negative_prompt=prompt, model=tiny_folder)


def test_what_is_not_seen_is_told_once_and_kept_in_the_record(tiny_folder, capsys):
    pipe = Pipeline(["a (cat", f"{LONG}, a [dog:cat]"], model=tiny_folder)
    first, second = pipe.generate(**FOUR).metadata
    error = capsys.readouterr().err
    assert "bracket at '(cat' is not closed" in first["remarks"][0] and first["remarks"][0] in error
    assert "neither [a:b:0.5] nor [a|b]" in second["remarks"][0]
    assert first["truncated"] == second["truncated"] == ""
    with pytest.raises(ConfigError, match="prompt: the bracket at '\\(cat' is not closed; change the prompt"):
        pipe.generate(strict=True, **FOUR)
    assert len(Pipeline("a cat", model=tiny_folder).generate(strict=True, **FOUR)) == 1


def test_the_default_model_tells_words_that_it_never_saw(capsys):
    pipe = Pipeline("a (zyxomma:1.2) cat BREAK red")
    record = pipe.generate(num_inference_steps=1, seed=0).metadata[0]
    assert record["unknown_words"] == ["zyxomma"] and "zyxomma" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="never shown: zyxomma"):
        pipe.generate(num_inference_steps=1, strict=True)
