"""The cache against encoding without one: the same bits, whatever was edited, damaged, killed or left out."""

import dataclasses
import hashlib
import os
import random
import re
import shutil
import signal
import time
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.buckets import Batches, BucketConfig, Size, bucket_of
from ldm.data.cache import Cache, CachedSample, CacheReport
from ldm.data.transforms import TransformConfig, choose_caption, draw_view, fixed_views, pixels, to_float
from ldm.errors import ConfigError, DataError, NumericsError, ResourceError
from tests.children import in_child, status_of

BUCKETS, TRANSFORM = BucketConfig(32, 8), TransformConfig(flip=0.5)
NAME = "ldm-cache-00000.safetensors"


def encode(images):
    """(1, 3, H, W) -> mean and std (1, 4, H/8, W/8), both told by every pixel."""
    assert len(images) == 1 and images.dtype == torch.float32 and -1 <= images.min() <= images.max() <= 1
    cells = torch.nn.functional.pixel_unshuffle(images, 8)
    weights = torch.linspace(-1, 1, 4 * cells.shape[1]).reshape(4, -1)
    mean = torch.einsum("bchw,oc->bohw", cells, weights)
    return mean, 0.01 + mean.abs() / 100


def embed(texts):
    (text,) = texts
    draw = torch.Generator().manual_seed(len(text) + 1000 * sum(text.encode()))
    return {"states": torch.randn((1, 5, 6), generator=draw), "mask": torch.arange(5)[None] <= len(text)}


class Data:
    """Images and captions that a test may edit, counting how often each is encoded."""

    def __init__(self, count=6):
        sizes = [Size(32, 32), Size(40, 25), Size(90, 64)]
        self.images = [self.image(i, sizes[i % 3]) for i in range(count)]
        self.captions = [(f"number {i}", f"the {i}-th") for i in range(count)]
        self.calls = {"encode": 0, "embed": 0, "open": 0}

    @staticmethod
    def image(seed, size):
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))

    def identity(self, i):
        return hashlib.sha256(self.images[i].tobytes()).hexdigest()

    def size(self, i):
        return Size(*self.images[i].size[::-1])

    def samples(self):
        return [
            CachedSample(f"{i}.png", self.identity(i), self.views(i), self.captions[i]) for i in range(len(self.images))
        ]

    def views(self, i):
        return fixed_views(self.size(i), bucket_of(self.size(i), BUCKETS), TRANSFORM)

    def open(self, i):
        self.calls["open"] += 1
        return self.images[i], self.identity(i)

    def encode(self, images):
        self.calls["encode"] += 1
        return encode(images)

    def embed(self, texts):
        self.calls["embed"] += 1
        return embed(texts)

    def prepare(self, cache, **options):
        self.calls = dict.fromkeys(self.calls, 0)
        return cache.prepare(self.samples(), self.open, self.encode, self.embed, **options)

    def check(self, cache):
        """Every entry that training may ask for is what encoding the image or caption alone gives."""
        for i in range(len(self.images)):
            for view in self.views(i):
                expected = encode(to_float(pixels(self.images[i], view))[None])
                found = cache.latents(self.identity(i), view)
                assert all(torch.equal(a, b[0]) and a.dtype == torch.float32 for a, b in zip(found, expected))
            for caption in ("", *self.captions[i]):
                found, expected = cache.text(caption), embed([caption])
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[name], expected[name][0]) for name in expected)


@pytest.fixture
def data():
    return Data()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def prepared(data, folder):
    """The folder of a cache of `data`: 12 latents, 13 texts."""
    with Cache(folder, "vae", "text") as cache:
        data.prepare(cache)
    return folder


def test_entries_are_the_bits_of_encoding_alone_and_are_made_once(data, folder):
    with Cache(folder, "vae", "text") as cache:
        found = data.prepare(cache)
        assert found == CacheReport(kept=0, made=25, damaged=0, failed=0, bytes=found.bytes, unused=0)
        assert data.calls == {"encode": 12, "embed": 13, "open": 6}  # one decoding for both views
        data.check(cache)
    with Cache(folder, "vae", "text") as cache:
        found = data.prepare(cache)
        assert found == CacheReport(
            kept=25, made=0, damaged=0, failed=0, bytes=(folder / NAME).stat().st_size, unused=0
        )
        assert data.calls == {"encode": 0, "embed": 0, "open": 0}
        data.check(cache)


