"""Rendering prompt files with a tiny model: what is drawn, in which batches, and what becomes of what cannot be."""

import itertools
import json
import shutil

import pytest
from render_cases import by_key, identity, pictures, report_of

import ldm
from ldm.errors import ConfigError, ModelError, NumericsError, ResourceError
from ldm.images import read_metadata
from ldm.render.drawing import runner
from ldm.render.drawing.runner import render
from ldm.render.output.lines import read_manifest

LINES = [
    "a cat --d 1",
    "a dog --d 2 --l 3",
    "a red cat --d 3 --n blue",
    "a blue dog --d 4 --n red --l 1",
    "a --d 5 --l 9",
]


@pytest.fixture
def draw(tiny_folder, tmp_path):
    """render() with the tiny model, at one step, into a folder of this name."""

    def call(prompts, folder="out", **words):
        words = {"model": str(tiny_folder), "steps": 1, **words}
        return render(prompts, tmp_path / folder, **words)

    return call


def failures(folder):
    return [record for record in read_manifest(folder) if record["status"] == "failed"]


def test_lines_that_differ_in_text_seed_and_guidance_are_one_batch(draw, spy):
    found = draw(LINES)
    assert spy.batches == [[1, 2, 3, 5], [4]]  # without guidance half the work: apart
    assert found.counts["rendered"] == 5 and found.exit_code == 0
    assert [path.name[:6] for path in found.paths] == [f"{i:06d}" for i in range(1, 6)]


def test_each_text_is_encoded_once(draw, monkeypatch):
    from ldm.pipeline import encode as encoding

    encoded, encode = [], encoding.encode_weighted
    monkeypatch.setattr(
        encoding, "encode_weighted", lambda text, tokens, *rest: encoded.extend(tokens) or encode(text, tokens, *rest)
    )
    draw(["a cat --num_images 5", "a dog --n a cat --num_images 4", "a cat --n a dog"], batch_size=2)
    assert sorted(len(tokens.parts[0][0]) for tokens in encoded) == [0, 2, 2]  # "", "a cat", "a dog"


def test_settings_that_cannot_share_a_batch_are_grouped(draw, spy):
    lines = [f"a cat --d {i} --s {i % 2 + 1} --w {(32, 40)[i // 2 % 2]}" for i in range(8)]
    draw(lines, batch_size=4)
    assert sorted(map(sorted, spy.batches)) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_bytes_do_not_depend_on_batch_order_company_or_shard(draw, tmp_path):
    """Faults G 58, 64: a file that was changed or shared out gives the same pictures."""
    lines = [*LINES, "a cat", "a cat", "a dog --sampler euler_ancestral --s 2"]
    draw(lines, "batch")
    expected = by_key(tmp_path / "batch")
    assert len(expected) == 8
    draw(lines, "one", batch_size=1)
    draw(lines[::-1], "backwards", batch_size=3)
    for i in (3, 1, 2):
        draw(lines, "shards", shard=f"{i}/3")
    for name in ("one", "backwards", "shards"):
        assert by_key(tmp_path / name) == expected
    assert len(list((tmp_path / "shards").glob("manifest-*-of-3.jsonl"))) == 3
    draw([lines[-1]], "alone")
    assert by_key(tmp_path / "alone").items() <= expected.items()


