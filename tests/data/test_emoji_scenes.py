import hashlib
import json
import pickle

import numpy as np
import pytest

from ldm.data import emoji
from ldm.data.emoji import COLOURS, SceneConfig, Scenes
from ldm.errors import ConfigError, DataError

MIXED = {"single": 1.0, "pair": 1.0, "count": 1.0, "card": 1.0}
FIRST_CAPTIONS = [
    "green background, a map of japan",
    "a sailing boat over a pencil on a red background",
    "a light bulb on a blue disc on a teal background",
    "a cake to the right of thunderstorm on a red ground",
    "two volleyballs",
    "a mountain on a grey card on a plain black background",
    "a picture of one rat on a grey circle on pink",
    "a target to the left of dog on a teal background",
    "four snowflakes",
    "an umbrella on a blue disc and a hen on a brown card",
]
SIGN = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}


def only(kind, **more):
    return SceneConfig(kinds={kind: 1.0}, objects="all", **more)


def boxes(spec):
    return [(p.x - p.size / 2, p.y - p.size / 2, p.x + p.size / 2, p.y + p.size / 2) for p in spec.objects]


def test_a_scene_is_a_function_of_seed_and_index():
    config = SceneConfig(kinds=MIXED, objects="all")
    first, again = Scenes(config, seed=3), Scenes(config, seed=3)
    ahead = [first[i] for i in range(12)]
    for i in reversed(range(12)):  # in another order
        scene = again[i]
        assert scene.spec == ahead[i].spec and np.array_equal(scene.image, ahead[i].image)
    assert [Scenes(config, seed=4).caption(i) for i in range(12)] != [s.caption for s in ahead]
    assert pickle.loads(pickle.dumps(first)).caption(5) == ahead[5].caption  # as a worker process gets it


def test_captions_are_pinned():
    """The first ten as they read, and 2,000 by the hash of commit e1dfa1b, which added them.

    Changing these changes what every training run sees: say so in the commit.
    """
    scenes = Scenes(SceneConfig(kinds=MIXED, objects="all"), seed=0)
    captions = [scenes.caption(i) for i in range(2000)]
    assert captions[:10] == FIRST_CAPTIONS
    text = "\n".join(captions)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "61d0bfeee40e0c82"


def test_backgrounds_and_cards_have_exactly_the_named_colours():
    scenes, seen = Scenes(SceneConfig(kinds={"single": 1.0, "card": 1.0}), seed=1), set()
    for i in range(150):
        scene = scenes[i]
        assert scene.image.shape == (128, 128, 3) and scene.image.dtype == np.uint8
        spec, pixels = scene.spec, scene.image.reshape(-1, 3)
        assert spec.background == COLOURS[spec.colour] and (pixels == spec.background).all(1).sum() > 400
        for card in spec.cards:
            assert card.colour != spec.colour and (pixels == COLOURS[card.colour]).all(1).sum() > 100
        seen.add(spec.colour)
    assert seen == set(COLOURS)


def test_objects_are_where_the_spec_says():
    for kind in MIXED:
        scenes = Scenes(only(kind), seed=2)
        for i in range(25):
            scene = scenes[i]
            allowed = np.zeros((128, 128), bool)
            places = [(p.x, p.y, p.size) for p in (*scene.spec.objects, *scene.spec.cards)]
            for x, y, size in places:
                left, top = round(x - size / 2), round(y - size / 2)
                area = np.s_[top : top + size, left : left + size]
                allowed[area] = True
                changed = (scene.image[area] != scene.spec.background).any(-1)
                assert changed.mean() > 0.02
            assert not (scene.image != scene.spec.background).any(-1)[~allowed].any()


def test_sizes_and_places_follow_the_settings():
    centred, wide = Scenes(SceneConfig(), 0), Scenes(SceneConfig(size=(40, 110), jitter=64), 0)
    for i in range(500):
        (p,) = centred.spec(i).objects
        assert 88 <= p.size <= 104 and abs(p.x - 64) <= 6 and abs(p.y - 64) <= 6
    placed = [wide.spec(i).objects[0] for i in range(500)]
    assert min(p.size for p in placed) < 45 and max(p.size for p in placed) > 105
    assert min(p.x for p in placed) < 30 and max(p.y for p in placed) > 98
    assert all(p.size / 2 <= v <= 128 - p.size / 2 for p in placed for v in (p.x, p.y))


