"""The judge on images whose content is known: true scenes, weak reconstructions of them, and noise."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ldm.data.emoji import COLOURS, SceneConfig, Scenes, find, find_font, lookalikes
from ldm.errors import DataError
from ldm.evaluation import Judge, Prompt, judge_images, judge_scenes, real_images, shared_judge
from ldm.evaluation.judge import FRAME, background_of, commonest
from ldm.evaluation.lists import open_list
from ldm.evaluation.scores import judge_by, shuffle, summary

BICUBIC = Image.Resampling.BICUBIC


def singles(count, seed, **config):
    scenes = Scenes(SceneConfig(held_out=True, **config), seed)
    return [scenes[i] for i in range(count)]


def weakened(image, seed):
    """As seen through a weak autoencoder (about 24 dB): blurred, mixed with an 8 times smaller copy, blotched."""
    image = Image.fromarray(image)
    low = np.asarray(image.resize((16, 16), Image.Resampling.BOX).resize((FRAME, FRAME), BICUBIC), float)
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(2.2)), float)
    blotches = np.random.default_rng(seed).normal(0, 7, (3, 32, 32)).astype(np.float32)
    blotches = np.stack([np.asarray(Image.fromarray(b).resize((FRAME, FRAME), BICUBIC)) for b in blotches], axis=-1)
    return np.clip(0.25 * low + 0.75 * blurred + blotches, 0, 255).round().astype(np.uint8)


def blob(number):
    """A round patch of meaningless colours on a plain background."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (FRAME, FRAME), list(COLOURS.values())[number % 12])
    patch = Image.fromarray(rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)).resize((96, 96), BICUBIC)
    down, along = np.mgrid[:96, :96] - 48
    disc = Image.fromarray(((down**2 + along**2 < 40**2) * 255).astype(np.uint8))
    image.paste(patch, (16, 16), disc)
    return np.asarray(image)


@pytest.fixture(scope="module")
def scenes():
    return singles(25, 11) + singles(35, 12, objects="all", everyday_share=0.0)


def test_true_scenes_are_named_and_shuffled_captions_are_not(scenes):
    prompts, images = [Prompt.of(scene.spec) for scene in scenes], [scene.image for scene in scenes]
    other = shuffle(prompts)
    assert sorted(p.text for p in other) == sorted(p.text for p in prompts)
    assert all(a.objects[0].lookalike_class != b.objects[0].lookalike_class for a, b in zip(prompts, other))
    score, wrong = (summary(judged) for judged in judge_by(images, [prompts, other]))
    assert score["first"] >= 59 and score["five"] == 60 and score["background"] == 60
    assert score["match_p05"] > 0.85
    assert wrong["first"] == 0


def test_weak_reconstructions_are_named(scenes):
    scenes = scenes[5:45]
    images = [weakened(scene.image, i) for i, scene in enumerate(scenes)]
    errors = [np.mean((a / 255.0 - b.image / 255.0) ** 2) for a, b in zip(images, scenes)]
    assert 23 < np.mean(-10 * np.log10(errors)) < 25.5
    score = judge_scenes(images, scenes)
    assert score["first"] >= 38 and score["background"] == 40
    assert score["match_p05"] > 0.7


def test_noise_and_blobs_match_less_than_anything_known():
    see, rng = shared_judge(), np.random.default_rng(0)
    assert see(rng.integers(0, 256, (FRAME, FRAME, 3)).astype(np.uint8)).match < 0.1
    assert see(np.full((FRAME, FRAME, 3), 200, np.uint8)).match < 0.01
    assert np.percentile([see(blob(i)).match for i in range(8)], 90) < 0.7


@pytest.mark.parametrize("name, colour", [("snowman", "white"), ("apple", "red"), ("frog", "green"), ("bat", "brown")])
def test_an_object_of_its_background_s_colour(name, colour):
    (image,) = real_images([Prompt("", (find(name),), colour)], [3])
    verdict = shared_judge()(image)
    assert verdict.rank(find(name)) == 0 and verdict.background.colour == colour


def test_other_sizes_and_kinds_of_image():
    (image,) = real_images([Prompt("", (find("cat"),), "teal")], [1])
    for size in (64, 512):
        verdict = shared_judge()(Image.fromarray(image).convert("RGBA").resize((size, size), BICUBIC))
        assert verdict.guesses[0].lookalike_class == find("cat").lookalike_class and verdict.background.colour == "teal"
    with pytest.raises(DataError, match="expected uint8"):
        shared_judge()(image / 255.0)


