"""Pipeline.stream: steps in order, pictures as generate gives them, stopping, errors, previews."""

import threading

import numpy
import pytest

from ldm.errors import ConfigError, ResourceError
from ldm.pipeline import Pipeline

FAST = {"num_inference_steps": 3, "sampler": "euler"}


@pytest.fixture
def pipe(tiny_folder):
    return Pipeline(["a cat", "a cat BREAK a dog", "a dog"], model=tiny_folder)


def pixels(images):
    return [image.tobytes() for image in images]


def test_every_step_of_every_batch_comes_and_then_the_pictures(pipe):
    expected = pipe.generate(seed=1, **FAST)
    *steps, last = pipe.stream(seed=1, **FAST)
    assert [(step.index, step.rows) for step in steps] == [(i, rows) for rows in ((0, 2), (1,)) for i in range(3)]
    assert all(step.images is None for step in steps)
    assert pixels(last.images) == pixels(expected) and last.images.metadata == expected.metadata
    assert (last.index, last.rows) == (steps[-1].index, steps[-1].rows)


def test_previews_are_small_pictures(pipe):
    for step in pipe.stream(seed=1, **FAST):
        assert [preview.size for preview in step.previews] == [(4, 4)] * len(step.rows)
        assert step.preview.width == 4 * min(len(step.rows), 2)
        assert [image.size for image in step.decode()] == [(32, 32)] * len(step.rows)


def test_leaving_the_loop_stops_the_work(pipe):
    whole, seen = pixels(pipe.generate(seed=1, **FAST)), []
    for step in pipe.stream(seed=1, num_inference_steps=400, sampler="euler", callback=lambda *s: seen.append(s[0])):
        if step.index == 1:
            break
    assert 2 <= len(seen) < 400
    assert not [thread for thread in threading.enumerate() if thread.name == "ldm-stream"]
    assert pixels(pipe.generate(seed=1, **FAST)) == whole  # inside the loop's pipeline, at once


def test_a_call_inside_the_loop_waits_for_the_stream(pipe):
    whole = pixels(pipe.generate(seed=1, **FAST))
    for step in pipe.stream(seed=5, **FAST):
        if step.index == 0:
            assert pixels(pipe.generate(seed=1, **FAST)) == whole
    assert step.images.seeds == [5, 5, 5]


def test_errors_are_raised_by_the_loop(pipe):
    with pytest.raises(ConfigError, match="did you mean 'sampler'"):
        next(pipe.stream(samplr="euler"))

    def full(i, x, x0):
        raise MemoryError

    with pytest.raises(ResourceError, match="out of memory"):
        list(pipe.stream(callback=full, **FAST))


def test_a_callback_can_end_a_stream(pipe):
    *_, last = pipe.stream(seed=1, batch_size=1, callback=lambda i, x, x0: True, **FAST)
    assert last.index == 0 and len(last.images) == 0


def test_previews_of_the_default_model_are_like_its_pictures_from_half_way():
    """Correlation of the preview with the picture, scaled to its size, over pixels and channels: 0.8 and more."""
    pipe, found = Pipeline(["a cat on a red ground", "a blue car", "a green tree on a yellow ground"]), {}
    for step in pipe.stream(seed=3, num_inference_steps=12):
        found[step.index] = [numpy.asarray(preview, dtype=float) for preview in step.previews]
    small = [numpy.asarray(image.resize((16, 16), 4), dtype=float) for image in step.images]
    for index in range(6, 12):
        for preview, picture in zip(found[index], small):
            assert numpy.corrcoef(preview.ravel(), picture.ravel())[0, 1] >= 0.8, index