def test_what_is_finished_is_left_alone_and_needs_no_model(draw, tmp_path, monkeypatch, capsys):
    """Faults G 58, 61, 64."""
    draw(LINES[:3])
    before, manifest = identity(tmp_path / "out"), (tmp_path / "out" / "manifest.jsonl").read_bytes()

    def refuse(*_args, **_words):
        raise AssertionError("a model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr("ldm.pipeline.engine.load_model", refuse)
        found = draw(LINES[:3])
    assert found.counts["finished_before"] == 3 and found.counts["rendered"] == 0 and len(found.paths) == 3
    assert (tmp_path / "out" / "manifest.jsonl").read_bytes() == manifest
    record = json.loads(manifest.splitlines()[0])
    (tmp_path / "out" / "manifest-9-of-9.jsonl").write_text(
        "".join(json.dumps(record | {"path": path}) + "\n" for path in (None, "../../secret.png"))
    )
    assert sorted(found.paths) == sorted(path for path in (tmp_path / "out").iterdir() if path.suffix == ".png")
    (tmp_path / "out" / "manifest-9-of-9.jsonl").unlink()
    found = draw([LINES[4], LINES[1], LINES[3]])
    assert found.counts["finished_before"] == 1 and found.counts["rendered"] == 2
    assert identity(tmp_path / "out").items() >= before.items()
    assert "holds 2 images of other lines or settings: they stay" in capsys.readouterr().err


def test_the_record_in_the_file_says_everything(draw, tmp_path):
    """Faults G 66; with a grammar's remark and unknown words told in the manifest."""
    draw(["a red cat --d 7 --n blue --l 3", "a walrus"])
    first, second = read_manifest(tmp_path / "out")
    inside = read_metadata(tmp_path / "out" / first["path"])
    own = {name: inside.ldm[name] for name in ("prompt", "negative_prompt", "seed", "guidance_scale", "sampler")}
    assert own == {name: first["settings"][name] for name in own} and inside.ldm["job"] == first["key"]
    assert inside.parameters.startswith("a red cat\nNegative prompt: blue\nSteps: 1, ")
    assert inside.ldm["model_hash"][:10] in inside.parameters and inside.ldm["threads"] >= 1
    assert second["unknown_words"] == ["walrus"] and "unknown_words" not in first
    assert second["settings"]["num_inference_steps"] == 1 and second["seconds"] > 0
    draw(["a cat"], "bare", metadata=False, format="jpg")
    (path,) = (tmp_path / "bare").glob("*.jpg")
    assert read_metadata(path).parameters == "" and not read_metadata(path).ldm


def test_equal_lines_are_different_pictures(draw, tmp_path):
    found = draw(["a cat", "a cat", "a cat --d 5", "a cat --d 5"])
    assert len(found.paths) == 4 and len(set(pictures(tmp_path / "out").values())) == 4  # the key is inside


def test_hostile_names_stay_in_the_folder(draw, tmp_path):
    """Faults G 60."""
    names = ["../../up", "/etc/passwd", "a/b", "con", "-rf", ".hidden", "..", "manifest.jsonl", "x.png", "x", "é" * 300]
    before = set(tmp_path.iterdir())
    found = draw([{"prompt": "a cat", "seed": i, "name": name} for i, name in enumerate(names)])
    assert found.counts["rendered"] == len(names) == len(set(found.paths))
    assert set(tmp_path.iterdir()) - before == {found.folder}
    assert all(path.resolve().parent == found.folder and path.suffix == ".png" for path in found.paths)


def test_templates_and_wildcards(draw, tmp_path):
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "animal.txt").write_text("cat\ndog\n")
    found = draw(["a {red|blue} __animal__ --num_images 6", "__nothing__"], wildcards=tmp_path / "cards")
    prompts = {record["settings"]["prompt"] for record in read_manifest(found.folder)}
    assert prompts <= {f"a {c} {a}" for c in ("red", "blue") for a in ("cat", "dog")} and len(prompts) > 1
    assert found.counts["bad_lines"] == 1 and found.exit_code == 3


# Models and LoRAs


def test_models_change_seldom_and_a_broken_one_fails_its_lines_alone(draw, tiny_folder, tmp_path, monkeypatch):
    other, broken = tmp_path / "other", tmp_path / "broken"
    for folder in (other, broken):
        shutil.copytree(tiny_folder, folder)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 0x40  # the manifest's sha256 is another
    weights.write_bytes(data)
    from ldm.pipeline import engine

    loads, load = [], engine.load_model
    monkeypatch.setattr(
        engine, "load_model", lambda model, *rest, **words: loads.append(model) or load(model, *rest, **words)
    )
    models = [None, str(other), str(broken), str(tmp_path / "nowhere")]
    lines = [{"prompt": "a cat", "seed": i, **({"model": m} if m else {})} for i, m in enumerate(models * 3)]
    found = draw(lines)
    assert found.counts["bad_lines"] == 3 and found.counts["failed"] == 3 and found.counts["rendered"] == 6
    assert [name for name, _ in itertools.groupby(loads)] == [str(tiny_folder), str(other), str(broken)]
    assert loads.count(str(broken)) == 1
    said = report_of(found.folder)
    assert sum("no such model folder" in line.get("what", "") for line in said) == 3
    assert sum("does not match the manifest's sha256" in line.get("what", "") for line in said) == 3
    assert {record["seed"] for record in failures(found.folder)} == {2, 6, 10}
    assert draw(lines).counts["failed"] == 3  # tried again, and again named


