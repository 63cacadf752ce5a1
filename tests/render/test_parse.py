"""Prompt files as people have them: every syntax, what must survive, and errors that name line and field."""

import io
import json
import random
import subprocess
import sys

import pytest
from prompt_files import entries_of, settings_of

from ldm.errors import ConfigError
from ldm.pipeline.keywords import ALIASES
from ldm.render.prompts import json_toml
from ldm.render.prompts.files import open_prompts, read_entries
from ldm.render.prompts.line_settings import WORDS
from ldm.render.prompts.setting_table import SETTINGS


def one(tmp_path, line, name="prompts.txt"):
    (settings,) = settings_of(tmp_path, line, name)
    return settings


def refused(tmp_path, line, name="prompts.txt"):
    (entry,) = entries_of(tmp_path, line, name)
    assert entry.error is not None and entry.settings is None
    return entry


# Text


@pytest.mark.parametrize(
    "line",
    [
        "a cat's eye",
        "the dogs' bowl -- at night",
        "well--known and --",
        'a "quoted" sign, 5" tall',
        "a --- b",
        "the --2024 edition",
        "C:\\path\\new (x:1.2) [y]",
        "un château — l'été, 猫, 🐈‍⬛",
        "-n4 -W512 stays text",
        "50% off; $HOME `ls` | & > <",
        "[a|b] (c:1.1) <lora:x:0.5>",
    ],
)
def test_plain_lines_are_taken_as_they_are(tmp_path, line):
    assert one(tmp_path, line) == {"prompt": line}


def test_comments_blanks_line_ends_and_a_byte_order_mark_are_no_prompts(tmp_path):
    content = b"\xef\xbb\xbfa cat\r\n\r\n  # note\n\t\n#x\na dog\n\\#1 fan"
    entries = entries_of(tmp_path, content)
    assert [(e.line, e.settings["prompt"]) for e in entries] == [(1, "a cat"), (6, "a dog"), (7, "#1 fan")]
    assert entries[1].where == "prompts.txt:6"


def test_a1111_values_run_to_the_next_flag_or_stand_in_quotes(tmp_path):
    plain = "--prompt a cat's hat, very -- good --negative_prompt ugly --steps 30 --cfg_scale 7.5 --sampler_name Euler"
    quoted = '--prompt "a cat\'s hat, very -- good" --negative_prompt "ugly" --steps=30 --cfg-scale=7.5'
    quoted += ' --sampler_name "Euler"'
    expected = {"prompt": "a cat's hat, very -- good", "negative_prompt": "ugly", "num_inference_steps": 30}
    expected |= {"guidance_scale": 7.5, "sampler": "euler"}
    assert one(tmp_path, plain) == one(tmp_path, quoted) == expected


def test_flags_within_quotes_are_text(tmp_path):
    line = r'--prompt "say \"hi\" --steps 3 \\ end" --seed 4'
    assert one(tmp_path, line) == {"prompt": 'say "hi" --steps 3 \\ end', "seed": 4}
    assert one(tmp_path, "--prompt 'a cat' --negative_prompt ''") == {"prompt": "a cat", "negative_prompt": ""}


def test_kohya_line(tmp_path):
    line = "a dog --n bad, worse --w 512 --h 768 --d 1,2,3 --s 30 --l 7 --ss ddim --f my dog"
    assert one(tmp_path, line) == {
        "prompt": "a dog",
        "negative_prompt": "bad, worse",
        "width": 512,
        "height": 768,
        "seed": (1, 2, 3),
        "num_inference_steps": 30,
        "guidance_scale": 7.0,
        "sampler": "ddim",
        "name": "my dog",
    }


def test_backslash_makes_a_flag_text(tmp_path):
    assert one(tmp_path, r"the sea \--calm --s 4") == {"prompt": "the sea --calm", "num_inference_steps": 4}


@pytest.mark.parametrize(
    "line, field, near",
    [
        ("a cat --stepz 4", "--stepz", "--steps"),
        ("a cat --step4", "--step4", "--steps"),
        ("a word --calm and", "--calm", "write \\--"),
        ("--negative_promt x", "--negative_promt", "--negative_prompt"),
        ("a --d-day sign", "--d-day", "write \\--"),
    ],
)
def test_an_unknown_flag_is_named_with_its_line_and_the_nearest(tmp_path, line, field, near):
    entry = entries_of(tmp_path, f"fine\n{line}\nfine too\n")[1]
    assert entry.field == field and near in entry.error.hint
    assert str(entry.error).startswith(f"prompts.txt:2 ({field})")


