"""Images drawn again from their metadata: what is the same, what differs and why."""

import json
import os

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm.checkpoint import load_model
from ldm.cli import main
from ldm.errors import ConfigError
from ldm.images import Metadata, encode, read_metadata
from ldm.pipeline import Pipeline
from ldm.render.replay import golden, verify
from ldm.render.replay.replay import OF_THE_MACHINE

FAST = {"num_inference_steps": 2, "sampler": "euler", "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def drawn(tiny_folder, tmp_path_factory):
    """A folder with a.png, a.jpg and a.webp of one image."""
    folder = tmp_path_factory.mktemp("drawn")
    images = Pipeline("a red cat", tiny_folder).generate(seed=3, **FAST)
    images.metadata[0]["model"] = str(tiny_folder)  # metadata has its name, and it is not beside the image
    for suffix in ("png", "jpg", "webp"):
        images.save(folder / f"a.{suffix}")
    return folder


def changed(path, out, pixels=0, **more):
    """A copy with other metadata and, at one pixel, another value."""
    metadata = read_metadata(path)
    with Image.open(path) as image:
        array = np.asarray(image.convert("RGB")).copy()
    if pixels:
        value = int(array[0, 0, 0])
        array[0, 0, 0] = value + pixels if value < 128 else value - pixels
    own = {**metadata.ldm, **more}
    out.write_bytes(encode(Image.fromarray(array), "png", Metadata(metadata.parameters, own)))
    return out


def verdict_of(path, tolerance=0, **options):
    (verdict,) = ldm.verify(path, tolerance, **options).verdicts
    return verdict


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_image_of_now_has_the_same_bytes(drawn, suffix):
    verdict = verdict_of(drawn / f"a.{suffix}")
    assert (verdict.result, verdict.largest, verdict.causes) == ("same bytes", 0, ())


def test_pixels_that_differ_are_near_within_the_tolerance_and_different_beyond(drawn, tmp_path):
    path = changed(drawn / "a.png", tmp_path / "b.png", pixels=5)
    verdict = verdict_of(path)
    assert (verdict.result, verdict.largest) == ("different", 5) and "the file was changed" in verdict.causes[0]
    assert "different, by up to 5 of 255" in verdict.as_text()
    near = verdict_of(path, tolerance=5)
    assert near.good and "within 5 of 255" in near.as_text()
    with pytest.raises(ConfigError, match="tolerance: expected a whole number from 0 to 255"):
        ldm.verify(path, tolerance=256)


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        ({"model_hash": "0" * 64}, "was drawn by .* (hash 0000000000), this model is"),
        ({"versions": {"torch": "2.9.0", "ldm": "0.0.9"}}, "torch was 2.9.0"),
        ({"versions": {"ldm": "0.0.9"}}, "drawn by ldm 0.0.9, this is"),
        ({"cpu_capability": "AVX9"}, "cpu_capability was AVX9"),
        ({"device": "cuda:0 H200"}, "device was cuda:0 H200, is cpu"),
    ],
)
def test_causes_that_can_be_found_are_named(drawn, tmp_path, more, cause):
    import re

    path = changed(drawn / "a.png", tmp_path / "b.png", pixels=1, **more)
    assert any(re.search(cause.replace("(", r"\(").replace(")", r"\)"), one) for one in verdict_of(path).causes)


def test_it_is_drawn_on_as_many_threads_and_in_the_dtype_of_the_image(drawn, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(verify.torch, "set_num_threads", lambda n: seen.setdefault("threads", n))
    verdict = verdict_of(changed(drawn / "a.png", tmp_path / "b.png", threads=7, dtype="bf16"))
    assert seen["threads"] == 7 and verdict.result == "different" and "threads was 7, is" in " ".join(verdict.causes)
    assert not any("dtype was" in cause for cause in verdict.causes)
    assert set(OF_THE_MACHINE) >= {"threads", "dtype"}


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        ({"model": "somebodys"}, "the model 'somebodys', hash "),
        ({"lora": [{"path": "/no/such.safetensors", "weight": 1.0}]}, "does not exist"),
        ({"image": "/no/such.png", "image_sha256": "ab" * 32, "strength": 0.5}, "image of pixels abababababab"),
        ({"seed": None}, "holds no seed"),
        ({"latents": "given"}, "given latents"),
    ],
)
def test_what_cannot_be_drawn_again_says_why(drawn, tmp_path, more, cause):
    verdict = verdict_of(changed(drawn / "a.png", tmp_path / "b.png", **more))
    assert verdict.result == "not drawn" and cause in verdict.causes[0]