def test_loras_of_lines_and_of_tags(draw, tmp_path, spy):
    import torch
    from safetensors.torch import save_file

    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)}
    folder = tmp_path / "loras"
    folder.mkdir()
    save_file({**pair, f"{layer}.alpha": torch.tensor(4.0)}, folder / "red.safetensors")
    save_file({f"{layer}x.lora_A.weight": torch.ones(2, 32)}, folder / "odd.safetensors")
    tag, line = "a <lora:red:0.5> cat", {"prompt": "a cat", "seed": 1, "lora": f"{folder / 'red.safetensors'}:0.5"}
    lines = ["a cat --d 1", f"{tag} --d 1", line, "a <lora:odd> cat", "a <lora:none> cat", "a dog --d 2"]
    found = draw(lines, lora_dir=folder, batch_size=8)
    assert spy.batches == [[1, 2], [1, 1]] and found.counts["bad_lines"] == 2
    plain, tagged, same = (record for record in read_manifest(found.folder) if record["seed"] == 1)
    inside = [read_metadata(found.folder / record["path"]).ldm for record in (plain, tagged, same)]
    assert "lora" not in inside[0] and inside[1]["lora"] == inside[2]["lora"] and inside[1]["lora"][0]["weight"] == 0.5
    assert tagged["settings"] == same["settings"] and len({plain["key"], tagged["key"], same["key"]}) == 3
    (tmp_path / "moved").mkdir()
    shutil.copy(folder / "red.safetensors", tmp_path / "moved" / "red.safetensors")
    again = draw(["a <lora:red:0.5> cat --d 1"], lora_dir=tmp_path / "moved")
    assert again.counts["finished_before"] == 1  # its hash is in the key, its place is not


# What goes wrong


def test_one_picture_that_is_nan_is_one_failure(draw, spy):
    """The others of its batch are kept; the next run tries it again."""

    def spoil(seeds, images):
        if 3 in seeds:
            images[seeds.index(3)] = float("nan")
        return images

    spy.after = spoil
    found = draw([f"a cat --d {i}" for i in range(6)])
    assert found.counts["rendered"] == 5 and found.counts["failed"] == 1 and found.exit_code == 3
    (line,) = failures(found.folder)
    assert line["seed"] == 3 and "holds NaN or infinity" in line["error"]
    spy.after = None
    assert draw([f"a cat --d {i}" for i in range(6)]).counts["finished_before"] == 5
    assert len(found.paths) == 6


def test_out_of_memory_halves_the_batch_and_fails_only_what_never_fits(draw, spy, capsys):
    """Faults G 63."""

    def too_many(seeds, settings):
        if len(seeds) > 2 or 4 in seeds:
            raise ResourceError(f"out of memory at {len(seeds)} x {settings.width}x{settings.height}")

    spy.before = too_many
    found = draw([f"a cat --d {i}" for i in range(8)], batch_size=8)
    assert found.counts["rendered"] == 7 and found.counts["failed"] == 1
    assert [record["seed"] for record in failures(found.folder)] == [4]
    assert [0, 1] in spy.batches and max(map(len, spy.batches)) == 2
    assert "going on with 4 together" in capsys.readouterr().err


def test_a_text_that_cannot_be_encoded_fails_alone(draw, spy, monkeypatch):
    from ldm.pipeline import encode as encoding

    encode = encoding.encode_weighted

    def picky(encoder, tokens, *rest):
        if [encoder.tokenizer.decode([token]).strip() for token, _ in tokens[0].parts[0][0]] == ["a", "dog"]:
            raise ConfigError("this text is refused", where="prompt")
        return encode(encoder, tokens, *rest)

    monkeypatch.setattr(encoding, "encode_weighted", picky)
    found = draw(["a cat --d 1", "a dog --d 2", "a red cat --d 3"])
    assert found.counts["rendered"] == 2 and [record["seed"] for record in failures(found.folder)] == [2]


