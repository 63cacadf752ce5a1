"""Buckets against brute force, the order of batches against its definition."""

import itertools
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from ldm.data.buckets import Batches, BucketConfig, Size, bucket_of, buckets, resized, shuffle_keys
from ldm.data.doctor.diagnosis import histogram
from ldm.errors import ConfigError, DataError

CONFIGS = [
    BucketConfig(),
    BucketConfig(1024, 64, 512, 2048),
    BucketConfig(128, 8),
    BucketConfig(256, 64, 256, 256),
    BucketConfig(512, 64, 100, 1000),
    BucketConfig(64, 64),
]


def sizes(count, seed=0, longest=3000):
    """Heights and widths spread evenly in their logarithm, and the odd ones."""
    random_ = random.Random(seed)
    odd = [Size(1, 1), Size(1, 5000), Size(5000, 1), Size(64, 64), Size(513, 511), Size(512, 512), Size(300, 300)]
    spread = [Size(*(int(longest ** random_.random()) for _ in range(2))) for _ in range(count)]
    return odd + spread


@pytest.mark.parametrize("config", CONFIGS)
def test_buckets_are_every_size_that_leaves_no_room_for_a_longer_side(config):
    low, high = config.sides
    steps = range(low, high + 1, config.step)
    room = config.resolution**2
    fitting = {Size(h, w) for h, w in itertools.product(steps, steps) if h * w <= room}
    longest = {
        s
        for s in fitting
        if Size(s[0], s[1] + config.step) not in fitting or Size(s[0] + config.step, s[1]) not in fitting
    }
    found = set(buckets(config))
    assert found == longest
    assert len(buckets(config)) == len(found) and found == {Size(w, h) for h, w in found}
    assert Size(config.resolution, config.resolution) in found


@pytest.mark.parametrize(
    ("resolution", "step", "least"), [(512, 64, 0.81), (1024, 64, 0.9), (512, 8, 0.97), (128, 8, 0.9)]
)
def test_areas_are_about_equal(resolution, step, least):
    areas = [size.area / resolution**2 for size in buckets(BucketConfig(resolution, step))]
    assert least < min(areas) and max(areas) == 1


def test_the_buckets_of_xl_are_those_of_its_paper():
    """Podell et al. 2023, appendix I: 40 sizes of about 1024²; ours are those that no longer one of them holds."""
    paper = [(512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600)]
    paper += [(640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152)]
    paper += [(896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024)]
    held = {(704, 1344), (832, 1152), (896, 1088), (960, 1024)}
    expected = {Size(*pair) for pair in paper if pair not in held} | {
        Size(w, h) for h, w in paper if (h, w) not in held
    }
    assert set(buckets(BucketConfig(1024))) == expected


@pytest.mark.parametrize("config", CONFIGS)
def test_each_image_gets_the_bucket_that_loses_fewest_pixels(config):
    def lost(size, bucket):
        """Of the image, scaled without rounding until it covers the bucket."""
        scale = max(Fraction(bucket.height, size.height), Fraction(bucket.width, size.width))
        return 1 - bucket.area / (size.area * scale**2)

    for size in sizes(150):
        found = bucket_of(size, config)
        best = min(lost(size, bucket) for bucket in buckets(config))
        assert lost(size, found) == best
        assert found.area == max(bucket.area for bucket in buckets(config) if lost(size, bucket) == best)
        full = resized(size, found)
        assert (
            full.height >= found.height
            and full.width >= found.width
            and found.height / full.height
            in (
                1,
                found.area / full.area,
            )
        )
        assert abs(full.width - size.width * full.height / size.height) <= max(1, size.width / size.height)


def test_the_bucket_of_a_turned_image_is_turned():
    for size, config in itertools.product(sizes(300, seed=1), CONFIGS):
        assert resized(Size(*size[::-1]), Size(1, 1)) == Size(*resized(size, Size(1, 1))[::-1])
        here, there = bucket_of(size, config), bucket_of(Size(*size[::-1]), config)
        assert here.area == there.area
        if size.height != size.width:
            assert there == Size(*here[::-1])


@pytest.mark.parametrize("config", [BucketConfig(512, 64, upscale=False), BucketConfig(128, 8, upscale=False)])
def test_no_image_is_enlarged_by_choice(config):
    seen = Counter()
    for size in sizes(2000):
        found = bucket_of(size, config)
        assert found.height % config.step == found.width % config.step == 0 and found.area <= config.resolution**2
        assert max(found) <= config.sides[1]
        small = found not in buckets(config)
        seen[small] += 1
        for side, had in zip(found, size):
            assert side <= had or side == config.step  # below one step there is no bucket
        if small:
            scaled = bucket_of(size, BucketConfig(config.resolution, config.step))
            assert scaled.height > size.height or scaled.width > size.width
    assert min(seen.values()) > 100
    assert bucket_of(Size(300, 400), BucketConfig(512, 64, upscale=False)) == Size(256, 384)