def test_a_model_of_another_place_can_be_named(drawn, tiny_folder, tmp_path):
    path = changed(drawn / "a.png", tmp_path / "b.png", model="somebodys")
    assert verdict_of(path, model=tiny_folder).result == "same bytes"


def test_what_a_model_was_taken_to_predict_is_in_the_metadata(tiny_folder, tmp_path, capsys):
    model = ["--model", str(tiny_folder), "--steps", "2", "--seed", "3"]
    a, b, out, again = (str(tmp_path / name) for name in ("a.png", "b.png", "out", "again"))
    assert main(["generate", "a cat", *model, "--prediction-type", "eps", "-o", a]) == 0
    assert main(["generate", "a cat", *model, "-o", b]) == 0
    metadata, plain = (read_metadata(path).ldm for path in (a, b))
    assert metadata["prediction_type"] == "epsilon" and plain.keys() == metadata.keys() - {"prediction_type"}
    place = {"model": tiny_folder}
    assert verdict_of(a, **place).result == verdict_of(b, **place).result == "same bytes"
    loaded = load_model(tiny_folder, dtype="fp32", prediction_type="epsilon", cache=False)
    assert verdict_of(a, model=loaded).result == "same bytes"
    old = changed(tmp_path / "a.png", tmp_path / "old.png", prediction_type=None)
    assert "prediction_type was 'epsilon', is 'v_prediction': it will differ" in verdict_of(old, **place).causes
    assert main(["verify", str(old), "--model", str(tiny_folder), "--prediction-type", "epsilon"]) == 0
    damaged = changed(tmp_path / "a.png", tmp_path / "damaged.png", prediction_type=["eps"])
    assert "the metadata is damaged" in verdict_of(damaged, **place).causes[0]
    assert main(["generate", "--from", a, *model[:2], "-o", str(tmp_path / "c.png")]) == 0
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "a.png").read_bytes()

    (tmp_path / "p.txt").write_text("a cat --d 3 --s 2\n")
    for word, finished in (("v_prediction", 0), ("epsilon", 0), ("eps", 1)):  # what was drawn by another is no such job
        capsys.readouterr()
        words = ["render", str(tmp_path / "p.txt"), "-o", out, *model[:2], "--prediction-type", word]
        assert main(words) == 0 and f"{finished} finished before" in capsys.readouterr().err
    images = [json.loads(line)["path"] for line in (tmp_path / "out/manifest.jsonl").open()]
    drawn = [Image.open(tmp_path / "out" / name).tobytes() for name in images]
    assert drawn[0] == Image.open(b).tobytes() and drawn[1] == Image.open(a).tobytes()
    assert main(["render", "--from", str(tmp_path / "out" / images[1]), "-o", again, *model[:2]]) == 0
    (name,) = (tmp_path / "again").glob("*.png")
    assert Image.open(name).tobytes() == drawn[1]
    assert main(["render", "--from", again, "-o", again + "2"]) == 0  # of its manifest
    (name,) = (tmp_path / "again2").glob("*.png")
    assert Image.open(name).tobytes() == drawn[1] and main(["verify", again]) == 0
    capsys.readouterr()
    both = ["--from", a, "--from", b]
    assert main(["render", *both, "-o", again + "4", *model, "--dry-run", "--guidance", "pag", "--width", "32"]) == 0
    told = "--guidance: not used for images that tell their own\n"
    assert told in capsys.readouterr().err
    assert main(["render", *both, "-o", again + "4", *model[:2], "--dry-run", "--steps", "5", "--dtype", "auto"]) == 0
    told = "--steps: not used for images that tell their own; --set steps=5 changes all\n"
    assert told in capsys.readouterr().err
    assert main(["render", *both, "-o", again + "4", *model[:2], "--dry-run"]) == 0
    assert "not used" not in capsys.readouterr().err
    assert main(["render", *both, "-o", again + "3", *model[:2]]) == 0
    assert "some images were drawn with --prediction-type epsilon and others without" in capsys.readouterr().err