def test_relations_are_true():
    scenes, seen = Scenes(only("pair"), seed=5), set()
    for i in range(600):
        spec = scenes.spec(i)
        seen.add(spec.relation)
        a, b = spec.objects
        assert a.object.lookalike_class != b.object.lookalike_class
        offset = np.array([a.x - b.x, a.y - b.y])
        if spec.relation in SIGN:
            assert offset @ SIGN[spec.relation] > 2 * abs(offset @ SIGN[spec.relation][::-1])
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = boxes(spec)
        assert ax1 <= bx0 or bx1 <= ax0 or ay1 <= by0 or by1 <= ay0
    assert seen == {"left", "right", "above", "below", "and"}


def test_counts_are_right_and_apart():
    for i in range(400):
        spec = Scenes(only("count"), seed=6).spec(i)
        (combination,) = spec.judged
        assert combination[0] == "count" and len(spec.objects) == combination[2] in (2, 3, 4)
        assert len({(p.object.char, p.size) for p in spec.objects}) == 1
        rects = boxes(spec)
        assert all(0 <= v <= 128 for rect in rects for v in rect)
        for j, a in enumerate(rects):
            for b in rects[:j]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_other_resolutions_and_any_background():
    scene = Scenes(SceneConfig(resolution=64, backgrounds="any"), 0)[0]
    assert scene.image.shape == (64, 64, 3)
    assert scene.spec.colour is None and not set(scene.caption.split()) & {"background", "on"}
    assert len({Scenes(SceneConfig(backgrounds="any"), 0).spec(i).background for i in range(50)}) == 50


def test_share_of_common_objects_and_everyday_ones_in_pairs():
    config = only("single", everyday_share=0.2, common_share=0.5)
    things = [Scenes(config, 3).spec(i).objects[0].object for i in range(3000)]
    assert abs(np.mean([t.everyday for t in things]) - (0.2 + 0.4 * 150 / 308 + 0.4 * 150 / 849)) < 0.03
    assert abs(np.mean([t.common for t in things]) - (0.2 + 0.4 + 0.4 * 308 / 849)) < 0.03
    for kind in ("pair", "count", "card"):
        scenes = Scenes(only(kind, everyday_share=0.0, arranged="everyday"), 3)
        assert all(p.object.everyday for i in range(50) for p in scenes.spec(i).objects)


def test_share_of_everyday_objects_and_of_told_backgrounds():
    specs = [Scenes(only("single", everyday_share=0.5), 0).spec(i) for i in range(3000)]
    share = np.mean([s.objects[0].object.everyday for s in specs])
    assert abs(share - (0.5 + 0.5 * 150 / 849)) < 0.03
    assert abs(np.mean([s.mentioned for s in specs]) - 0.85) < 0.03
    assert all(s.objects[0].object.everyday for s in (Scenes(SceneConfig(), 0).spec(i) for i in range(300)))


def test_oversampled_are_drawn_as_often_as_they_are_told_to_be():
    words, config = ("cat", "🐶", "🦊"), {"objects": "all", "everyday_share": 0.0}
    scenes = Scenes(SceneConfig(oversampled=words, oversampled_share=0.6, **config), 0)
    names = [scenes.spec(i).objects[0].object.word for i in range(2000)]
    for word in ("cat", "dog face", "fox"):
        assert abs(names.count(word) / 2000 - (0.2 + 0.4 / 849)) < 0.03, word
    without, never = (Scenes(SceneConfig(oversampled_share=share, **config), 0) for share in (0.6, 0.0))
    assert all(without.spec(i) == never.spec(i) for i in range(50))
    counted = Scenes(SceneConfig(oversampled=("bread",), oversampled_share=0.99, kinds={"count": 1.0}), 0)
    assert counted.spec(0).objects[0].object.countable  # bread is not


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"oversampled": ("a catt",)}, "no object is called 'a catt'"),
        ({"oversampled_share": 1.0}, "must be 0 to less than 1"),
        ({"kinds": {"singel": 1.0}}, "did you mean 'single'"),
        ({"kinds": {"single": 0.0}}, "all weights are zero"),
        ({"kinds": {"single": -1.0}}, "cannot be negative"),
        ({"size": (90, 80)}, "size: needs"),
        ({"mention": 1.5}, "mention: must be 0 to 1"),
        ({"held_out": True, "backgrounds": "any"}, "held-out scenes need named backgrounds"),
    ],
)
def test_refuses_senseless_settings(settings, said):
    with pytest.raises(ConfigError, match=said):
        SceneConfig(**settings)