# Other formats

CAT = {"prompt": "a cat, sat", "num_inference_steps": 20, "seed": 7}
DOG = {"prompt": 'a dog\'s "bowl"', "guidance_scale": 3.5, "negative_prompt": "x"}


def test_jsonl_json_csv_and_toml_say_the_same(tmp_path):
    cat, dog = {"prompt": "a cat, sat", "steps": 20, "seed": "7"}, {**DOG}
    jsonl = f"# c\n{json.dumps(cat)}\n\n{json.dumps(dog)}"
    assert settings_of(tmp_path, jsonl, "p.jsonl") == [CAT, DOG]
    assert settings_of(tmp_path, jsonl) == [CAT, DOG]  # told by the line
    assert settings_of(tmp_path, json.dumps([cat, dog]), "p.json") == [CAT, DOG]
    assert settings_of(tmp_path, json.dumps({"prompts": [cat, dog]}), "p.json") == [CAT, DOG]
    csv = 'Prompt;Steps;CFG Scale;seed;negative-prompt;#note\n"a cat, sat";20;;7;;hm\n"a dog\'s ""bowl""";;3.5;;x;\n'
    assert settings_of(tmp_path, csv, "p.csv") == settings_of(tmp_path, csv, "p.txt") == [CAT, DOG]
    toml = """[[prompts]]\nprompt = "a cat, sat"\nsteps = 20\nseed = 7
    [[prompts]]\nprompt = 'a dog''s'\n""".replace("'a dog''s'", '"a dog\'s \\"bowl\\""\nscale = 3.5\nneg = "x"')
    assert settings_of(tmp_path, toml, "p.toml") == [CAT, DOG]


def test_kohya_toml_and_json(tmp_path):
    toml = """
[prompt]
width = 512
height = 768
scale = 7
sample_steps = 40

  [[prompt.subset]]
  prompt = "a cat"
  scale = 9

  [[prompt.subset]]
  prompt = "a dog"
  sample_sampler = "ddim"
"""
    entries = entries_of(tmp_path, toml, "p.toml")
    common = {"width": 512, "height": 768, "num_inference_steps": 40}
    assert entries[0].settings == {**common, "guidance_scale": 9.0, "prompt": "a cat"}
    assert entries[1].settings == {**common, "guidance_scale": 7.0, "prompt": "a dog", "sampler": "ddim"}
    assert [entry.line for entry in entries] == [8, 12]
    listed = '[\n "a cat --s 3",\n\n {"prompt": "b"}\n]'
    assert [(e.line, e.settings["prompt"]) for e in entries_of(tmp_path, listed, "p.json")] == [(2, "a cat"), (4, "b")]


def test_python_lists_of_texts_and_groups():
    entries = list(read_entries(["a --s 4", {"prompt": "b --s 4"}, 7]))
    assert entries[0].settings == {"prompt": "a", "num_inference_steps": 4}
    assert entries[1].settings == {"prompt": "b --s 4"}
    assert str(entries[2].error).startswith("prompts, entry 3: expected a text")


def test_standard_input_is_read_line_by_line(monkeypatch):
    data = b'a cat\n{"prompt": "b", "d": 3}\nc --s 9\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    entries = list(read_entries("-"))
    assert [dict(e.settings) for e in entries][1:] == [
        {"prompt": "b", "seed": 3},
        {"prompt": "c", "num_inference_steps": 9},
    ]
    assert entries[0].where == "stdin:1"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    prompts = open_prompts("-")
    assert prompts.name == "stdin" and list(prompts.entries) == entries


def test_csv_records_over_several_lines_and_broken_ones(tmp_path):
    csv = 'prompt,seed\n"two\nlines",1\n"never closed,2\n"a ""dog""",3\n\n"x"y,4\nlast,5,6\nfine,7\n"open,8'
    entries = entries_of(tmp_path, csv, "p.csv")
    good = [(e.line, e.settings["prompt"], e.settings["seed"]) for e in entries if not e.error]
    assert good == [(2, "two\nlines", 1), (5, 'a "dog"', 3), (9, "fine", 7)]
    assert [(e.line, e.error.what.partition(" (")[0]) for e in entries if e.error] == [
        (4, "bad CSV"),
        (7, "bad CSV"),
        (8, "3 cells in 2 columns"),
        (10, "bad CSV"),
    ]