def test_histogram_adds_up_and_tells_what_cropping_costs():
    config = BucketConfig(512, 64)
    images = [Size(512, 512)] * 5 + [Size(512, 640), Size(100, 100)] + sizes(500, seed=2)
    shares = histogram(images, config)
    assert sum(share.images for share in shares) == len(images)
    assert [s.images for s in shares] == sorted((s.images for s in shares), reverse=True)
    for share in shares:
        members = [size for size in images if bucket_of(size, config) == share.bucket]
        assert share.images == len(members)
        kept = [share.bucket.area / resized(size, share.bucket).area for size in members]
        assert share.lost == pytest.approx(1 - sum(kept) / len(kept), abs=1e-12)
        assert share.enlarged == sum(any(a < b for a, b in zip(size, share.bucket)) for size in members)
    (only,) = histogram([Size(1000, 2000)] * 3, BucketConfig(256, 64, 256, 256))
    assert (only.images, only.lost, only.enlarged) == (3, 0.5, 0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"resolution": 500}, "500 is not a multiple of the step 64; use 448"),
        ({"resolution": 0}, "0 is not a multiple of the step 64; use 64"),
        ({"step": 0}, "step: must be at least 1"),
        ({"min_side": 0}, "min_side: must be at least the step 64, got 0"),
        ({"min_side": 576}, "min_side: must be at most the resolution 512, got 576"),
        ({"max_side": 500}, "max_side: must be at least the resolution 512, got 448"),
    ],
)
def test_impossible_buckets_are_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        BucketConfig(**values)


def many(count=1000, kinds=7):
    random_ = random.Random(3)
    return [Size(64 * random_.randint(1, kinds), 64) for _ in range(count)]


def epoch_of(batches, epoch):
    found = [batches.at(epoch * len(batches) + place) for place in range(len(batches))]
    assert {number for number, _ in found} == {epoch}
    return [positions for _, positions in found]


def test_an_epoch_holds_every_image_once_in_batches_of_one_bucket():
    members, size = many(), 8
    batches = Batches(members, size, seed=5)
    counts = Counter(members)
    assert len(batches) == sum(-(-count // size) for count in counts.values())
    orders = [epoch_of(batches, epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(itertools.chain(*order)) == list(range(len(members)))
        kinds = [{members[i] for i in batch} for batch in order]
        assert all(len(kind) == 1 for kind in kinds)
        short = Counter(kind.pop() for kind, batch in zip(kinds, order) if len(batch) < size)
        assert short == {bucket: 1 for bucket, count in counts.items() if count % size}  # at most one for each
    assert orders[0] != orders[1] != orders[2]
    last = [{frozenset(batch) for batch in order if len(batch) < size} for order in orders]
    assert last[0] != last[1]  # what is left over changes


def test_the_order_is_a_function_of_seed_and_step_alone():
    """What resuming needs: asked in any order, by a new object, the same batch; another seed, another order."""
    members = many(200)
    first = Batches(members, 4, seed=5)
    steps = list(range(3 * len(first)))
    expected = [first.at(step) for step in steps]
    random.Random(0).shuffle(steps)
    again = Batches(list(members), 4, seed=5)
    assert [again.at(step) for step in steps] == [expected[step] for step in steps]
    assert Batches(members, 4, seed=6).at(0) != expected[0]


def test_every_order_is_as_likely():
    """Of three images the six orders, over 6,000 epochs: chi-squared with 5 degrees of freedom."""
    batches = Batches([Size(64, 64)] * 3, 1, seed=0)
    seen = Counter(tuple(i for (i,) in epoch_of(batches, epoch)) for epoch in range(6000))
    assert len(seen) == 6 and sum((n - 1000) ** 2 / 1000 for n in seen.values()) < 20.5  # p = 0.001


def test_shuffle_keys_are_splitmix64():
    """The published generator, written out, from the same start."""
    import hashlib

    state = int.from_bytes(hashlib.blake2b(repr((1, "x")).encode(), digest_size=8).digest(), "little")
    expected, mask = [], (1 << 64) - 1
    for _ in range(5):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        expected.append(z ^ (z >> 31))
    found = shuffle_keys(5, 1, "x")
    assert found.dtype == np.uint64 and found.tolist() == expected


def test_one_image_makes_one_batch_and_none_are_refused():
    assert [Batches([Size(8, 8)], 16, seed=0).at(step) for step in (0, 7)] == [(0, [0]), (7, [0])]
    with pytest.raises(DataError, match="no images"):
        Batches([], 4, seed=0)
    with pytest.raises(ConfigError, match="batch_size: must be at least 1, got 0"):
        Batches([Size(8, 8)], 0, seed=0)