def test_the_input_of_image_to_image_is_found_by_its_pixels(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(tmp_path / "there" / "in.png")
    mask = Image.new("RGBA", (32, 32))
    mask.paste("red", (8, 8, 24, 24))
    mask.save(tmp_path / "there" / "mask.png")
    files = {"image": tmp_path / "there" / "in.png", "mask_image": tmp_path / "there" / "mask.png"}
    images = Pipeline("a red cat", tiny_folder).generate(seed=3, **files, **FAST)
    images.metadata[0]["model"] = str(tiny_folder)
    images.save(tmp_path / "a.png")
    assert verdict_of(tmp_path / "a.png").result == "same bytes"
    os.rename(tmp_path / "there", tmp_path / "gone")
    verdict = verdict_of(tmp_path / "a.png")
    assert verdict.result == "not drawn" and "put it beside the image, under any name" in verdict.causes[0]
    monkeypatch.setattr(verify, "MOST_INPUTS", 0)
    assert "put it beside the image, as in.png" in verdict_of(tmp_path / "a.png").causes[0]
    monkeypatch.undo()
    os.rename(tmp_path / "gone" / "in.png", tmp_path / "other-name.png")
    os.rename(tmp_path / "gone" / "mask.png", tmp_path / "other-mask.png")
    assert verdict_of(tmp_path / "a.png").result == "same bytes"


def test_folders_manifests_and_exit_codes(tiny_folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    ldm.render(tmp_path / "p.txt", tmp_path / "out", model=str(tiny_folder), **FAST)
    for source in (tmp_path / "out", tmp_path / "out" / "manifest.jsonl"):
        assert main(["verify", str(source), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["counts"] == {"same bytes": 2} and len(found["images"]) == 2
    first, second = sorted((tmp_path / "out").glob("*.png"))
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "out" / "another.png")
    assert [path.name for path, _ in verify.images_of(tmp_path / "out")] == [first.name, second.name]
    assert "1 images are not in its manifest, so not compared: another.png" in capsys.readouterr().err
    (tmp_path / "out" / "another.png").unlink()
    assert main(["verify", str(tmp_path / "plain.png")]) == 2 and "no metadata" in capsys.readouterr().out
    changed(first, first, pixels=9)
    second.unlink()
    assert main(["verify", str(tmp_path / "out"), str(tmp_path / "plain.png")]) == 3
    out = capsys.readouterr().out
    assert "its sha256 is not the manifest's" in out and "the file that the manifest names is not there" in out
    assert out.splitlines()[-1] == "1 different, 1 not drawn, 1 no metadata"
    assert main(["verify", str(tmp_path / "nowhere")]) == 2 and main(["verify"]) == 2


def test_the_golden_set_is_drawn_as_the_release_was():
    """A part of it; `ldm verify --golden` draws all 24."""
    assert len(golden.SET) == 24 and all(kept.keys() == golden.SET.keys() for kept in golden.hashes().values())
    if golden.kind() not in golden.hashes():
        pytest.skip(f"no hashes are kept for {golden.kind()}")
    assert golden.compare(["small", "one step"]) == (["small", "one step"], [])


def test_a_kind_of_machine_without_hashes_is_told_and_no_failure(monkeypatch, capsys):
    monkeypatch.setattr(golden, "kind", lambda: "another CPU")
    assert main(["verify", "--golden"]) == 0 and "no hashes are kept for another CPU" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no hashes are kept for another CPU"):
        golden.compare()