def test_excel_tables(tmp_path):
    assert settings_of(tmp_path, b"\xef\xbb\xbfprompt;w\r\na;64\r\n", "p.csv") == [{"prompt": "a", "width": 64}]
    assert settings_of(tmp_path, "w\tprompt\n64\ta, b\n", "p.tsv") == [{"prompt": "a, b", "width": 64}]


# Words and values


@pytest.mark.parametrize("word, name", sorted(WORDS.items()))
def test_every_word_is_taken_as_flag_and_as_key(tmp_path, word, name):
    (tmp_path / "x.png").touch()
    values = {"size": "64x96", "sampler": "Euler", "spacing": "trailing", "negative_prompt": "no", "clip_skip": "1"}
    values |= dict.fromkeys(("image", "mask_image", "lora"), "x.png") | dict.fromkeys(("eta", "guidance_rescale"), "0")
    values |= {"variation_strength": "0.3", "hires_strength": "0.3", "dtype": "bf16", "guess_mode": "true"}
    values |= {"quantization": "int8", "control_image": "x.png", "control": "edges:x.png:0.5"}
    values |= dict.fromkeys(("ip_adapter", "ip_adapter_image", "ip_adapter_mask", "text_encoders"), "x.png")
    value = values.get(name, {"strength": "0.8", "name": "cat", "model": "default"}.get(name, "3"))
    needs_image = name == "mask_image"
    rest = "" if name == "prompt" else "a cat "
    results = [
        *entries_of(tmp_path, f"{rest}--{word} {value}"),
        *entries_of(
            tmp_path, json.dumps({word: value, **({} if name == "prompt" else {"prompt": "a cat"})}), "p.jsonl"
        ),
    ]
    for entry in results:
        if needs_image:
            assert entry.field == name and "needs an image" in str(entry.error)
        else:
            assert entry.error is None, entry.error
            names = {
                "size": {"width", "height"},
                "batch_size": {"num_images"},
                "control": set(SETTINGS["control"].sets),
            }
            names = names.get(name, {name})
            assert set(entry.settings) - {"prompt"} <= names
    assert results[0].settings == results[1].settings


def test_the_words_of_the_pipeline_are_all_here():
    parsed = {name for name, setting in SETTINGS.items() if setting.parser}
    missing = {word for word, name in ALIASES.items() if name in parsed} - set(WORDS) - {"generator"}
    assert missing == set()


@pytest.mark.parametrize(
    "seed, expected",
    [
        ("0", 0),
        (0, 0),
        ("7-9", (7, 8, 9)),
        ("1, 5-6,9", (1, 5, 6, 9)),
        ([3, "4"], (3, 4)),
        (-1, None),
        ("1,-1", (1, None)),
        (2.0, 2),
        (2**63 - 1 - 100_000, 2**63 - 1 - 100_000),
    ],
)
def test_seeds(tmp_path, seed, expected):
    assert one(tmp_path, json.dumps({"prompt": "a", "seed": seed}))["seed"] == expected


@pytest.mark.parametrize(
    "settings, field, said",
    [
        ({"seed": "9-7"}, "seed", "no range"),
        ({"seed": -2}, "seed", "outside"),
        ({"seed": True}, "seed", "whole number"),
        ({"seed": 2**63}, "seed", "outside"),
        ({"seed": []}, "seed", "empty"),
        ({"seed": "0-99999999"}, "seed", "more than"),
        ({"seeds": "1,2,3", "num_images": 2}, "seed", "3 seeds for 2 images"),
        ({"steps": 0}, "steps", "outside 1 to 1000"),
        ({"steps": "many"}, "steps", "whole number"),
        ({"steps": 1.5}, "steps", "whole number"),
        ({"steps": "9" * 5000}, "steps", "whole number"),
        ({"cfg": float("nan")}, "cfg", "finite"),
        ({"cfg": -1}, "cfg", "outside"),
        ({"w": 0}, "w", "outside"),
        ({"w": 99999}, "w", "outside"),
        ({"size": "64"}, "size", "WIDTHxHEIGHT"),
        ({"size": "64x64", "w": 32}, "w", "same setting"),
        ({"steps": 3, "s": 4}, "s", "same setting"),
        ({"sampler": "eulr"}, "sampler", "unknown sampler"),
        ({"spacing": "x"}, "spacing", "unknown spacing"),
        ({"strength": 2}, "strength", "outside 0 to 1"),
        ({"negative_prompt": 4}, "negative_prompt", "expected a text"),
        ({"prompt": "a\x00b"}, "prompt", "control character U+0000"),
        ({"prompt": "x" * 100_001}, "prompt", "more than 100,000"),
        ({"prompt": None}, "prompt", "no prompt"),
        ({"lora": "missing.safetensors"}, "lora", "does not exist"),
        ({"image": "\0"}, "image", "does not exist"),
        ({"image": "x" * 5000}, "image", "no file name"),
        ({"name": " "}, "name", "expected a name"),
        ({"restore_faces": True}, "restore_faces", "not supported"),
        ({"sampel": 3}, "sampel", "unknown setting"),
        ({"": 3}, "", "unknown setting"),
        ({"num_images": 100, "batch_size": 5000}, "batch_size", "outside"),
        ({"clip_skip": 0}, "clip_skip", "outside"),
    ],
)
def test_bad_values_are_named(tmp_path, settings, field, said):
    entry = refused(tmp_path, json.dumps({"prompt": "a", **settings}), "p.jsonl")
    assert entry.field == field and said in str(entry.error) and "\n" not in str(entry.error)
    assert len(str(entry.error)) < 500


