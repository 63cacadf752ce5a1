"""The dataset of a fine-tuning: what it counts and refuses, and batches that are a function of their number alone."""

import collections
import dataclasses
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.transforms import TransformConfig, fixed_views, pixels, to_float
from ldm.errors import ConfigError, DataError, NumericsError
from ldm.nn.text import ClipText, XLText
from ldm.training.data import ImageDataset, read_images
from ldm.training.data.encoded import Encoders, Memory
from ldm.training.data.images import held_out
from ldm.training.settings import OFF, FinetuneData
from tests.conftest import tiny_text, tiny_vae

CPU, IDS = torch.device("cpu"), ("vae", "text")
SIZES = ((32, 32), (48, 32), (32, 60))  # width, height


@pytest.fixture(scope="module")
def networks():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_vae(), tiny_text()


def drawing(seed, size=(32, 32)):
    noise = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def write(folder, i, captions=None):
    drawing(i, SIZES[i % 3]).save(folder / f"{i:02d}.png")
    (folder / f"{i:02d}.txt").write_text(captions or f"a cat and {i}\na red {i}")


@pytest.fixture
def folder(tmp_path):
    """20 pictures of three shapes with two captions each."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(20):
        write(folder, i)
    return folder


@pytest.fixture
def opened(folder, tmp_path, networks):
    """A function (settings…) -> ImageDataset of the folder, at 32 px in batches of 3."""

    def open_it(vae=None, text=None, seed=0, batch_size=3, run="run", device=CPU, texts=True, xl=False, **settings):
        data = FinetuneData(**{"folder": str(folder), "resolution": 32, **settings})
        vae, text = vae or networks[0], text or networks[1]
        images = read_images(data, text.truncated)
        encoders = Encoders(vae, text, IDS, device)
        return ImageDataset(images, encoders, seed, batch_size, tmp_path / run, texts, xl)

    return open_it


def state(folder):
    return {str(p): (p.lstat().st_mtime_ns, p.read_bytes()) for p in sorted(Path(folder).rglob("*"))}


def bits(batch):
    cond = () if batch.cond is None else (batch.cond.states, batch.cond.pooled, batch.cond.mask)
    tensors = [batch.latents, batch.time_ids, *cond]
    told = [None if t is None else (tuple(t.shape), t.dtype, t.numpy().tobytes()) for t in tensors]
    return told, batch.captions, batch.ids


class Counting:
    """A network that counts how often it is asked."""

    def __init__(self, network, names=("moments", "encode")):
        self.network, self.names, self.calls = network, names, 0

    def __getattr__(self, name):
        self.calls += name in self.names
        return getattr(self.network, name)

    def to(self, *args):
        self.network.to(*args)
        return self


def test_batches_are_a_function_of_their_number(opened):
    """Whatever was asked before, by whom, from the cache or live: the same bits."""
    first = opened(flip=0.5)
    numbers = [*range(10), 1000, 17, 3]
    expected = {number: bits(first.batch(number)) for number in numbers}
    again, live = opened(flip=0.5), opened(flip=0.5, cache=OFF, workers=2)
    idle = opened(flip=0.5, cache=OFF, workers=0)
    random.Random(0).shuffle(numbers)
    for number in numbers:
        assert bits(again.batch(number)) == bits(live.batch(number)) == bits(idle.batch(number)) == expected[number]
    assert len({str(told) for told in expected.values()}) == len(expected)
    assert bits(opened(flip=0.5, seed=1).batch(3)) != expected[3]
    assert bits(first.held_out()[0]) == bits(live.held_out()[0])


def test_every_sample_comes_once_an_epoch_times_its_repeats(opened, folder):
    dataset = opened(held_out=0.0)
    for epoch in range(3):
        numbers = range(epoch * len(dataset), (epoch + 1) * len(dataset))
        batches = [dataset.batch(number) for number in numbers]
        assert sorted(id for batch in batches for id in batch.ids) == [f"{i:02d}.png" for i in range(20)]
        assert all(len(batch.latents) == len(batch.ids) == len(batch.captions) <= 3 for batch in batches)
    assert dataset.samples == 20 and len(dataset) == 3 + 3 + 2  # 7, 7 and 6 of a shape in threes

    for i in range(20):  # kohya's repeats
        below = folder / ("4_cat" if i % 2 else "1_dog")
        below.mkdir(exist_ok=True)
        for suffix in (".png", ".txt"):
            (folder / f"{i:02d}{suffix}").rename(below / f"{i:02d}{suffix}")
    dataset = opened(held_out=0.0, caption_dropout=0.0)
    seen = collections.Counter(id for n in range(len(dataset)) for id in dataset.batch(n).ids)
    assert {(Path(id).parent.name, times) for id, times in seen.items()} == {("4_cat", 4), ("1_dog", 1)}
    assert dataset.samples == seen.total() == 50 and "an epoch has 50 samples" in dataset.lines[-1]


def test_latents_are_drawn_anew_each_epoch_and_each_time(opened, networks):
    """Around the posterior's mean, by its deviation; conditioning is that of the caption alone."""
    dataset, (vae, text) = opened(held_out=0.0, caption_dropout=0.3), networks
    drawn = collections.defaultdict(list)
    for number in range(200 * len(dataset)):
        batch = dataset.batch(number)
        for id, latents, caption, states in zip(batch.ids, batch.latents, batch.captions, batch.cond.states):
            drawn[id].append(latents)
            assert caption == "" or caption in (f"a cat and {int(id[:2])}", f"a red {int(id[:2])}")
            if number < 20:
                assert torch.equal(states, text.encode([caption or None]).states[0])
    for id in ("00.png", "04.png"):
        values = torch.stack(drawn[id])
        place = next(i for i, item in enumerate(dataset.images.items) if item.id == id)
        item = dataset.images.items[place]
        (view,) = fixed_views(item.size, item.bucket, TransformConfig())
        mean, std = vae.moments(to_float(pixels(dataset.images.read(place)[0], view))[None])
        error = (values.mean(0) - mean[0]) / std[0] * len(values) ** 0.5
        assert len(values) == 200 and error.abs().max() < 5 and error.std() < 1.3
        assert torch.allclose(values.std(0), std[0], rtol=0.3)