def test_missing_font_says_how_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"x.ttf: the font Noto Color Emoji was not found; install it .*apt install"):
        emoji.find_font(tmp_path / "x.ttf")
    (tmp_path / "text.ttf").write_text("no font")
    with pytest.raises(DataError, match=r"not a font.*--font FILE"):
        Scenes(font=tmp_path / "text.ttf")[0]
    monkeypatch.setattr("ldm.data.emoji.sprites.PLACES", (str(tmp_path / "y.ttf"),))
    assert Scenes().caption(0)  # captions need no font
    with pytest.raises(DataError, match="apt install fonts-noto-color-emoji"):
        Scenes()[0]


def test_every_object_has_a_image():
    font = emoji.find_font()
    for thing in emoji.objects():
        image = emoji.sprite(thing.char, font)
        assert image.size[0] == image.size[1] >= 60
        assert np.asarray(image.getchannel("A")).mean() > 10, thing.name


def test_export_writes_an_imagefolder(tmp_path):
    from tests.data.captioned import CaptionedFolder

    target = emoji.export(tmp_path / "scenes", n=12, seed=9)
    rows = [json.loads(line) for line in (target / "metadata.jsonl").read_text().splitlines()]
    assert [r["file_name"] for r in rows] == [f"{i:06d}.png" for i in range(12)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scenes"] and len(list(target.iterdir())) == 13
    data = CaptionedFolder(target)
    scenes = Scenes(SceneConfig(objects="all", kinds=emoji.MIXED), seed=9)
    for i in range(12):
        assert np.array_equal(data[i][0], scenes[i].image) and data[i][1] == scenes[i].caption
    with pytest.raises(DataError, match=r"scenes: is there already and not empty; name a new folder"):
        emoji.export(target, n=1)
    with pytest.raises(ConfigError, match="n: must be at least 1"):
        emoji.export(tmp_path / "none", n=0)


def test_export_leaves_nothing_half_written(tmp_path, monkeypatch):
    drawn = []

    def fail(self, index):
        if index == 3:
            raise KeyboardInterrupt
        drawn.append(index)
        return original(self, index)

    original = Scenes.__getitem__
    monkeypatch.setattr(Scenes, "__getitem__", fail)
    with pytest.raises(KeyboardInterrupt):
        emoji.export(tmp_path / "scenes", n=5)
    assert drawn == [0, 1, 2] and list(tmp_path.iterdir()) == []


def test_a_grid_leaves_few_sizes_and_places():
    scenes = Scenes(SceneConfig(size=(88, 104), jitter=8, grid=8))
    placed = [scenes.spec(i).objects[0] for i in range(200)]
    assert {p.size for p in placed} == {88, 96, 104}
    assert {p.x for p in placed} == {p.y for p in placed} == {56, 64, 72}
    with pytest.raises(ConfigError, match="grid"):
        SceneConfig(grid=0)


def test_a_share_of_single_objects_stands_still_in_the_middle():
    scenes = Scenes(SceneConfig(size=(88, 104), jitter=8, grid=8, fixed_layout=0.7))
    placed = [scenes.spec(i).objects[0] for i in range(400)]
    middle = sum((p.x, p.y, p.size) == (64, 64, 96) for p in placed) / 400
    assert 0.65 < middle < 0.82  # and those of the others that happen to be there
    free, none = Scenes(SceneConfig(size=(88, 104))), Scenes(SceneConfig(size=(88, 104), fixed_layout=0.0))
    assert all(free.spec(i) == none.spec(i) for i in range(50))
    assert {p.size for p in placed} == {88, 96, 104}


@pytest.mark.parametrize(("kind", "ways"), [("pair", 4), ("count", 3), ("card", 5)])
def test_a_still_scene_has_one_place_for_each_arrangement(kind, ways):
    """Pairs: four sides; counts: two, three and four; cards: one, or two on four sides."""
    still, free = (Scenes(SceneConfig(kinds={kind: 1.0}, fixed_layout=share), 1) for share in (1.0, 0.0))

    def seen(scenes):
        return {tuple(sorted((p.x, p.y, p.size) for p in scenes.spec(i).objects)) for i in range(150)}

    sides = {tuple((p.x, p.y, p.size) for p in still.spec(i).objects) for i in range(150)}
    assert len(sides) == ways and len(seen(free)) > 100
    placed = {one for scene in sides for one in scene}
    assert {size for _, _, size in placed} == ({48, 96} if kind == "card" else {48})  # of single objects, and half
    assert all((x - size // 2) % 8 == (y - size // 2) % 8 == 0 for x, y, size in placed)  # whole latents