def test_what_changes_nothing_is_taken(tmp_path):
    line = "a --restore_faces false --tiling False --subseed -1 --do_not_save_grid --subseed_strength 0.0"
    assert one(tmp_path, line) == {"prompt": "a"}
    assert one(tmp_path, "a --subseed 5 --subseed_strength 0") == {"prompt": "a"}  # A1111 writes a drawn subseed
    assert "not supported" in str(refused(tmp_path, "a --tiling").error)


def test_variations_are_taken_under_everybodys_words(tmp_path):
    varied = {"prompt": "a", "variation_seed": 5, "variation_strength": 0.3}
    for line in ("a --subseed 5 --subseed_strength 0.3", "a --variation_seed 5 --variation-strength .3"):
        assert one(tmp_path, line) == varied
    entry = refused(tmp_path, "a --subseed 5 --subseed_strength 2")
    assert entry.field == "subseed_strength" and "2 is outside 0 to 1" in str(entry.error)


def test_a_line_may_hold_its_dtype(tmp_path):
    for word in ("--dtype bf16", "--torch_dtype bfloat16", "--dtype torch.bfloat16"):
        assert one(tmp_path, f"a {word}") == {"prompt": "a", "dtype": "bf16"}
    assert "did you mean 'bf16'" in str(refused(tmp_path, "a --dtype bf").error)


def test_clip_skip_counts_as_a1111_does_in_files(tmp_path):
    assert one(tmp_path, "a --clip_skip 2") == {"prompt": "a", "clip_skip": 1}
    assert one(tmp_path, "a --clip_skip 1") == {"prompt": "a", "clip_skip": 0}  # the command's default is not meant


def test_sampler_labels_may_say_the_spacing(tmp_path):
    both = {"prompt": "a", "sampler": "dpmpp_2m", "spacing": "karras"}
    for line in (
        "a --ss DPM++ 2M Karras",
        "a --sampler_name DPM++ 2M --schedule Karras",
        "a --ss dpmsolver++ --spacing karras",
    ):
        assert one(tmp_path, line) == both
    assert one(tmp_path, "a --ss euler_a --schedule Automatic") == {"prompt": "a", "sampler": "euler_ancestral"}
    assert "same setting" in str(refused(tmp_path, "a --ss DPM++ 2M Karras --spacing trailing").error)


def test_a1111_batches_multiply_images(tmp_path):
    assert one(tmp_path, "a --n_iter 3 --batch_size 2")["num_images"] == 6
    assert one(tmp_path, "a --batch_size 2")["num_images"] == 2


def test_loras_with_weights_are_found_beside_the_prompt_file(tmp_path):
    (tmp_path / "l").mkdir()
    for name in ("a.safetensors", "b:2.safetensors"):
        (tmp_path / "l" / name).touch()
    a, b = (str(tmp_path / "l" / name) for name in ("a.safetensors", "b:2.safetensors"))
    assert one(tmp_path, "x --lora l/a.safetensors:0.5 --lora l/b:2.safetensors")["lora"] == ((a, 0.5), (b, 1.0))
    for value in ([["l/a.safetensors", 0.5], "l/b:2.safetensors"], {"l/a.safetensors": 0.5, "l/b:2.safetensors": 1}):
        assert one(tmp_path, json.dumps({"prompt": "x", "lora": value}))["lora"] == ((a, 0.5), (b, 1.0))


