"""Crops, flips and captions: what they are, that they are drawn evenly, and that they need no state."""

import itertools
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ldm.data.buckets import BucketConfig, Size, bucket_of, resized
from ldm.data.transforms import (
    TransformConfig,
    View,
    choose_caption,
    draw,
    draw_view,
    fixed_views,
    pixels,
    to_float,
)
from ldm.errors import ConfigError, DataError
from tests.children import in_child, status_of


def noise(height, width, seed=0):
    """An image no two parts of which are alike, smooth enough to be told after resizing."""
    small = np.random.default_rng(seed).integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def plain(image, view):
    """The same by the book: the whole image resized, mirrored, then cropped where the time ids say."""
    whole = image.resize(view.resized[::-1], Image.Resampling.LANCZOS)
    whole = ImageOps.mirror(whole) if view.flipped else whole
    _, _, top, left, height, width = view.time_ids
    return np.asarray(whole.crop((left, top, left + width, top + height)))


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("size", [(90, 61), (61, 90), (300, 100), (64, 64), (40, 40), (1, 200)])
def test_pixels_are_those_of_resizing_flipping_and_cropping(size, crop):
    size, config = Size(*size), TransformConfig(crop, flip=0.5)
    image, bucket, flips = noise(*size), bucket_of(size, BucketConfig(64, 16)), set()
    for sample in range(8):
        view = draw_view(size, bucket, config, seed=1, epoch=0, sample=sample)
        found = pixels(image, view)
        assert found.dtype == torch.uint8 and found.shape == (3, *bucket) and found.is_contiguous()
        expected = plain(image, view).astype(int)
        assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() <= 1  # fixed-point coefficients, rounded twice
        assert view.time_ids == (*size, view.top, view.left, *bucket)
        flips.add(view.flipped)
    assert flips == {True, False}


def test_an_image_of_the_buckets_size_is_kept_bit_by_bit():
    image, size = noise(64, 48), Size(64, 48)
    straight, mirrored = fixed_views(size, size, TransformConfig(flip=0.5))
    assert (pixels(image, straight).permute(1, 2, 0).numpy() == np.asarray(image)).all()
    assert torch.equal(pixels(image, mirrored), pixels(image, straight).flip(-1))


def test_a_flipped_image_is_the_mirror_image_and_its_crop_is_counted_from_the_other_side():
    """As where the image is mirrored before it is cropped (diffusers' XL script): also where margins are odd."""
    size, bucket = Size(64, 131), Size(64, 64)
    straight, mirrored = fixed_views(size, bucket, TransformConfig(flip=0.5))
    full = resized(size, bucket)
    assert (straight.flipped, mirrored.flipped) == (False, True)
    assert mirrored.left == full.width - bucket.width - straight.left and mirrored.top == straight.top
    assert mirrored.left != straight.left
    assert torch.equal(pixels(noise(*size), mirrored), pixels(noise(*size), straight).flip(-1))


def test_shrinking_is_antialiased():
    """One-pixel stripes become grey; taking every n-th pixel would leave black or white."""
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8)[None, :, None], (256, 128, 3)))
    view = draw_view(Size(256, 256), Size(64, 64), TransformConfig(), 0, 0, 0)
    grey = pixels(stripes, view)[:, 2:-2, 2:-2].float()
    assert (grey - 127.5).abs().max() <= 2


def test_a_line_needs_no_more_memory_than_a_square():
    """An image of 1x5000 at 512 px would be 328 million pixels, 1.3 GB, if it was resized as a whole."""
    size = Size(1, 5000)
    view = draw_view(size, bucket_of(size, BucketConfig(512)), TransformConfig(), 0, 0, 0)
    assert view.resized.area > 3e8
    image = Image.new("RGB", (5000, 1), (9, 20, 30))

    def work():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 100_000_000,) * 2)
        return pixels(image, view).float().mean((1, 2)).tolist() != [9, 20, 30]

    assert status_of(in_child(work)) == 0


def test_an_image_that_was_decoded_at_a_fraction_keeps_its_place():
    """Large JPEGs are decoded at a half or a quarter: the sides are rounded, what is cut out stays the same."""
    size, bucket = Size(801, 1203), Size(64, 64)
    image, view = noise(*size), draw_view(Size(801, 1203), Size(64, 64), TransformConfig("random"), 0, 0, 1)
    assert view.size == bucket and view.left > 5
    whole = pixels(image, view).float()
    for factor in (2, 4):
        part = pixels(image.reduce(factor), view).float()
        assert (part - whole).abs().mean() < 8 < 20 < (part.roll(4, 2) - whole).abs().mean()


