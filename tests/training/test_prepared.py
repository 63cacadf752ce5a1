"""A dataset that is encoded once: what is stored, how it goes on, and the batches that come out of it."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm import files
from ldm.cli import main
from ldm.data.cache.prepared import FORMAT, REPEATED, PartWriter, Row, list_shards, read_info, read_shard
from ldm.data.cache.sequence import ShardSequence
from ldm.device import fast_bf16, pick_device
from ldm.errors import CheckpointError, ConfigError, DataError, LdmError, ResourceError
from ldm.training import cache, finetune, train
from ldm.training.checkpoints import state
from ldm.training.data import ImageDataset, PreparedSet, read_training_images
from ldm.training.data.encoded import Encoders
from ldm.training.settings import DataSettings, FinetuneData
from tests.training.conftest import SCHEDULE, TINY_UNET, threads


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve images of two shapes, one with two captions; one more that is no image."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), dtype=np.uint8)
    for i, array in enumerate(pixels):
        Image.fromarray(array if i % 3 else array[:32]).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text("a cat\na red cat" if i == 5 else f"a dog {'and a cat ' * (i % 2)}on red")
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (folder / "bad.txt").write_text("a cat")
    return folder


@pytest.fixture(scope="module")
def made(parts, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "cache"
    return cache(images, out, str(parts), str(parts), resolution=32, embeddings="yes", dtype="fp32", **LOOSE)


LOOSE = {"max_bad": 1, "held_out": 0.3, "batch_size": 3}


@pytest.fixture(scope="module")
def encoders(parts):
    from ldm.checkpoint.parts import find_text, find_vae

    vae, text = find_vae(str(parts)), find_text(str(parts))
    return Encoders(vae.load(), text.load(), (vae.fingerprint, " ".join(text.fingerprints)), pick_device("cpu"))


def dataset(folder, encoders, batch_size=4, dropout=0.0):
    images = PreparedSet(DataSettings(folder=str(folder), resolution=32, caption_dropout=dropout))
    return ImageDataset(images, encoders, 0, batch_size, folder)


def test_every_image_comes_once_an_epoch_with_its_own_latents_and_embedding(made, images, encoders):
    from ldm.data.transforms import fixed_views, pixels, to_float

    data = dataset(made, encoders)
    epochs, number = {}, 0
    while (rows := data._reader.sequence.at(number)).epoch < 2:
        epochs.setdefault(rows.epoch, []).append((number, rows.ids))
        number += 1
    ids = [sorted(id for _, some in epoch for id in some) for epoch in epochs.values()]
    assert ids[0] == ids[1] and len(ids[0]) == data.samples == len(set(ids[0]))
    assert [some for _, some in epochs[0]] != [some for _, some in epochs[1]]
    held = [id for batch in data.held_out() for id in batch.ids]
    assert held and sorted(held + ids[0]) == [f"{i:02}.png" for i in range(12)]
    batch = data.batch(0)
    again = dataset(made, encoders).batch(0)
    assert torch.equal(batch.latents, again.latents) and batch.captions == again.captions
    rows = data._reader.sequence.at(0)
    with Image.open(images / rows.ids[0]) as image:
        from ldm.data.buckets import Size, bucket_of
        from ldm.training.settings import FinetuneData

        size = Size(image.height, image.width)
        bucket = bucket_of(size, FinetuneData(folder="x", resolution=32).buckets)
        (view,) = fixed_views(size, bucket, FinetuneData(folder="x").transform)
        mean, std = encoders.encode(to_float(pixels(image.convert("RGB"), view))[None])
    close = 0.02 if fast_bf16(pick_device("cpu")) else 1e-4  # `ldm data cache` encodes in bf16 where that is faster
    assert torch.allclose(rows.mean[0], mean[0], atol=close) and torch.allclose(rows.std[0], std[0], atol=close)
    expected = encoders.text.encode(batch.captions).states
    assert torch.allclose(batch.cond.states, expected, atol=1e-5)


def test_a_caption_is_chosen_or_dropped_in_each_epoch(made, encoders):
    data, seen = dataset(made, encoders, batch_size=1), set()
    for number in range(200):
        if data._reader.sequence.at(number).ids == ["05.png"]:
            seen |= set(data.batch(number).captions)
    assert seen == {"a cat", "a red cat"} or "05.png" in [i for b in data.held_out() for i in b.ids]
    dropped = dataset(made, encoders, dropout=1.0).batch(0)
    assert set(dropped.captions) == {""}
    assert torch.allclose(dropped.cond.states[0], encoders.text.encode([""]).states[0], atol=1e-5)


def test_captions_are_encoded_in_training_where_embeddings_would_be_larger_than_the_images(
    images, parts, made, encoders, tmp_path, capsys
):
    flat = tmp_path / "flat"  # images of some bytes, and captions that are not
    flat.mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (60 * i, 0, 0)).save(flat / f"{i}.png")
        (flat / f"{i}.txt").write_text(f"a cat {i}")
    for source, chosen, told in (
        (images, True, "embeddings of the captions take"),
        (flat, False, "captions are kept as text: their embeddings would take"),
    ):
        out = cache(source, tmp_path / f"kept-{chosen}", str(parts), str(parts), resolution=32, dtype="fp32", **LOOSE)
        said = capsys.readouterr().err
        assert read_info(out)["embeddings"] is chosen and told in said, said
        assert "latents take" in said and said.index("are free") < said.index("images found")
    assert dataset(out, encoders).batch(0).cond is not None
    out = cache(images, tmp_path / "none", str(parts), resolution=32, dtype="fp32", **LOOSE)
    live, stored = dataset(out, encoders).batch(1), dataset(made, encoders).batch(1)
    assert not read_info(out)["embeddings"] and live.captions == stored.captions
    assert torch.equal(live.latents, stored.latents)
    assert torch.allclose(live.cond.states, stored.cond.states, atol=1e-5)


def test_parts_of_several_machines_are_the_whole_and_go_on_after_a_stop(images, parts, made, encoders, tmp_path):
    settings = {"resolution": 32, "dtype": "fp32", "embeddings": "no", **LOOSE}
    out = tmp_path / "cache"
    cache(images, out, str(parts), shard="2/3", **settings)
    partly = dataset(out, encoders)
    assert 0 < partly.samples < 12 and "as far as they are made" in partly.lines[1]
    info = json.loads((out / "prepared.json").read_text())
    (out / "prepared.json").write_text(json.dumps({k: v for k, v in info.items() if k != "masks"}))  # as it once was
    cache(images, out, str(parts), shard="1/3", **settings)
    cache(images, out, str(parts), shard="3/3", **settings)
    names = sorted(id for shard in list_shards(out) for id in ids(shard.path))
    assert names == [f"{i:02}.png" for i in range(12)]
    victim = list_shards(out)[0].path
    lost = ids(victim)
    victim.write_bytes(victim.read_bytes()[:-3] + b"abc")
    with pytest.raises(DataError, match="is damaged or gone; run ldm data cache again"):
        read_shard(victim)
    before = {shard.path: shard.path.stat().st_mtime_ns for shard in list_shards(out) if shard.path != victim}
    number = int(victim.parent.name.split("-")[1])
    cache(images, out, str(parts), shard=f"{number}/3", **settings)
    assert sorted(id for shard in list_shards(out) for id in ids(shard.path)) == names and lost
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def ids(path):
    return [id for id, _ in json.loads(bytes(read_shard(path)["captions"].numpy()))]


def test_a_full_disk_keeps_what_is_done(images, parts, encoders, tmp_path, monkeypatch):
    write, count = files.atomic_write, []

    def full(path, data, *args, **options):
        if path.suffix == ".safetensors":
            count.append(path)
            if len(count) > 1:
                raise ResourceError("No space left on device", where=path)
        return write(path, data, *args, **options)

    settings = {"resolution": 32, "embeddings": "no", **LOOSE}
    monkeypatch.setattr(files, "atomic_write", full)
    with pytest.raises(ResourceError, match="No space left"):
        cache(images, tmp_path / "cache", str(parts), **settings)
    monkeypatch.undo()
    assert len(list_shards(tmp_path / "cache")) == 1
    cache(images, tmp_path / "cache", str(parts), **settings)
    names = sorted(id for shard in list_shards(tmp_path / "cache") for id in ids(shard.path))
    assert names == [f"{i:02}.png" for i in range(12)]


def test_masks_are_files_beside_images_or_alpha_channels(images, parts, encoders, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    upper = Image.new("L", (32, 32))
    upper.paste(255, (0, 0, 32, 16))
    picture = Image.open(images / "01.png").convert("RGB").resize((32, 32))
    picture.save(folder / "file.png")
    upper.save(folder / "file-mask.png")
    picture.save(folder / "none.png")
    picture.putalpha(upper)
    picture.save(folder / "alpha.png")
    for name in ("file", "none", "alpha"):
        (folder / f"{name}.txt").write_text("a cat")
    settings = {"resolution": 32, "embeddings": "no", "held_out": 0.0}
    out = cache(folder, tmp_path / "cache", str(parts), masks=True, **settings)
    batch = dataset(out, encoders).batch(0)
    half = torch.tensor([[1.0] * 4] * 2 + [[0.0] * 4] * 2)
    masks = dict(zip(batch.ids, batch.mask[:, 0]))
    assert torch.equal(masks["file.png"], half) and torch.equal(masks["alpha.png"], half)
    assert torch.equal(masks["none.png"], torch.ones(4, 4))
    assert dataset(cache(folder, tmp_path / "plain", str(parts), **settings), encoders).batch(0).mask is None
    Image.new("L", (16, 32)).save(folder / "none-mask.png")
    with pytest.raises(DataError, match="its mask is of another size"):
        cache(folder, tmp_path / "other", str(parts), masks=True, max_bad=0, **settings)


def test_kohyas_folders_repeat_their_images_as_they_do_without_a_cache(images, parts, encoders, tmp_path, capsys):
    folder = tmp_path / "images"
    for name, numbers in (("3_dog", (1, 2)), ("1_cat", (4, 5, 7)), ("0_off", (8,))):
        (folder / name).mkdir(parents=True)
        for number in numbers:
            Image.open(images / f"{number:02}.png").save(folder / name / f"{number}.png")
    settings = {"resolution": 32, "held_out": 0.0}
    out = cache(folder, tmp_path / "cache", str(parts), embeddings="no", **settings)
    assert "cache: 5 images at 32 px; 9 samples an epoch, repeats counted; latents take" in capsys.readouterr().err
    assert read_info(out)["format"] == REPEATED
    assert sorted((shard.rows, shard.samples) for shard in list_shards(out)) == [(5, 9)]
    live = read_training_images(FinetuneData(folder=str(folder), **settings))
    expected = Counter(live.items[place].id for place in live.trained)
    assert expected == {"3_dog/1.png": 3, "3_dog/2.png": 3, "1_cat/4.png": 1, "1_cat/5.png": 1, "1_cat/7.png": 1}
    data = dataset(out, encoders, batch_size=2)
    assert data.samples == 9 and data.lines[1] == "5 images: 5 to train on, 0 held out; an epoch has 9 samples"
    for epoch in range(2):
        batches = [data.batch(5 * epoch + number) for number in range(5)]
        found = [(id, row) for batch in batches for id, row in zip(batch.ids, batch.latents)]
        assert Counter(id for id, _ in found) == expected
        rows = [tuple(row.flatten().tolist()) for _, row in found]
        assert len(set(rows)) == 9  # each with noise of its own
    info = json.loads((out / "prepared.json").read_text())
    (out / "prepared.json").write_text(json.dumps({**info, "format": FORMAT}))
    with pytest.raises(ConfigError, match="was made without the repeats of kohya's folders; choose a new folder"):
        cache(folder, out, str(parts), embeddings="no", **settings)


def test_what_does_not_fit_is_one_line(images, parts, made, encoders, tmp_path, capsys):
    words = ["data", "cache", str(images), "-o", str(tmp_path / "c"), "--vae", str(parts), "--resolution", "32"]
    assert main(words) == 2 and "1 of 13 images cannot be used" in capsys.readouterr().err
    again = {"embeddings": "yes", "dtype": "fp32", **LOOSE}
    with pytest.raises(ConfigError, match="was made with resolution 32, not 64"):
        cache(images, made, str(parts), str(parts), resolution=64, **again)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    for options, said in (
        ({"out": tmp_path / "other"}, "holds something else than a cache"),
        ({"flip": 0.5}, "one view of each image"),
        ({"shard": "4/3"}, "is no shard"),
        ({"embeddings": "yes"}, "needs a text encoder"),
        ({"batch_sise": 3}, "did you mean"),
        ({"max_bad": 0}, "1 of 13 images cannot be used"),
    ):
        out = options.pop("out", tmp_path / "cache")
        with pytest.raises(LdmError, match=said):
            cache(images, out, str(parts), resolution=32, **{"max_bad": 1, **options})
    with pytest.raises(DataError, match="was made with another autoencoder"):
        dataset(made, other(encoders, 0))
    with pytest.raises(DataError, match="was made with another text encoder"):
        dataset(made, other(encoders, 1))


def other(encoders, part):
    """The same encoders with another fingerprint of one of them."""
    ids = tuple("x" if i == part else id for i, id in enumerate(encoders.ids))
    return Encoders(encoders.vae, encoders.text, ids, encoders.device)


def unet(made, parts, out, *words, **options):
    settings = {"stage": "unet", "steps": 4, "batch_size": 2, "accumulation": 2, "learning_rate": 1e-3, "warmup": 1}
    settings |= {"workers": 0, "device": "cpu", "precision": "fp32", "save_every": 99, "sample_steps": 1, "ema": 0.5}
    settings |= {"schedule": SCHEDULE, "model": TINY_UNET, "data": {"resolution": 32}, "vae": str(parts)}
    (made.parent / "unet.json").write_text(json.dumps({**settings, "text": str(parts)}))
    with threads(1):
        return train(made.parent / "unet.json", out, [f"data={made}", *words], **options)


def test_a_unet_is_trained_on_it_and_resumes_to_the_bit(made, parts, tmp_path):
    model = unet(made, parts, tmp_path / "whole")
    assert ldm.Pipeline("a cat", model=model).generate(num_inference_steps=1)[0].size == (32, 32)
    assert "validation_loss" in (tmp_path / "whole/scores.jsonl").read_text()
    unet(made, parts, tmp_path / "halves", "steps=1", "decay_from=1")
    unet(made, parts, tmp_path / "halves", "steps=4", "decay_from=1", resume="latest")
    unet(made, parts, tmp_path / "other", "steps=4", "decay_from=1")
    one, other = (state.checkpoints(tmp_path / run)[-1] / state.WEIGHTS for run in ("other", "halves"))
    assert one.read_bytes() == other.read_bytes()
    with pytest.raises(ConfigError, match=r"data.resolution: is 64, and .* was made at 32 px"):
        unet(made, parts, tmp_path / "run", "data.resolution=64")
    with pytest.raises(DataError, match="holds latents for ldm train; give the images that it was made of"):
        finetune(made, tmp_path / "run")
    with pytest.raises(DataError, match="holds latents, which the stage unet reads"):
        train("emoji/autoencoder", tmp_path / "run", [f"data={made}"])


def test_more_shards_than_when_the_run_began_are_noticed(made, parts, images, tmp_path):
    part = cache(images, tmp_path / "cache", str(parts), shard="1/2", resolution=32, embeddings="no", **LOOSE)
    unet(part, parts, tmp_path / "run", "steps=1")
    cache(images, part, str(parts), shard="2/2", resolution=32, embeddings="no", **LOOSE)
    with pytest.raises(CheckpointError, match=r"the data is not the one .* --allow-changed data"):
        unet(part, parts, tmp_path / "run", "steps=2", resume="latest")
    unet(part, parts, tmp_path / "run", "steps=2", resume="latest", allow_changed=["data"])


def synthetic(folder, count):
    """A part of so many rows of 4x2x2 latents."""
    mean, std = torch.zeros(4, 2, 2, dtype=torch.bfloat16), torch.ones(4, 2, 2, dtype=torch.bfloat16)
    with PartWriter(folder / "part-1-of-1") as writer:
        for i in range(count):
            writer.put(Row(i, str(i), ("a cat",), (16, 16, 0, 0, 16, 16), mean, std))
        writer.flush()


def test_no_more_than_two_windows_are_in_memory(tmp_path):
    synthetic(tmp_path, 3 * 4096)
    size = list_shards(tmp_path)[0].path.stat().st_size
    data = ShardSequence(list_shards(tmp_path), 256, 0, 2 * size)
    for number in range(200):
        data.at(number)
        windows = [future.result() for future in data._loaded.values()]
        assert len(windows) <= 2 and max(len(window.tensors) for window in windows) <= 2
    data.close()


@pytest.mark.slow
def test_a_million_rows_take_little_memory_and_the_first_batch_little_time(tmp_path):
    """The figures are printed: run it with -s."""
    synthetic(tmp_path, 1_000_000)
    program = """