# Whole files that are refused, and lines that must not be


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("p.json", b"[1, 2", "p.json:1: bad JSON"),
        ("p.json", b'[{"prompt": "a"},\n {"prompt": }]', "p.json:2:13: bad JSON"),
        ("p.json", b"[1] x", "something follows"),
        ("p.json", b'{"prompt": "a"} {}', "one list or group"),
        ("p.json", b"7", "one list or group"),
        ("p.json", b"[" * 100_000, "p.json:1"),
        ("p.json", b'[{"a": 1, "a": 2}]', "duplicate key 'a'"),
        ("p.json", b'["\xff"]', "not UTF-8"),
        ("p.toml", b"a = ", "bad TOML"),
        ("p.toml", b'width = 0\n[[prompts]]\nprompt="a"', "p.toml (width): 0 is outside"),
        ("p.csv", b"prompt,stepz\na,1", "unknown column 'stepz'; did you mean 'steps'?"),
        ("p.csv", b"seed,steps\n1,2", "no column is named prompt"),
        ("p.txt", "a cat".encode("utf-16"), "is UTF-16"),
        ("p.txt", b"\x89PNG\r\n", None),
        ("p.txt", b"a\0b\n", "NUL"),
        ("p.yaml", b"- a", ".yaml files are not read"),
        (None, b"", "no such prompt file"),
    ],
)
def test_files_that_are_refused_as_a_whole(tmp_path, name, content, said):
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(content)
    if said is None:  # every line is an error of its own
        assert all(entry.error for entry in read_entries(path))
        return
    with pytest.raises(ConfigError) as caught:
        list(read_entries(path, name))
    assert said in str(caught.value) and len(str(caught.value)) < 400


def test_files_too_large_to_be_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(json_toml, "MAX_JSON", 100)
    monkeypatch.setattr(json_toml, "MAX_TOML", 100)
    for name, content in (("p.json", json.dumps(["x" * 200])), ("p.toml", f'prompt = "{"x" * 200}"')):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=r"larger than 100 B; write .jsonl"):
            list(read_entries(tmp_path / name))


def test_bad_lines_leave_the_others_alone(tmp_path):
    lines = [
        b"a cat",
        b"\xff\xfe",
        b"--w 64",
        b'{"prompt": "x",}',
        b"b --s 0",
        b"c" * 100_001,
        b'{"prompt": "d"}',
        b"e\x07",
    ]
    entries = entries_of(tmp_path, b"\n".join(lines))
    assert [e.line for e in entries if not e.error] == [1, 7]
    said = ["not UTF-8 (byte 0xff at position 1)", "no prompt", "bad JSON", "outside", "more than", "U+0007"]
    for entry, words in zip([e for e in entries if e.error], said, strict=True):
        assert words in str(entry.error) and entry.error.where.startswith(f"prompts.txt:{entry.line}")


def test_a_line_longer_than_the_limit_is_skipped_in_bounded_memory(tmp_path):
    """Faults G 65."""
    path = tmp_path / "long.txt"
    with path.open("wb") as handle:
        handle.write(b"a\n")
        for _ in range(40):
            handle.write(b"x" * (1 << 20))
        handle.write(b"\nb\n")
    import tracemalloc

    tracemalloc.start()
    entries = list(read_entries(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [entry.line for entry in entries] == [1, 2, 3] and "longer than 4 MB" in str(entries[1].error)
    assert peak < 20 << 20


def test_noise_never_raises_anything_but_our_errors(tmp_path):
    rng = random.Random(0)
    pieces = [
        '"',
        "'",
        "--",
        "--n ",
        "--s ",
        "--d",
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "\\",
        "\t",
        " ",
        "a",
        "1",
        "\u00e9",
        "=",
        "$$",
    ]
    pieces += ["prompt", "#", ";", "\x00", "\ud7ff", "-1", "1e9", "null", "--size 3x", "\x85"]
    for name in ("p.txt", "p.jsonl", "p.json", "p.csv", "p.toml"):
        for _ in range(60):
            text = "\n".join("".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(6))
            if name == "p.csv":
                text = f"prompt,seed\n{text}"
            try:
                for entry in entries_of(tmp_path, text, name):
                    assert (entry.error is None) == (entry.settings is not None)
            except ConfigError as error:
                assert "\n" not in str(error)


def test_parsing_imports_no_torch():
    code = (
        "import sys, ldm.render.prompts.files, ldm.render.jobs.jobs, ldm.render.output.manifest\n"
        "from ldm.render.prompts.files import read_entries\n"
        "entries = list(read_entries(['a --ss euler --spacing trailing --s 4 --w 64 --l 3']))\n"
        "assert entries[0].error is None, entries[0].error\n"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