def test_bad_lines_are_named_and_strict_stops_before_work(draw, tmp_path, spy, capsys):
    """Faults G 59."""
    path = tmp_path / "prompts.txt"
    path.write_text('a cat\n\na --s x\n# no\n{"prompt": }\na --w 31\n--n b\n' + f"{'x' * 100_001}\n")
    with pytest.raises(ConfigError, match="5 of 6 lines are bad"):
        draw(path, strict=True)
    assert spy.batches == []
    found = draw(path)
    assert found.counts["rendered"] == 1 and found.counts["bad_lines"] == 5 and found.exit_code == 3
    lines = [line["line"] for line in report_of(found.folder) if line["kind"] == "bad line"]
    assert lines == [3, 5, 6, 7, 8]
    assert f"{path}:6 (width): 31 is not a multiple of 8; use 24 or 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"sampler": "eular"}, "did you mean 'euler'"),
        ({"width": 31}, "use 24 or 32"),
        ({"model": "nowhere"}, "no such model folder"),
        ({"shard": "4/3"}, "is no shard"),
        ({"wildcards": "nowhere"}, "is no folder"),
        ({"format": "gif"}, "unknown image format"),
        ({"batch_size": 0}, "batch_size"),
        ({"stepz": 3}, "unknown setting 'stepz'"),
        ({"pag_layers": ("up.9",), "guidance": "pag"}, "no self-attention in 'up.9'"),
        ({"lora": "x.safetensors"}, "does not exist"),
        ({"device": "gpu"}, "unknown device"),
    ],
)
def test_what_no_line_could_be_drawn_with_is_refused_at_once(draw, tmp_path, words, message):
    with pytest.raises((ConfigError, ModelError), match=message) as error:
        draw(["a cat"], **words)
    assert error.value.exit_code == 2 and not (tmp_path / "out").exists()


def test_a_file_without_prompts_or_none_at_all(draw, tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(ConfigError, match="holds no prompts"):
        draw(tmp_path / "empty.txt")
    with pytest.raises(ConfigError, match="no such prompt file"):
        draw(tmp_path / "none.txt")


def test_the_file_may_be_edited_while_it_is_drawn(draw, tmp_path, spy):
    """Faults G 64: this run goes by the file as it was, the next one by what it says then."""
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"a cat --d {i}\n" for i in range(4)))
    spy.before = lambda seeds, settings: path.write_text("a dog --d 9\n")
    assert draw(path, batch_size=1).counts["rendered"] == 4 and spy.seeds == [0, 1, 2, 3]
    assert draw(path).counts["rendered"] == 1


def test_a_dry_run_writes_nothing_and_tells(draw, tmp_path, capsys):
    found = draw(["a cat --d 3", "a dog --d 4 --s 2", "b --s 0"], dry_run=True)
    said = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "out").exists() and found.counts["not_reached"] == 2
    assert said[0].split("\t")[1:] == ["prompts, entry 1", said[0].split("\t")[2], "seed 3", "a cat"]
    assert said[2] == "2 images to draw in 2 batches, 3 steps" and said[3].startswith("about ")
    drawn = draw(["a cat --d 3", "a dog --d 4 --s 2", "b --s 0"])
    assert [path.name for path in drawn.paths] == [line.split("\t")[2] for line in said[:2]]
    draw(["a cat --d 3", "a dog --d 4 --s 2"], dry_run=True)
    assert capsys.readouterr().out == "0 images to draw in 0 batches, 0 steps\n"


def test_counts_are_the_same_names_in_python_in_a_dry_run_and_in_the_report(draw, tmp_path):
    lines = ["a cat --d 3", "a dog --d 4", "b --s 0"]
    dry, real = draw(lines, dry_run=True).counts, draw(lines).counts
    assert list(dry) == list(real) and real["good_lines"] == dry["good_lines"] == 2
    assert report_of(tmp_path / "out")[-1] == {"kind": "counts", **real} and "kind" not in real


@pytest.mark.parametrize("stopped", [False, True])
def test_a_disk_that_is_full_at_the_reports_last_line_is_named(draw, tmp_path, monkeypatch, capsys, stopped):
    """What was drawn is said all the same; where something else stopped the run, that is the error."""
    from ldm.render.output import manifest

    append = manifest._Log.append

    def full(self, line):
        if line.get("kind") == "counts":
            raise ResourceError("cannot be written (No space left on device)", where=self._path)
        return append(self, line)

    def broken(self, job, data, **more):
        raise NumericsError("the encoder is broken")

    monkeypatch.setattr(manifest._Log, "append", full)
    if stopped:
        monkeypatch.setattr(manifest.Manifest, "save", broken)
    with pytest.raises(NumericsError if stopped else ResourceError) as error:
        draw(["a cat --d 3", "b --s 0"])
    assert error.value.exit_code == (5 if stopped else 4)
    assert f"{0 if stopped else 1} rendered, 0 finished before, 1 bad lines, 0 failed" in capsys.readouterr().err


