"""The thing that fine-tuning is tried on: unknown to the default model, known to its judge in every pose."""

from itertools import product

import pytest
from invented import NAME, POSES, SHOWN, UNSEEN, WiderJudge, prompts, scene, write_pictures

from ldm.data.emoji import objects, vocabulary
from ldm.data.sources import open_source
from ldm.evaluation.judge import to_array


@pytest.fixture(scope="module")
def judge():
    return WiderJudge()


def test_the_judge_knows_every_pose_on_half_of_the_grounds(judge):
    pairs = product(enumerate(POSES), enumerate((*SHOWN, *UNSEEN)))
    for pose, colour in [(pose, colour) for (i, pose), (k, colour) in pairs if (i + k) % 2 == 0]:
        verdict = judge(scene(pose, colour, 96, 62, 66))
        assert (verdict.guesses[0].word, verdict.background.colour) == (NAME, colour)


def test_the_judge_takes_nothing_else_for_it(judge):
    from ldm.data.emoji import SceneConfig, Scenes

    scenes = Scenes(SceneConfig(objects="all"), seed=5)
    for i in range(60):
        assert judge(scenes[i].image).guesses[0].word != NAME


def test_its_name_was_never_shown_in_training(judge):
    assert NAME not in vocabulary() and not any(NAME in word for thing in objects() for word in thing.words)


def test_pictures_and_prompts_share_no_ground(judge, tmp_path):
    source = open_source(write_pictures(tmp_path / "set"))
    captions = [sample.captions[0] for sample in source]
    assert len(captions) == 24 and all(NAME in caption for caption in captions)
    assert len({to_array(sample.image()).tobytes() for sample in source}) == 24
    assert not any(colour in caption for caption in captions for colour in UNSEEN)
    assert all(p.colour in UNSEEN and p.colour in p.text for p in prompts())