def test_random_crops_fall_everywhere_alike_and_flips_as_often_as_asked():
    size, bucket = Size(64, 67), Size(64, 64)
    config = TransformConfig("random", flip=0.25)
    views = [draw_view(size, bucket, config, 3, epoch, sample) for epoch in range(40) for sample in range(100)]
    straight = [view for view in views if not view.flipped]
    assert abs(len(straight) / 4000 - 0.75) < 0.03
    for group in (straight, [view for view in views if view.flipped]):
        lefts = Counter(view.left for view in group)
        assert lefts.keys() == {0, 1, 2, 3} and {view.top for view in group} == {0}
        assert all(abs(n / len(group) - 0.25) < 0.05 for n in lefts.values())


def test_draws_are_keyed_by_seed_epoch_and_sample():
    size, bucket, config = Size(200, 100), Size(64, 64), TransformConfig("random", flip=0.5)
    keys = list(itertools.product((0, 1), (0, 1), range(20)))
    views = [draw_view(size, bucket, config, *key) for key in keys]
    backwards = [draw_view(size, bucket, config, *key) for key in reversed(keys)]
    assert backwards[::-1] == views
    for changed in range(3):  # another seed, epoch or sample: other views
        moved = [tuple(part + 7 * (i == changed) for i, part in enumerate(key)) for key in keys]
        assert [draw_view(size, bucket, config, *key) for key in moved] != views
    assert draw(1, "crop", 2) == 0.3699323002394479 and min(draw(i) for i in range(1000)) >= 0


def test_center_is_the_middle_and_never_changes():
    view = draw_view(Size(100, 50), Size(64, 64), TransformConfig(), 0, 0, 0)
    assert view == View(Size(100, 50), Size(128, 64), 32, 0, Size(64, 64), False)
    assert {draw_view(Size(100, 50), Size(64, 64), TransformConfig(), s, e, i) for s, e, i in np.ndindex(3, 3, 3)} == {
        view
    }


@pytest.mark.parametrize("flip", [0.0, 0.3, 1.0])
def test_fixed_views_are_all_that_can_be_drawn(flip):
    size, bucket, config = Size(90, 61), Size(64, 48), TransformConfig(flip=flip)
    drawn = {draw_view(size, bucket, config, seed, epoch, 5) for seed in range(8) for epoch in range(8)}
    assert drawn == set(fixed_views(size, bucket, config))


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ConfigError, match="crop: random crops cannot be cached; use crop=center"):
        fixed_views(Size(9, 9), Size(8, 8), TransformConfig("random"))
    with pytest.raises(ConfigError, match="flip: must be 0 to 1, got 1"):
        TransformConfig(flip=1.5)
    with pytest.raises(ConfigError, match="crop: must be center or random, got 'middle'"):
        TransformConfig("middle")
    view = draw_view(Size(64, 96), Size(64, 64), TransformConfig(), 0, 0, 0)
    for wrong in ((97, 64), (64, 96), (48, 64)):
        with pytest.raises(DataError, match="is {}x{} now, it was 96x64".format(*wrong)):
            pixels(Image.new("RGB", wrong), view)


def test_to_float_is_what_the_autoencoder_takes():
    from ldm import images

    image = noise(16, 16)
    view = draw_view(Size(16, 16), Size(16, 16), TransformConfig(), 0, 0, 0)
    assert torch.equal(to_float(pixels(image, view))[None], images.to_tensor(image))


def test_captions_and_dropout_are_drawn_evenly_and_anew_each_epoch():
    captions = ("one", "two", "three")
    drawn = [choose_caption(captions, 0.1, 7, epoch, sample) for epoch in range(20) for sample in range(300)]
    seen = Counter(drawn)
    assert seen.keys() == {"", *captions} and abs(seen[""] / 6000 - 0.1) < 0.02
    assert all(abs(seen[caption] / 6000 - 0.3) < 0.03 for caption in captions)
    epochs = [tuple(drawn[i : i + 300]) for i in range(0, 6000, 300)]
    assert len(set(epochs)) == 20
    assert [choose_caption(captions, 0.1, 7, 3, sample) for sample in range(300)] == list(epochs[3])
    assert {choose_caption(captions, 0.0, 7, 0, i) for i in range(99)} == set(captions)
    assert {choose_caption(captions, 1.0, 7, 0, i) for i in range(99)} == {""}
    assert choose_caption((), 0.0, 7, 0, 0) == ""