def test_the_folder_stays_away_where_the_file_is_refused_as_a_whole(draw, tmp_path):
    (tmp_path / "p.csv").write_text("seed,steps\n1,2\n")
    with pytest.raises(ConfigError, match="no column is named prompt"):
        draw(tmp_path / "p.csv")
    assert not (tmp_path / "out").exists()


def test_a_run_without_images_has_no_contact_sheet(draw, spy, capsys):
    def never(seeds, settings):
        raise ResourceError("out of memory")

    spy.before = never
    assert draw(["a cat"], contact_sheet=True).counts["failed"] == 1
    assert "contact sheets: 0" in capsys.readouterr().err


def test_variations_of_lines_are_those_of_generate(draw, tiny_folder, tmp_path):
    from ldm import Pipeline

    found = draw(["a cat --d 7 --subseed 5 --subseed_strength 0.4 --num_images 2"], metadata=False)
    pipe = Pipeline("a cat", model=tiny_folder)
    images = pipe.generate(seed=7, variation_seed=5, variation_strength=0.4, num_images=2, num_inference_steps=1)
    assert [bytes_without_key(path) for path in found.paths] == [image.tobytes() for image in images]


def test_a_line_has_the_dtype_that_it_says(draw, tmp_path):
    found = draw(["a cat --d 1", "a cat --d 1 --dtype bf16", "a cat --d 1 --dtype fp32"])
    assert [read_metadata(path).ldm["dtype"] for path in found.paths] == ["fp32", "bf16", "fp32"]
    assert {line["settings"].get("dtype") for line in read_manifest(found.folder)} == {None, "bf16", "fp32"}


def test_a_dry_run_takes_damaged_lines_of_a_manifest_for_nothing(draw, tmp_path, capsys):
    """As a run does."""
    found = draw(["a cat --d 3", "a dog --d 4", "a cow --d 5"])
    whole, outside, none = map(json.loads, found.manifest.read_text().splitlines())
    del none["path"]
    lines = (whole, outside | {"path": f"../out/{outside['path']}"}, none)
    found.manifest.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    capsys.readouterr()
    again = draw(["a cat --d 3", "a dog --d 4", "a cow --d 5"], dry_run=True)
    assert again.counts["finished_before"] == 1 and "2 images to draw" in capsys.readouterr().out


def test_the_progress_bar_tells_pictures_a_second_and_time_left(draw, monkeypatch, capsys):
    monkeypatch.setenv("LDM_PROGRESS", "1")
    draw([f"a cat --d {i}" for i in range(6)], batch_size=2)
    last = capsys.readouterr().err.split("rendering:")[-1]
    assert "6/6 [" in last and "images/s]" in last and "<00:00" in last


def test_ldm_render_is_the_package_and_the_function(tiny_folder, tmp_path):
    found = ldm.render(["a cat"], tmp_path / "out", model=tiny_folder, num_inference_steps=1)
    assert found.paths[0].is_file() and found.manifest.is_file() and found.report.is_file()
    assert json.loads(found.report.read_text())["rendered"] == 1
    assert runner.render is render and callable(ldm.render)


def test_a_writer_that_fails_stops_the_run(draw, tmp_path, monkeypatch):
    from ldm.render.drawing import writer

    def broken(self, job, data, **more):
        raise NumericsError("the encoder is broken")

    monkeypatch.setattr(writer.Manifest, "save", broken)
    with pytest.raises(NumericsError, match="the encoder is broken"):
        draw([f"a cat --d {i}" for i in range(40)], batch_size=2)
    assert report_of(tmp_path / "out")[-1]["not_reached"] == 40


# From pictures, in grids, and the pages afterwards


def test_pictures_are_drawn_again_to_the_bit(draw, tmp_path, capsys):
    """From the folder, from its manifest and from a picture; with a change, another picture."""
    draw(["a (red:1.2) cat --d 3 --n blue", "a {cat|dog} --s 2"], wildcards=None)
    expected = {bytes_without_key(path) for path in (tmp_path / "out").glob("*.png")}
    capsys.readouterr()
    for name, source in (("a", tmp_path / "out"), ("b", tmp_path / "out" / "manifest.jsonl")):
        draw(None, name, sources=source)
        assert {bytes_without_key(path) for path in (tmp_path / name).glob("*.png")} == expected
    first = sorted((tmp_path / "out").glob("*.png"))[0]
    draw(None, "c", sources=[first, first], changes=["seed=4"])
    pictures_of_c = sorted((tmp_path / "c").glob("*.png"))
    assert [read_metadata(path).ldm["seed"] for path in pictures_of_c] == [4, 4]
    assert not {bytes_without_key(path) for path in pictures_of_c} & expected
    assert "warning: the image was drawn by" not in capsys.readouterr().err
    with pytest.raises(ConfigError, match="prompts and images"):
        draw(["a"], sources=first)
    with pytest.raises(ConfigError, match="belongs to --from"):
        draw(["a"], changes=["seed=4"])