def test_an_epoch_from_the_cache_is_the_epoch_without_it(data, prepared):
    """Flips, alternatives and dropout are drawn when an entry is read; latents are sampled anew."""
    buckets = [bucket_of(data.size(i), BUCKETS) for i in range(6)]
    order, seen = Batches(buckets, 2, seed=1), set()
    with Cache(prepared, "vae", "text") as cache:
        for step in range(30 * len(order)):
            epoch, positions = order.at(step)
            for i in positions:
                view = draw_view(data.size(i), buckets[i], TRANSFORM, 1, epoch, i)
                caption = choose_caption(data.captions[i], 0.2, 1, epoch, i)
                mean, std = cache.latents(data.identity(i), view)
                expected = encode(to_float(pixels(data.images[i], view))[None])
                assert torch.equal(mean, expected[0][0]) and torch.equal(std, expected[1][0]) and std.min() > 0
                assert torch.equal(cache.text(caption)["states"], embed([caption])["states"][0])
                seen.add((i, view.flipped, caption))
    assert len(seen) == 6 * 2 * 3


def edit_image(data):
    data.images[2] = data.image(77, data.size(2))
    return 2, 0


def edit_size(data):
    data.images[2] = data.images[2].resize((50, 50))
    return 2, 0


def edit_caption(data):
    data.captions[3] = ("number 3", "a better one")
    return 0, 1


def add_sample(data):
    data.images.append(data.image(99, Size(32, 32)))
    data.captions.append(("new", "number 1"))
    return 2, 1


def swap(data):
    data.images[0], data.images[3] = data.images[3], data.images[0]
    data.captions.reverse()
    return 0, 0


@pytest.mark.parametrize("edit", [edit_image, edit_size, edit_caption, add_sample, swap])
def test_an_edit_renews_its_own_entries_alone(data, prepared, edit):
    encoded, embedded = edit(data)
    with Cache(prepared, "vae", "text") as cache:
        found = data.prepare(cache)
        assert (data.calls["encode"], data.calls["embed"]) == (encoded, embedded)
        assert found.made == encoded + embedded and found.damaged == 0
        data.check(cache)


@pytest.mark.parametrize(
    ("changed", "encoded", "embedded"),
    [({"vae_id": "other"}, 12, 0), ({"text_id": "other"}, 0, 13), ({"dtype": "bf16"}, 12, 13)],
)
def test_other_encoders_have_other_entries(data, prepared, changed, encoded, embedded):
    with Cache(prepared, **{"vae_id": "vae", "text_id": "text", **changed}) as cache:
        found = data.prepare(cache)
        assert (data.calls["encode"], data.calls["embed"], found.unused) == (encoded, embedded, encoded + embedded)
    with Cache(prepared, "vae", "text") as cache:
        assert data.prepare(cache).kept == 25  # the first are still there


def test_every_part_of_a_view_is_part_of_the_key(data, prepared):
    with Cache(prepared, "vae", "text") as cache:
        view = data.views(1)[0]
        cache.latents(data.identity(1), view)
        for change in (
            {"original": Size(9, 9)},
            {"resized": Size(9, 9)},
            {"top": view.top + 1},
            {"left": view.left + 1},
            {"size": Size(8, 8)},
        ):
            with pytest.raises(DataError, match=r"has no entry of the image .*; prepare the cache again"):
                cache.latents(data.identity(1), dataclasses.replace(view, **change))
        straight, mirrored = (cache.latents(data.identity(1), view)[0] for view in data.views(1))
        assert not torch.equal(straight, mirrored)
        with pytest.raises(DataError, match="has no entry of the caption 'never'"):
            cache.text("never")


def test_bf16_halves_the_room_and_rounds(data, prepared, tmp_path):
    with Cache(tmp_path / "half", "vae", "text", dtype="bf16") as cache, Cache(prepared, "vae", "text") as whole:
        data.prepare(cache)
        view, identity = data.views(0)[0], data.identity(0)
        for half, full in zip(cache.latents(identity, view), whole.latents(identity, view)):
            assert half.dtype == torch.float32 and torch.equal(half, full.bfloat16().float())
            assert not torch.equal(half, full)
        assert cache.text("")["states"].dtype == torch.bfloat16 and cache.text("")["mask"].dtype == torch.bool
    with pytest.raises(ConfigError, match="dtype: must be fp32 or bf16, got 'fp16'"):
        Cache(tmp_path, "vae", "text", dtype="fp16")