def test_copies_of_a_picture_get_draws_of_their_own(opened, folder):
    for i in range(1, 20):
        (folder / f"{i:02d}.png").write_bytes((folder / "00.png").read_bytes())
    dataset = opened(held_out=0.0)
    latents = torch.cat([dataset.batch(number).latents for number in range(len(dataset))])
    assert len(latents) == 20 and len({row.numpy().tobytes() for row in latents}) == 20
    assert not dataset.held_out() and not opened(held_out=0.5).held_out()  # there is one picture, to be trained on


def test_autocast_around_a_batch_changes_no_bit(opened):
    dataset = opened(cache=OFF, crop="random", shuffle_tags=True)
    expected = bits(dataset.batch(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert bits(dataset.batch(2)) == expected


def test_dropout_and_alternatives_are_live(opened):
    dataset = opened(held_out=0.0, caption_dropout=0.25)
    seen = [caption for number in range(60 * len(dataset)) for caption in dataset.batch(number).captions]
    assert 0.2 < seen.count("") / len(seen) < 0.3
    assert 0.45 < sum(caption.startswith("a red") for caption in seen) / (len(seen) - seen.count("")) < 0.55
    assert "" not in [c for n in range(8) for c in opened(caption_dropout=0.0).batch(n).captions]


def test_xl_gets_its_sizes_and_both_encoders(opened, networks):
    import transformers

    text = networks[1]
    config = transformers.CLIPTextConfig(**{**text.model.config.to_dict(), "projection_dim": 24})
    second = ClipText(transformers.CLIPTextModelWithProjection(config).eval(), text.tokenizer)
    for zeros in (True, False):
        xl = XLText(text, second, zeros)
        dataset = opened(text=xl, xl=True, caption_dropout=0.5, run="xl", flip=1.0)
        for number in range(len(dataset)):
            batch = dataset.batch(number)
            expected = xl.encode([caption or None for caption in batch.captions])
            assert torch.equal(batch.cond.states, expected.states) and torch.equal(batch.cond.pooled, expected.pooled)
            height, width = (8 * side for side in batch.latents.shape[2:])
            sizes = [SIZES[int(id[:2]) % 3][::-1] for id in batch.ids]
            assert batch.time_ids[:, :2].tolist() == [list(map(float, size)) for size in sizes]
            assert batch.time_ids[:, 4:].tolist() == [[height, width]] * len(sizes)
            assert batch.time_ids.dtype == torch.float32
    assert dataset.images.items[0].captions and opened(texts=False, xl=True).batch(0).cond is None


def test_a_text_encoder_that_is_trained_gets_captions_and_is_not_asked(opened, networks):
    text = Counting(networks[1])
    dataset = opened(text=text, texts=False)
    batch = dataset.batch(2)
    assert batch.cond is None and any(batch.captions) and text.calls == 0
    assert all(batch.cond is None and all(batch.captions) for batch in dataset.held_out())


def test_pictures_held_out_are_fixed_and_never_trained_on(opened, folder, tmp_path):
    dataset = opened(held_out=0.2, caption_dropout=0.5, flip=1.0, batch_size=2)
    batches = dataset.held_out()
    held = {id for batch in batches for id in batch.ids}
    assert 1 <= len(held) <= 8 and dataset.samples == 20 - len(held)
    trained = {id for number in range(3 * len(dataset)) for id in dataset.batch(number).ids}
    assert not held & trained and len(held | trained) == 20
    assert [bits(batch) for batch in batches] == [
        bits(batch) for batch in opened(held_out=0.2, batch_size=2).held_out()
    ]
    assert all(caption.startswith("a cat and") for batch in batches for caption in batch.captions)

    for i in range(20, 60):  # others stay where they are when pictures are added
        write(folder, i)
    (name, *_) = sorted(held)
    (folder / "copy.png").write_bytes((folder / name).read_bytes())
    (folder / "copy.txt").write_text("a copy")
    more = opened(held_out=0.2)
    now = {id for batch in more.held_out() for id in batch.ids}
    assert held | {"copy.png"} <= now and not (trained & now)
    assert not opened(held_out=0.0).held_out()


def test_how_many_are_held_out():
    names = [f"{i:064x}" for i in range(5000)]
    assert held_out(names[:7], 0.5) == set() == held_out(names, 0.0)
    assert len(held_out(names[:8], 0.001)) == 1 and len(held_out(names, 0.2)) == 64
    assert all(1 <= len(held_out(names[i : i + 24], 0.05)) <= 3 for i in range(0, 4800, 24))
    chosen = held_out(names[:1000], 0.04)
    assert 20 < len(chosen) < 60 and chosen == held_out(names[500:1000][::-1] + names[:500], 0.04)
    assert chosen - held_out(names[:900], 0.04) <= set(names[900:])


@pytest.mark.parametrize("settings", [{}, {"cache": OFF}])
def test_bad_pictures_are_counted_by_reason_and_refused_above_the_limit(opened, folder, networks, settings):
    """One of them is bad in its pixels alone, which shows when it is encoded."""
    whole = (folder / "01.png").read_bytes()
    (folder / "01.png").write_bytes(whole[:60] + bytes(100))
    (folder / "02.png").write_text("no picture")
    (folder / "03.png").write_bytes(b"")
    before = state(folder)
    dataset = opened(max_bad=3, run="bad", **settings)
    counts = dataset.images.source.counts
    assert (counts.found, counts.used, len(counts.skipped)) == (20, 17, 3)
    assert counts.reasons() == {"is damaged or cut short": 1, "is no image": 1, "is empty": 1}
    assert "20 found: 17 used, 3 skipped: " in dataset.lines[1]
    held = {id for batch in dataset.held_out() for id in batch.ids}
    seen = {id for number in range(2 * len(dataset)) for id in dataset.batch(number).ids}
    assert len(seen | held) == 17 and not {"01.png", "02.png", "03.png"} & seen
    with pytest.raises(
        DataError, match=r"3 of 20 cannot be used, 2 are allowed: .*is damaged or cut short 1"
    ) as refused:
        opened(max_bad=2, run="refused", **settings)
    assert state(folder) == before and refused.value.exit_code == 2


def refusal(opened, networks, **settings):
    """What is said of the data before a network is asked."""
    vae, text = Counting(networks[0]), Counting(networks[1])
    with pytest.raises((DataError, ConfigError)) as error:
        opened(vae, text, run="never", **settings)
    assert vae.calls == text.calls == 0 and not (settings.get("cache") or error.value.exit_code != 2)
    return str(error.value)


def test_what_is_wrong_with_the_data_is_said_before_any_network_runs(opened, folder, networks, tmp_path):
    assert "data.folder: is needed" in refusal(opened, networks, folder="")
    assert "no such folder or file" in refusal(opened, networks, folder=str(tmp_path / "none"))
    assert "bucket_step: 12 is not a multiple of the autoencoder's 8" in refusal(
        opened, networks, bucket_step=12, resolution=48
    )
    (folder / "05.txt").write_text(" ")
    (folder / "07.txt").unlink()
    said = refusal(opened, networks)
    assert "2 of 20 images have no caption (1 missing, 1 empty): 05.png, 07.png" in said
    dataset = opened(allow_empty_captions=True, held_out=0.0, caption_dropout=0.0)
    seen = dict(pair for n in range(len(dataset)) for pair in zip(dataset.batch(n).ids, dataset.batch(n).captions))
    assert [id for id, caption in seen.items() if not caption] in (["05.png", "07.png"], ["07.png", "05.png"])
    for path in folder.glob("*.txt"):
        path.rename(path.with_suffix(".text"))
    assert "20 pictures" not in (said := refusal(opened, networks)) and "have a file *.text beside them" in said
    assert "rename these files to *.txt" in said and "none" not in said
    for path in folder.glob("*.text"):
        path.unlink()
    assert "has no captions" in refusal(opened, networks, allow_empty_captions=True)
    assert not (tmp_path / "never").exists()


def test_an_edited_picture_or_caption_renews_its_own_entries_alone(opened, folder, networks):
    def calls(**settings):
        vae, text = Counting(networks[0]), Counting(networks[1])
        dataset = opened(vae, text, held_out=0.0, flip=0.5, **settings)
        return dataset, vae.calls, text.calls

    dataset, encoded, embedded = calls()
    assert (encoded, embedded) == (40, 41)
    dataset, encoded, embedded = calls()
    assert (encoded, embedded) == (0, 0)
    before = {n: bits(dataset.batch(n)) for n in range(2 * len(dataset))}
    hashes = [dataset.images.hash]
    drawing(99, SIZES[0]).save(folder / "03.png")
    dataset, encoded, embedded = calls()
    assert (encoded, embedded) == (2, 0)
    hashes.append(dataset.images.hash)
    (folder / "06.txt").write_text("a cat and 6\na dog")
    dataset, encoded, embedded = calls()
    assert (encoded, embedded) == (0, 1)
    hashes.append(dataset.images.hash)
    for number, told in before.items():
        now, ids = bits(dataset.batch(number)), told[2]
        assert now[2] == ids and (now == told or {"03.png", "06.png"} & set(ids))
    assert len(set(hashes)) == 3 and (folder / "03.png").exists()
    assert calls(cache_dtype="bf16")[1:] == (40, 41)
    texts = Counting(networks[1])
    half = opened(text=texts, held_out=0.0, flip=0.5, cache_dtype="bf16")
    batch, whole = half.batch(0), dataset.batch(0)
    assert texts.calls == 0 and batch.latents.dtype == batch.cond.states.dtype == torch.float32
    assert not torch.equal(batch.latents, whole.latents)
    assert torch.allclose(batch.latents, whole.latents, rtol=0.05, atol=0.02)


def test_a_shard_that_was_damaged_is_never_used(opened, tmp_path, networks):
    expected = {n: bits(opened().batch(n)) for n in range(8)}
    (shard,) = (tmp_path / "run" / "cache").glob("*.safetensors")
    whole, draw = shard.read_bytes(), random.Random(3)
    for _ in range(4):
        damaged = bytearray(whole)
        damaged[draw.randrange(8, len(whole))] ^= 1 << draw.randrange(8)
        shard.write_bytes(damaged)
        vae, text = Counting(networks[0]), Counting(networks[1])
        dataset = opened(vae, text)
        assert vae.calls + text.calls >= 1
        assert {n: bits(dataset.batch(n)) for n in range(8)} == expected
        for path in shard.parent.glob("*.safetensors"):
            path.unlink()
        shard.write_bytes(whole)
    dataset = opened()
    shard.write_bytes(whole[:1000] + bytes(len(whole) - 1000))  # after it was checked
    with pytest.raises(DataError, match="was damaged after it had been checked; prepare the cache again"):
        for number in range(8):
            dataset.batch(number)


def test_killed_while_it_prepares_it_goes_on_and_gives_the_same(opened, networks, one_thread):
    class Slow(Counting):
        def __getattr__(self, name):
            time.sleep(0.01 * (name == "moments"))
            return super().__getattr__(name)

    expected = bits(opened(run="whole").batch(5))
    pid = os.fork()
    if not pid:
        from ldm.data.cache import shards

        shards.Shards.__init__.__defaults__ = (shards.SHARD_BYTES, 0.03)  # seconds of work in a shard
        opened(Slow(networks[0]), run="killed")
        os._exit(0)
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    vae = Counting(networks[0])
    dataset = opened(vae, run="killed")
    assert vae.calls <= 20 and bits(dataset.batch(5)) == expected


def test_threads_that_read_ahead_do_not_mix_up_a_table_s_rows(opened, folder, tmp_path, monkeypatch):
    """A parquet file's reader remembers where it is; here each row is read by itself."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ldm.data.sources import tables

    monkeypatch.setattr(tables, "BATCH", 1)
    rows = [{"bytes": (folder / f"{i:02d}.png").read_bytes(), "path": None} for i in range(20)]
    table = tmp_path / "set.parquet"
    pq.write_table(pa.table({"image": rows, "text": [f"a cat and {i}" for i in range(20)]}), table)
    shared = {"folder": str(table), "flip": 0.5, "batch_size": 5, "held_out": 0.0}
    cached, live = opened(**shared), opened(**shared, cache=OFF, workers=4)
    for number in range(2 * len(cached)):
        assert bits(cached.batch(number)) == bits(live.batch(number))


def test_random_crops_are_live_and_a_function_of_the_number(opened, networks):
    with pytest.raises(ConfigError, match="crop: random crops cannot be cached"):
        opened(crop="random")
    first, again = (
        opened(crop="random", cache=OFF, square=True, xl=True),
        opened(crop="random", cache=OFF, square=True, xl=True, workers=0),
    )
    corners = set()
    for number in (*range(16), 3, 90):
        batch = first.batch(number)
        assert bits(batch) == bits(again.batch(number))
        corners |= {(id, *ids[2:4].tolist()) for id, ids in zip(batch.ids, batch.time_ids)}
    assert len(corners) > 25 and bits(first.held_out()[0]) == bits(opened(square=True, xl=True).held_out()[0])


def test_live_pictures_are_encoded_together_up_to_so_many_numbers(opened, monkeypatch):
    dataset, calls, encode = opened(crop="random", cache=OFF, square=True, workers=0), [], Encoders.encode
    monkeypatch.setattr(Encoders, "encode", lambda self, x: calls.append(len(x)) or encode(self, x))
    whole = dataset.batch(0)
    monkeypatch.setattr("ldm.training.data.live.ENCODED_AT_ONCE", 1)
    apart = dataset.batch(0)
    assert calls == [len(whole.ids)] + [1] * len(whole.ids) and len(whole.ids) > 1
    torch.testing.assert_close(apart.latents, whole.latents, rtol=1e-5, atol=1e-5)


def test_a_picture_that_vanishes_or_changes_is_left_out_and_too_many_stop_the_run(opened, folder, capsys):
    dataset = opened(crop="random", cache=OFF, held_out=0.0, max_bad=2, workers=1)
    whole = {n: dataset.batch(n) for n in range(len(dataset))}
    (folder / "04.png").unlink()
    drawing(77, SIZES[2]).save(folder / "05.png")
    for number, before in whole.items():
        batch = dataset.batch(number)
        kept = [i for i, id in enumerate(before.ids) if id not in ("04.png", "05.png")]
        if not kept:  # the next batch, as told below
            continue
        assert batch.ids == [before.ids[i] for i in kept]
        torch.testing.assert_close(
            batch.latents, before.latents[kept], rtol=1e-5, atol=1e-5
        )  # encoded in other company
        assert batch.captions == [before.captions[i] for i in kept]
    said = capsys.readouterr().err
    assert said.count("left out") == 2 and "04.png: cannot be opened" in said
    assert "05.png: was changed since the training began; left out" in said and set(dataset.images.lost) == {
        "04.png",
        "05.png",
    }
    (folder / "08.png").unlink()
    with pytest.raises(DataError, match="3 of 20 cannot be used, 2 are allowed"):
        for number in range(2 * len(dataset)):
            dataset.batch(number)


def test_a_batch_of_which_nothing_is_left_is_the_next_one(opened, folder):
    dataset = opened(crop="random", cache=OFF, held_out=0.0, max_bad=19, batch_size=1, workers=0)
    gone, after = dataset.batch(4).ids[0], bits(dataset.batch(5))
    (folder / gone).unlink()
    assert bits(dataset.batch(4)) == after
    for path in folder.glob("*.png"):
        path.unlink()
    with pytest.raises(DataError):
        dataset.batch(0)


def test_numbers_that_overflow_are_encoded_in_fp32(opened, networks):
    """Fault B 17: an autoencoder in 16 bits that gives NaN."""

    class Overflowing:
        dtype, factor, scaling_factor, shift_factor = torch.bfloat16, 8, 0.5, 0.0

        def __init__(self, hopeless=()):
            self.hopeless = hopeless

        def to(self, kind):
            self.dtype = kind if isinstance(kind, torch.dtype) else self.dtype
            return self

        def moments(self, images):
            if self.dtype != torch.float32 or round(images.sum().item(), 2) in self.hopeless:
                raise NumericsError("the VAE gave NaN or infinity in encoding")
            seen.append(round(images.sum().item(), 2))
            return networks[0].moments(images)

    seen: list[float] = []
    vae = Overflowing()
    dataset = opened(vae, run="half", held_out=0.0)
    assert vae.dtype == torch.bfloat16 and bits(dataset.batch(3)) == bits(opened(held_out=0.0).batch(3))
    hopeless = opened(Overflowing(seen[:1]), run="hopeless", held_out=0.0)
    counts = hopeless.images.source.counts
    assert counts.reasons() == {"the VAE gave NaN or infinity in encoding": 1} and counts.used == hopeless.samples == 19


def half_masks(folder):
    """Of the first ten images the upper half by a file, of the next five by an alpha channel; five have none."""
    for i in range(15):
        width, height = SIZES[i % 3]
        upper = Image.new("L", (width, height))
        upper.paste(255, (0, 0, width, height // 2))
        if i < 10:
            upper.save(folder / f"{i:02d}-mask.png")
        else:
            picture = drawing(i, SIZES[i % 3]).convert("RGB")
            picture.putalpha(upper)
            picture.save(folder / f"{i:02d}.png")


@pytest.mark.parametrize(
    "words", [{}, {"cache": OFF}, {"cache": OFF, "crop": "random"}], ids=["disk", "live", "random"]
)
def test_masks_come_with_their_views(words, opened, folder, capsys):
    half_masks(folder)
    dataset = opened(masks=True, flip=0.5, held_out=0.1, **words)
    assert (
        "masks: 10 files NAME-mask.png, 5 alpha channels; the other 5 images are learned as" in capsys.readouterr().err
    )
    seen = set()
    for batch in [*(dataset.batch(number) for number in range(len(dataset))), *dataset.held_out()]:
        assert batch.mask.shape == (len(batch.ids), 1, *batch.latents.shape[2:])
        for name, mask in zip(batch.ids, batch.mask[:, 0]):
            seen.add(name)
            if int(name[:2]) >= 15:
                assert (mask == 1).all()
                continue
            assert 0.3 < mask.mean() < 0.7 and (mask[0] == 1).all() and (mask[-1] == 0).all()
            assert (mask == mask.flip(1)).all()  # as wide as the image
    assert len(seen) == 20


def test_a_mask_is_mirrored_and_cropped_as_its_image(opened, folder):
    for i in range(20):
        side = Image.new("L", SIZES[i % 3])
        side.paste(255, (0, 0, 8, side.height))
        side.save(folder / f"{i:02d}-mask.png")
    straight, mirrored = (opened(masks=True, flip=flip, cache=OFF).batch(0) for flip in (0.0, 1.0))
    assert torch.equal(straight.mask, mirrored.mask.flip(3)) and not torch.equal(straight.mask, mirrored.mask)


def test_masks_that_cannot_be_used_are_counted_and_changed_ones_noticed(opened, folder, capsys):
    with pytest.raises(DataError, match="none of its images has a mask; a mask is an alpha channel"):
        opened(masks=True)
    half_masks(folder)
    plain, masked = opened(), opened(masks=True)
    assert plain.batch(0).mask is None and plain.inputs != masked.inputs
    Image.new("L", (8, 8), 255).save(folder / "00-mask.png")
    Image.new("L", SIZES[1]).save(folder / "01-mask.png")
    (folder / "02-mask.png").write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"3 of 20 cannot be used.*its mask is of another size 1; its mask shows nothing 1"
    ):
        opened(masks=True)
    capsys.readouterr()
    assert opened(masks=True, max_bad=3).samples < masked.samples
    said = capsys.readouterr().err
    assert "20 found: 17 used, 3 skipped: " in said and "its mask shows nothing 1" in said
    fresh = opened(masks=True, max_bad=4, cache=OFF, held_out=0.0)
    Image.new("L", SIZES[0], 255).save(folder / "03-mask.png")
    ids = [id for number in range(len(fresh)) for id in fresh.batch(number).ids]
    assert "03.png" not in ids and len(ids) == 16
    assert "its mask was changed since the training began" in capsys.readouterr().err


def test_tags_are_shuffled_live(opened, folder, networks):
    for path in folder.glob("*.txt"):
        path.write_text("cat, red, on, dog")
    text = Counting(networks[1])
    dataset = opened(text=text, shuffle_tags=True, keep_tags=1, caption_dropout=0.0, held_out=0.0)
    assert text.calls == 0
    seen = collections.Counter(c for n in range(40) for c in dataset.batch(n).captions)
    assert len(seen) == 6 and all(sorted(c.split(", ")) == ["cat", "dog", "on", "red"] for c in seen)
    assert all(c.startswith("cat, ") for c in seen) and min(seen.values()) > seen.total() / 12
    batch = dataset.batch(7)
    assert torch.equal(batch.cond.states, networks[1].encode(batch.captions).states)
    assert bits(batch) == bits(opened(shuffle_tags=True, keep_tags=1, caption_dropout=0.0, held_out=0.0).batch(7))
    assert "keep_tags: needs shuffle_tags" in refusal(opened, networks, keep_tags=2)


def test_lines_begin_with_counts_and_add_up(opened, folder, capsys):
    (folder / "00.txt").write_text("a cat and a dog and " * 4 + "what is cut")
    (folder / "19.png").write_bytes(b"")
    lines = opened(max_bad=1).lines
    assert "20 found: 19 used, 1 skipped: is empty 1" in lines[1] and lines[2].startswith("37 captions; 0 missing")
    assert any("1 captions are too long for the text encoder: 00.png loses" in line and "cut" in line for line in lines)
    assert sum(line.startswith("  ") for line in lines) == 3
    counts = [int(word) for word in lines[-1].split() if word.isdigit()]
    assert counts[0] + counts[1] == 19 and lines[-1].endswith(f"an epoch has {counts[0]} samples")
    said = capsys.readouterr().err
    assert said.index("20 found") < said.index("cache: ")  # before anything is encoded
    buckets = next(line for line in lines if line.startswith("buckets: "))
    assert sum(int(part.split()[1].rstrip(",;")) for part in buckets[9:].split(";")[0].split(", ")) == 19


def test_what_is_read_often_stays_in_memory_within_its_limit(opened, monkeypatch):
    dataset = opened()
    for number in range(2 * len(dataset)):
        dataset.batch(number)
    monkeypatch.setattr(dataset._reader._latents.cache, "latents", None)
    monkeypatch.setattr(dataset._reader._latents.cache, "text", None)
    bits(dataset.batch(5))

    memory, made = Memory(1000), []

    def make(i):
        made.append(i)
        return torch.zeros(100), None

    for _ in range(3):
        for i in range(5):
            assert memory.get(i, lambda i=i: make(i))[0].nbytes == 400
    assert made == [0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4] and memory.room == 200


def test_a_dataset_has_all_images_that_were_counted(folder, tmp_path, networks):
    images = read_images(FinetuneData(str(folder), resolution=32), networks[1].truncated)
    assert len(images.items) == 20 and len(images.trained) + len(images.held_out) == 20
    dataset = ImageDataset(images, Encoders(*networks, IDS, CPU), 0, 3, tmp_path / "run")
    assert dataset.images.hash == images.hash and dataset.samples == len(images.trained)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"resolution": 100}, "resolution: 100 is not a multiple of the step 8; use 96"),
        ({"resolution": 300}, "resolution: 300 is not a multiple of the step 64; use 256"),
        ({"square": True, "min_side": 64}, "square: contradicts"),
        ({"held_out": 0.9}, "held_out: must be 0 to 0.5"),
        ({"caption_dropout": -0.1}, "caption_dropout: must be 0 to 1"),
        ({"flip": 2.0}, "flip: must be 0 to 1"),
        ({"max_bad": -1}, "max_bad: must not be negative"),
        ({"bucket_step": 0}, "bucket_step: must be 1 to 8192 pixels"),
        ({"crop": "random"}, "crop: random crops cannot be cached"),
        ({"workers": -1}, "workers: must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(changes, said):
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(FinetuneData("x"), **changes)