import resource, sys, time
from ldm.data.cache.prepared import list_shards
from ldm.data.cache.sequence import ShardSequence
import torch
base, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
data = ShardSequence(list_shards(sys.argv[1]), 256, 0)
first = data.at(0)
took = time.monotonic() - began
for number in range(1, 1000):
    data.at(number)
print(data.samples, len(first.ids), took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1e6)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    samples, rows, seconds, gigabytes = map(float, done.stdout.split())
    print(f"first batch after {seconds:.2f} s, {gigabytes:.2f} GB beside the libraries")
    assert samples == 1_000_000 and rows == 256 and seconds < 30 and gigabytes < 1


def test_small_windows_give_the_same_rows_in_another_order(tmp_path):
    synthetic(tmp_path, 9_000)
    shards, seen = list_shards(tmp_path), []
    for window in (1, 1 << 30):
        data = ShardSequence(shards, 100, 3, window)
        rows = [data.at(number) for number in range(data._windows(0)[1][-1])]
        assert all(r.epoch == 0 for r in rows) and data.at(len(rows)).epoch == 1
        seen.append([id for r in rows for id in r.ids])
        data.close()
    assert sorted(seen[0]) == sorted(seen[1]) == sorted(map(str, range(9_000))) and seen[0] != seen[1]