def test_flipped_bits_are_found_and_renewed_alone(data, prepared):
    """In the tensors: one entry each. What is read afterwards is right."""
    path, draw = prepared / NAME, random.Random(1)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(12):
        shutil.rmtree(prepared)
        prepared.mkdir()
        damaged = bytearray(whole)
        damaged[draw.randrange(start, len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with Cache(prepared, "vae", "text") as cache:
            found = data.prepare(cache)
            assert (found.kept, found.made, found.damaged) == (24, 1, 1)
            data.check(cache)
        with Cache(prepared, "vae", "text") as cache:
            assert data.prepare(cache).kept == 25


@pytest.mark.parametrize("left", [0, 7, 0.3, 0.99])
def test_truncated_files_are_made_again(data, prepared, left):
    path = prepared / NAME
    os.truncate(path, int(left * path.stat().st_size) if isinstance(left, float) else left)
    with Cache(prepared, "vae", "text") as cache:
        assert data.prepare(cache).made == 25
        data.check(cache)


def test_what_is_damaged_after_the_check_is_refused(data, prepared):
    with Cache(prepared, "vae", "text") as cache:
        assert data.prepare(cache).kept == 25
        whole = (prepared / NAME).read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        (prepared / NAME).write_bytes(whole[:start] + bytes(len(whole) - start))
        with pytest.raises(DataError, match=r"the image .* was damaged after it had been checked; prepare the cache"):
            cache.latents(data.identity(0), data.views(0)[0])


def test_images_that_cannot_be_used_are_named_once_and_the_others_go_on(data, folder):
    class Broken(Data):
        def open(self, i):
            if i == 1:
                raise DataError("no such file", where="/images/1.png")
            image, identity = super().open(i)
            return image, "changed" if i == 4 else identity

        def encode(self, images):
            mean, std = super().encode(images)
            here = to_float(pixels(self.images[2], self.views(2)[1]))
            return mean, std * torch.nan if images[0].shape == here.shape and torch.equal(images[0], here) else std

    broken, told = Broken(), []
    with Cache(folder, "vae", "text") as cache:
        found = broken.prepare(cache, failed=lambda position, error: told.append((position, str(error))))
        assert (found.kept, found.made, found.failed) == (0, 20, 5)  # of image 2 only the flipped view
        assert told == [
            (1, "/images/1.png: no such file"),
            (2, "2.png: encoding gave NaN or infinity; encode in fp32"),
            (4, "4.png: was changed while the cache was prepared; run the same again"),
        ]
        with pytest.raises(DataError, match="has no entry"):
            cache.latents(broken.identity(2), broken.views(2)[1])
    with Cache(folder, "vae", "text") as cache:  # what was mended is made, nothing else
        assert (data.prepare(cache).made, data.calls["encode"]) == (5, 5)
        data.check(cache)


def test_without_a_judge_the_first_bad_image_ends_the_work_and_what_was_made_stays(data, folder):
    def failing(images):
        if data.calls["encode"] == 5:
            raise NumericsError("the VAE gave NaN or infinity in encoding", hint="try --dtype fp32")
        return Data.encode(data, images)

    said = r"2\.png: the VAE gave NaN .*; try --dtype fp32"
    with Cache(folder, "vae", "text") as cache, pytest.raises(NumericsError, match=said):
        cache.prepare(data.samples(), data.open, failing, data.embed)
    with Cache(folder, "vae", "text") as cache:
        assert data.prepare(cache).kept == 13 + 5


def test_equal_images_share_an_entry_and_either_will_do(data, folder):
    data.images[5] = data.images[0].copy()

    def opened(i):
        if i == 0:
            raise DataError("is gone", where="0.png")
        return data.open(i)

    told = []
    with Cache(folder, "vae", "text") as cache:
        found = cache.prepare(data.samples(), opened, data.encode, data.embed, failed=lambda *f: told.append(f[0]))
        assert (found.made, found.failed, told) == (23, 0, [0])
        data.check(cache)


def test_disk_use_is_announced_and_asked_for_before_the_work(data, folder, capsys, monkeypatch):
    with Cache(folder, "vae", "text") as cache:
        found = data.prepare(cache)
    said = capsys.readouterr().err
    (captions,) = re.findall(rf"cache: 13 captions to prepare, ([\d.]+) kB in {folder} \([\d.]+ GB free\)", said)
    assert 0 < float(captions) < 1000 and "cache: 12 latents to prepare" in said

    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=found.bytes // 2))
    with Cache(folder / "small", "vae", "text") as cache, pytest.raises(ResourceError, match="are needed"):
        data.prepare(cache)
    assert data.calls["encode"] + data.calls["embed"] <= 15


def test_the_announced_size_is_that_of_the_shards(folder, monkeypatch):
    """Images of several sizes: told from the first of them, by their areas, within the headers' room."""
    data, told = Data(30), {}
    monkeypatch.setattr(Cache, "_announce", lambda cache, what, count, needed: told.update({what: needed}))
    with Cache(folder, "vae", "text") as cache:
        found = data.prepare(cache)
    assert 0.9 * found.bytes < sum(told.values()) < 1.6 * found.bytes  # tiny entries: headers are half of it


def test_memory_is_bounded_by_the_shards_size(folder):
    """150 images of 60 KB of latents each, 9 MB, through shards of half a MB."""

    def wide(images):
        mean = images.mean().expand(1, 120, 8, 8) + torch.arange(120.0)[:, None, None]
        return mean, mean.abs() + 1

    size = Size(32, 32)
    views = fixed_views(size, size, TransformConfig())
    samples = [CachedSample(f"{i}", f"{i}", views, (f"{i}",)) for i in range(150)]
    with Cache(folder, "vae", "text", shard_bytes=1 << 19) as cache:
        tracemalloc.start()
        cache.prepare(samples, lambda i: (Image.new("RGB", (32, 32), (i % 256, 0, 0)), f"{i}"), wide, embed)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    written = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert sum(written) > 9e6 and max(written) <= 1 << 19 and peak < 2 << 20


def slowly(data, folder, seconds):
    """Prepare with a shard each `seconds`, 20 ms an image; the first one leaves a file `begun` beside the folder."""

    def work():
        def slow(images):
            (folder.parent / "begun").touch()
            time.sleep(0.02)
            return encode(images)

        with Cache(folder, "vae", "text") as cache:
            cache._shards.seconds = seconds
            cache.prepare(data.samples(), data.open, slow, embed)

    return work


def test_killed_at_any_moment_it_goes_on_where_it_was(folder):
    """SIGKILL again and again until it is done: what a killed process wrote is never made twice, and all is right."""
    data, draw, before, kills = Data(8), random.Random(0), 0, 0
    while True:
        pid = in_child(slowly(data, folder, seconds=0.03))
        time.sleep(draw.uniform(0.01, 0.03 * (1 + kills)))
        os.kill(pid, signal.SIGKILL)
        code = status_of(pid)
        with Cache(folder, "vae", "text") as cache:
            there = len(cache._shards.known())
        assert there >= before and code in (0, -signal.SIGKILL)
        if code == 0:
            break
        before, kills = there, kills + 1
    assert kills >= 3
    with Cache(folder, "vae", "text") as cache:
        assert data.prepare(cache).made == 0
        data.check(cache)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_what_is_done(folder, number):
    data = Data(200)
    pid = in_child(slowly(data, folder, seconds=60))
    while not (folder.parent / "begun").exists():
        time.sleep(0.01)
    time.sleep(0.4)
    os.kill(pid, number)
    assert status_of(pid) == 128 + number
    with Cache(folder, "vae", "text") as cache:
        assert len(list(folder.glob("*.safetensors"))) == 1 and 0 < len(cache._shards.known()) < 801


def test_two_processes_on_one_cache_are_refused(data, prepared):
    with Cache(prepared, "vae", "text") as cache:
        assert status_of(in_child(slowly(data, prepared, seconds=60))) == 4
        data.check(cache)