def test_a_verdict_ranks_every_class_once():
    (image,) = real_images([Prompt("", (find("dog"),), "blue")], [2])
    verdict = shared_judge()(image)
    classes = [guess.lookalike_class for guess in verdict.guesses]
    assert len(classes) == len(set(classes)) and set(classes) == set(lookalikes())
    assert list(verdict.matches[:5]) == sorted(verdict.matches[:5], reverse=True)
    assert min(verdict.matches) >= 0 and max(verdict.matches) <= 1
    assert verdict.rank(verdict.guesses[7]) == 7
    x, y, size = verdict.window
    assert abs(x - 64) <= 8 and abs(y - 64) <= 8 and 84 <= size <= 108


def test_the_place_found_is_the_place_drawn():
    for scene in singles(4, 21):
        (placed,), (x, y, size) = scene.spec.objects, shared_judge()(scene.image).window
        assert abs(x - placed.x) <= 2.5 and abs(y - placed.y) <= 2.5 and abs(size - placed.size) <= 5


@pytest.mark.parametrize("colour", COLOURS)
def test_backgrounds_through_noise_and_intruders(colour):
    rng = np.random.default_rng(5)
    image = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 8, (FRAME, FRAME, 3)), 0, 255).astype(np.uint8)
    other = "white" if colour == "black" else "black"
    image[40:88, :60] = COLOURS[other]  # reaches over a part of the border
    background = background_of(image)
    assert background.colour == colour and background.distance < 8 and 0.8 < background.share < 1


def test_the_commonest_colour_is_that_of_the_greater_part():
    pixels = np.array([[10, 10, 10]] * 30 + [[200, 40, 40]] * 50 + [[202, 44, 38]] * 20, np.uint8)
    found = commonest(pixels)
    assert found.rgb == (200, 40, 40) and found.colour == "red" and found.share == 0.7


@pytest.mark.parametrize("name, least", [("pairs-20", 9), ("counts-20", 5), ("cards-20", 9)])
def test_pairs_counts_and_cards(name, least):
    prompts = open_list(name)[1][: 5 if name == "counts-20" else 9]
    images = real_images(prompts, range(len(prompts)))
    assert sum(j.first and j.background_right for j in judge_images(images, prompts)) >= least


@pytest.mark.parametrize("name, least", [("pairs-20", 7), ("counts-20", 4), ("cards-20", 14)])
def test_pairs_counts_and_cards_through_a_weak_autoencoder(name, least):
    prompts = open_list(name)[1][: {"pairs-20": 9, "counts-20": 5}.get(name)]
    images = [weakened(image, i) for i, image in enumerate(real_images(prompts, range(len(prompts))))]
    assert sum(j.first and j.background_right for j in judge_images(images, prompts)) >= least


CAT, DOG = find("cat"), find("dog")


@pytest.mark.parametrize(
    "drawn, asked",
    [
        (Prompt("", (CAT, DOG), "blue", "pair:left"), Prompt("", (DOG, CAT), "blue", "pair:left")),
        (Prompt("", (CAT, DOG), "blue", "pair:above"), Prompt("", (CAT, DOG), "blue", "pair:below")),
        (Prompt("", (CAT, DOG), "blue", "pair:left"), Prompt("", (CAT, find("pizza")), "blue", "pair:and")),
        (Prompt("", (CAT,), "blue", "count:3"), Prompt("", (CAT,), "blue", "count:2")),
        (Prompt("", (CAT,), "blue", "count:2"), Prompt("", (DOG,), "blue", "count:2")),
        (Prompt("", (CAT, DOG), "blue", "card:red,teal"), Prompt("", (CAT, DOG), "blue", "card:teal,red")),
        (Prompt("", (CAT,), "blue", "card:red"), Prompt("", (CAT,), "blue", "card:pink")),
    ],
)
def test_what_is_arranged_otherwise_is_wrong(drawn, asked):
    (image,) = real_images([drawn], [4])
    (right,), (wrong,) = judge_images([image], [drawn]), judge_images([image], [asked])
    assert right.first and not wrong.first


def test_and_takes_any_arrangement():
    asked = Prompt("", (CAT, DOG), "blue", "pair:and")
    for relation in ("left", "right", "above", "below"):
        (image,) = real_images([Prompt("", (CAT, DOG), "blue", f"pair:{relation}")], [1])
        assert judge_images([image], [asked])[0].first


def test_a_missing_font_is_told():
    with pytest.raises(DataError, match="fonts-noto-color-emoji"):
        Judge("/nowhere/font.ttf")
    assert find_font()
