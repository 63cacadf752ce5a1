"""Every stage reads through one dataset class, and training from nothing has what fine-tuning has.

Counts come first; then buckets, several captions, the cache or live encoding, images held out by their content."""

import importlib
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from ldm.cli import main
from ldm.training import read_settings, train
from ldm.training.data import ImageDataset
from ldm.training.settings import SETTINGS, UNetSettings, as_dict, changed
from tests.training.conftest import SCHEDULE, TINY_UNET, threads
from tests.training.finetune_cases import SIZE, apart, last_tensors, pictures, run
from tests.training.processes import together
from tests.training.test_stages import AUTOENCODER

QUICK = {"stage": "unet", "steps": 3, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32", "device": "cpu"}
QUICK |= {"sample_steps": 1, "schedule": SCHEDULE, "model": TINY_UNET, "validate_every": 3, "warmup": 0}


@pytest.mark.parametrize("stage", SETTINGS)
def test_all_stages_import_one_dataset_class(stage):
    module = importlib.import_module(f"ldm.training.stages.{stage}")
    names = ("PixelDataset", "ControlDataset", "ImageDataset")  # the first two add pixels, and conditions
    own = next(getattr(module, name) for name in names if hasattr(module, name))
    assert own is ImageDataset or own.__base__ is ImageDataset
    source = Path(module.__file__).read_text()
    readers = re.findall(r"from ldm\.(?:training\.data\.|data\.(?!transforms))(\w+)", source)
    assert set(readers) <= {"encoded", "emoji", "trajectories"}  # synonyms to judge text by, trajectories of a teacher


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Sixty images in four class folders, wide and tall, some with two captions."""
    root = tmp_path_factory.mktemp("classes") / "images"
    for c, name in enumerate(("ant", "bee", "cow", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(15):
            size = (48, 32) if i % 2 else (32, 40)
            Image.new("RGB", size, (60 * c, 15 * i, 99)).save(root / name / f"{i}.png")
            (root / name / f"{i}.txt").write_text(f"a {name}\n" + (f"number {i}\n" if i % 3 else ""))
    return root


def trained(out, classes, parts, *words):
    config = out.parent / "unet.json"
    config.write_text(json.dumps({**QUICK, "vae": str(parts), "text": str(parts), "data": {"resolution": 32}}))
    with threads(1):
        return train(config, out, [f"data={classes}", *words])


def test_images_are_counted_and_held_out_by_their_content(classes, parts, tmp_path, capsys):
    trained(tmp_path / "run", classes, parts, "data.held_out=0.2")
    said = capsys.readouterr().err
    assert "60 found: 60 used, 0 skipped" in said and "100 captions; 0 missing, 0 empty" in said
    train_on, held = map(int, re.search(r"(\d+) images to train on, (\d+) held out", said).groups())
    assert train_on + held == 60 and 4 <= held <= 24
    assert said.index("60 found") < said.index("cache: ")
    assert (tmp_path / "run" / "cache" / "index.json").is_file()
    inputs = json.loads((tmp_path / "run" / "versions.json").read_text())["inputs"]
    assert set(inputs) >= {"vae", "text", "data"}


def test_no_class_is_left_out_of_the_training(classes):
    from ldm.training.data import read_images
    from ldm.training.settings import DataSettings

    images = read_images(DataSettings(folder=str(classes), resolution=32, held_out=0.2))
    held = {item.id for item in images.items if item.digest in images.held_out}
    assert {id.split("/")[0] for id in held} != {"dog"} and len(held) > 3
    kept = {images.items[place].id.split("/")[0] for place in images.trained}
    assert kept == {"ant", "bee", "cow", "dog"}


def test_cached_and_live_runs_are_one_and_the_same(classes, parts, tmp_path):
    runs = {"cached": [], "live": ["data.cache=off", "data.workers=2"]}
    for name, words in runs.items():
        trained(tmp_path / name, classes, parts, *words)
    one, two = ((tmp_path / name / "checkpoints/step-00000003/state.safetensors").read_bytes() for name in runs)
    assert one == two


def test_random_crops_need_no_cache(classes, parts, tmp_path):
    model = trained(tmp_path / "run", classes, parts, "data.cache=off", "data.crop=random", "data.flip=0.5", "steps=1")
    assert (model / "model_index.json").is_file() and not (tmp_path / "run" / "cache").exists()


def test_a_run_from_before_goes_on_with_its_settings():
    words = ["vae=x", "text=x", "caption_dropout=0.3"]
    settings = read_settings("emoji/unet", words)
    assert isinstance(settings, UNetSettings) and settings.data.caption_dropout == 0.3
    before = as_dict(settings)
    scenes = {name: before["data"][name] for name in ("folder", "resolution", "font", "scenes")}
    old = {**before, "data": scenes, "caption_dropout": 0.3}
    assert changed(old, settings) == {}
    assert list(changed({**old, "caption_dropout": 0.2}, settings)) == ["data"]


@pytest.mark.parametrize("case", ["images", "scenes", "autoencoder"])
def test_two_processes_train_as_one(case, classes, parts, tmp_path):
    settings = {**QUICK, "vae": str(parts), "text": str(parts), "data": {"resolution": 32, "folder": str(classes)}}
    if case == "autoencoder":
        settings = {**AUTOENCODER, "data": settings["data"], "crop_until": 0.5, "batch_size": 6}
    if case == "scenes":
        settings |= {"data": {"resolution": 32}, "latent_pool": 256, "renew": 2, "workers": 0, "validation": 4}
    settings |= {"steps": 2, "optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "accumulation": 2}
    (tmp_path / "stage.json").write_text(json.dumps(settings))
    with threads(1):
        train(tmp_path / "stage.json", tmp_path / "one")
        assert together(2, lambda rank: train(tmp_path / "stage.json", tmp_path / "two") and 0) == [0, 0]
    assert apart(last_tensors(tmp_path / "two"), last_tensors(tmp_path / "one")) < 1e-5


def masked_pictures(folder):
    """Twelve images of noise, of which masks show the upper third: files beside ten, alpha channels of two."""
    pictures(folder, 12)
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(255, (0, 0, SIZE, SIZE // 3))
    for i in range(12):
        if i < 10:
            mask.save(folder / f"{i}-mask.png")
        else:
            picture = Image.open(folder / f"{i}.png")
            picture.putalpha(mask)
            picture.save(folder / f"{i}.png")
    return folder


def test_masks_train_live_as_from_the_cache_and_matter(parts, tiny_folder, tmp_path):
    folder, ends = masked_pictures(tmp_path / "images"), {}
    for name, words in (("disk", "data.cache=null"), ("live", "data.cache=off"), ("plain", "data.masks=false")):
        trained(tmp_path / name, folder, parts, "data.masks=true", words)
        ends[name] = last_tensors(tmp_path / name), score(tmp_path / name)
    assert apart(ends["live"][0], ends["disk"][0]) == 0 and ends["live"][1] == ends["disk"][1]
    assert apart(ends["plain"][0], ends["disk"][0]) > 1e-4 and abs(ends["plain"][1] - ends["disk"][1]) > 1e-4


def test_masks_finetune(tiny_folder, tmp_path):
    folder, ends = masked_pictures(tmp_path / "images"), []
    for masks in (True, False):
        out = tmp_path / f"masks-{masks}"
        run(folder, out, tiny_folder, steps=2, validate_every=2, masks=masks, cache="off", held_out=0.1)
        ends.append((last_tensors(out), score(out)))
    assert apart(ends[0][0], ends[1][0]) > 1e-4 and abs(ends[0][1] - ends[1][1]) > 1e-4


def score(out):
    return json.loads((out / "scores.jsonl").read_text().splitlines()[-1])["validation_loss"]


def test_masks_are_refused_where_they_mean_nothing(classes, parts, tmp_path, capsys):
    for stage, words, said in (
        ("unet", ["data.masks=true"], "masks: is for images: give data=FOLDER too"),
        ("text", ["data.masks=true", f"data={classes}", "vae=default"], "data.masks: is for the U-Net"),
        ("unet", ["data.masks=true", f"data={classes}"], "none of its images has a mask"),
    ):
        words += ["vae=default", "text=default"] if stage == "unet" else []
        code = main(["train", f"emoji/{stage}", "-o", str(tmp_path / "run"), *words])
        error = capsys.readouterr().err
        assert code in (2, 3) and said in error and not (tmp_path / "run").exists(), error


def test_images_of_an_autoencoder_too_have_the_same_weight_in_a_step(classes, tmp_path):
    """The last batch of an epoch is smaller: a lone image would weigh as much as a whole batch."""
    from ldm.training.data import read_images
    from ldm.training.stages.autoencoder import open_stage

    data = {"folder": str(classes), "resolution": 32, "square": True, "cache": "off", "held_out": 0.0}
    given = {**AUTOENCODER, "data": data, "batch_size": 14, "accumulation": 3, "steps": 4, "crops": 1, "crop": 0}
    given["model"] = {**given["model"], "mid_block_add_attention": True}  # whose norm has three dimensions
    (tmp_path / "stage.json").write_text(json.dumps(given))
    settings = read_settings(tmp_path / "stage.json", [])
    stage = open_stage(settings, tmp_path, read_images(settings.data))
    batches = list(stage.batches(0))
    sizes = [len(batch.pixels) for batch in batches]
    assert len(batches) == 12 and len(set(sizes)) > 1
    for step in range(4):
        own = batches[3 * step : 3 * step + 3]
        total = sum(len(batch.pixels) for batch in own)
        assert all(abs(batch.weight / 3 / len(batch.pixels) - 1 / total) < 1e-12 for batch in own)
    last = batches[sizes.index(min(sizes))]
    assert stage.loss(last, 0, 0).item() == pytest.approx(
        last.weight * stage.loss(last._replace(weight=1.0), 0, 0).item()
    )