def bytes_without_key(path):
    from PIL import Image

    with Image.open(path) as image:
        return image.tobytes()


def test_a_grid_draws_every_combination_and_its_sheets(draw, tmp_path):
    from PIL import Image

    found = draw(["a cat", "a dog --stepz 1", "a dog --d 3"], grid=["steps=1,2,3", "cfg=1,4"])
    assert found.counts["rendered"] == 12 and found.counts["bad_lines"] == 1
    settings = [record["settings"] for record in read_manifest(found.folder)]
    assert {(s["num_inference_steps"], s["guidance_scale"]) for s in settings} == {
        (s, g) for s in (1, 2, 3) for g in (1, 4)
    }
    assert len({s["seed"] for s in settings}) == 2
    sheets = sorted((tmp_path / "out" / "grids").iterdir())
    assert [sheet.name for sheet in sheets] == ["001.png", "002.png"]
    with Image.open(sheets[0]) as sheet, Image.open(found.paths[0]) as first:
        assert sheet.width > 3 * first.width and sheet.height > 2 * first.height
    assert draw(["a cat"], grid=["steps=1,2,3", "cfg=1,4"]).counts["finished_before"] == 6
    for words in ({"shard": "1/2"}, {"num_images": 2}):
        with pytest.raises(ConfigError, match="grid"):
            draw(["a cat"], grid=["steps=1,2"], **words)


def test_the_pages_afterwards(draw, tmp_path):
    draw(["a cat", "a dog --stepz 1"], gallery=True, contact_sheet=True)
    assert "a cat" in (tmp_path / "out" / "index.html").read_text()
    assert (tmp_path / "out" / "contact" / "page-001.jpg").is_file()


# From input pictures


def test_lines_with_pictures_and_masks(draw, tmp_path, spy):
    """Their size is drawn, their pixels are in the key, and they share batches with their like alone."""
    from PIL import Image

    for name, size, colour in (("a", (40, 32), "red"), ("b", (40, 32), "blue"), ("moved", (40, 32), "red")):
        Image.new("RGB", size, colour).save(tmp_path / f"{name}.png")
    Image.new("L", (40, 32), 255).save(tmp_path / "mask.png")
    (tmp_path / "p.txt").write_text(
        "a cat --d 1 --image a.png\na dog --d 2 --init_image b.png --s 2\na cat --d 3 --image a.png --mask mask.png\n"
        "a cat --d 4\na cat --d 5 --image b.png --strength 0.5 --s 2\na cat --d 6 --image nowhere.png\n"
    )
    found = draw(tmp_path / "p.txt", steps=2)
    assert found.counts["rendered"] == 5 and found.counts["bad_lines"] == 1
    assert sorted(map(sorted, spy.batches)) == [[1, 2], [3], [4], [5]]
    settings = {record["seed"]: record["settings"] for record in read_manifest(found.folder)}
    assert (settings[1]["width"], settings[1]["height"], settings[1]["strength"]) == (40, 32, 0.8)
    assert settings[5]["strength"] == 0.5 and "strength" not in settings[4] and "mask_image" in settings[3]
    (tmp_path / "p.txt").write_text("a cat --d 1 --image moved.png\na cat --d 1 --image b.png\n")
    again = draw(tmp_path / "p.txt", steps=2)
    assert again.counts["finished_before"] == 1 and again.counts["rendered"] == 1


def test_larger_second_runs_and_variations(draw, tmp_path):
    varied = {"variation_seed": 9, "variation_strength": 0.3}
    found = draw(["a cat --d 1"], hires_scale=2, steps=2, **varied)
    (record,) = read_manifest(found.folder)
    assert {**varied, "hires_scale": 2.0, "height": 32}.items() <= record["settings"].items()
    inside = read_metadata(found.paths[0])
    assert inside.ldm["variation_seed"] == 9 and inside.ldm["hires_scale"] == 2
    assert draw(["a cat --d 1"]).counts["rendered"] == 1  # without them another picture
    with pytest.raises(ConfigError, match="a variation needs its own seed"):
        draw(["a cat"], variation_strength=0.5)
