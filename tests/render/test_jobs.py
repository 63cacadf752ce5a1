"""Jobs: keys and seeds that do not depend on what stands above, names that stay in their folder."""

import hashlib
import json
import random
import subprocess
import sys
import unicodedata

import pytest
from prompt_files import MODEL, jobs_of, resolve

from ldm.errors import ConfigError
from ldm.render.jobs.digest_table import Table
from ldm.render.jobs.filenames import safe_name
from ldm.render.jobs.jobs import Job, Plan, Shard, canonical
from ldm.render.prompts.entry import Entry
from ldm.render.prompts.files import read_entries
from ldm.render.prompts.templates import Wildcards


def identity(jobs):
    return [(job.key, dict(job.settings)) for job in jobs]


def test_a_line_inserted_above_changes_nothing_below():
    lines = ["a cat", "a {red|blue} dog --s 9", "a cat", {"prompt": "x", "num_images": 3}, "a cat --d 5"]
    before = identity(jobs_of(lines, wildcards=Wildcards()))
    for position in range(len(lines) + 1):
        for new in ("a bird", "a cat", "a {red|blue} dog", "a cat --s 3", "x --d 4", "x"):
            after = identity(jobs_of([*lines[:position], new, *lines[position:]], wildcards=Wildcards()))
            assert len(after) == len(before) + 1 and all(job in after for job in before)
            if new not in ("a cat", "x"):  # these change places with their equals
                assert [job for job in after if job in before] == before


def test_equal_lines_are_different_pictures_and_swapping_them_changes_nothing():
    lines = ["a cat"] * 50
    jobs = jobs_of(lines)
    assert len({job.key for job in jobs}) == len({job.seed for job in jobs}) == 50
    assert identity(jobs_of(lines[:20])) == identity(jobs)[:20]
    explicit = jobs_of(["a cat --d 7", "a cat --d 7 --s 25", "a cat --seed 7"])  # all three resolve to the same
    assert len({job.key for job in explicit}) == 3 and {job.seed for job in explicit} == {7}


def test_how_a_line_is_written_does_not_matter():
    ways = ["a cat --s 9 --n bad", "--prompt a cat --steps 9 --negative_prompt bad", 'a   cat  --n "bad" --s 9']
    ways = [
        ways[0],
        ways[1],
        {"negative_prompt": "bad", "num_inference_steps": 9, "text": "a cat"},
        "a cat --neg bad --s 9.0",
    ]
    keys = [identity(jobs_of([way])) for way in ways]
    assert keys.count(keys[0]) == len(keys)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a cat "},
        {"negative_prompt": ""},
        {"steps": 26},
        {"cfg": 6.5},
        {"w": 64},
        {"sampler": "ddim"},
        {"seed": 8},
    ],
)
def test_every_setting_is_in_the_key(change):
    group = {"prompt": "a cat", "seed": 7}
    assert jobs_of([group])[0].key != jobs_of([{**group, **change}])[0].key


def test_the_models_hash_is_in_the_key_and_its_path_is_not():
    def moved(settings):
        return {**MODEL, **settings}, {"model": "another"}

    here, there = ({"prompt": "a", "seed": 1, "model": name} for name in ("x/model", "y/model"))
    assert jobs_of([here])[0].key == jobs_of([there])[0].key != jobs_of([here], resolve=moved)[0].key


def test_defaults_are_what_a_line_does_not_say_and_leave_its_seed():
    plain, given = (
        jobs_of(["a cat", "a dog --s 3"], defaults) for defaults in ({}, {"num_inference_steps": 9, "num_images": 2})
    )
    assert [job.settings["num_inference_steps"] for job in given] == [9, 9, 3, 3]
    assert [job.seed for job in given[::2]] == [job.seed for job in plain]
    assert [job.seed for job in given[1::2]] == [job.seed + 1 for job in plain]
    other = jobs_of(["a cat", "a dog --s 3"], run_seed=1)
    assert all(a.seed != b.seed for a, b in zip(plain, other))


def test_seeds_of_several_pictures():
    def seeds(line):
        return [job.seed for job in jobs_of([line])]

    assert seeds("a --d 7 --num_images 3") == [7, 8, 9]
    assert seeds("a --d 3,1-2") == [3, 1, 2]
    drawn = seeds("a")
    assert seeds("a --d -1") == drawn and seeds("a --num_images 3") == [drawn[0] + k for k in range(3)]
    assert seeds("a --d 5,-1") == [5, drawn[0] + 1] and 0 <= drawn[0] < 2**32


def test_each_picture_expands_by_its_own_seed():
    line = {"prompt": "{a|b|c|d|e|f}", "negative_prompt": "{x|y}"}
    jobs = jobs_of([{**line, "num_images": 40}], wildcards=Wildcards())
    assert {job.settings["prompt"] for job in jobs} == set("abcdef")
    assert {job.settings["negative_prompt"] for job in jobs} == set("xy")
    again = jobs_of(
        [{"prompt": "{a|b|c|d|e|f}", "negative_prompt": "{x|y}", "seed": jobs[7].seed}], wildcards=Wildcards()
    )
    assert again[0].settings == jobs[7].settings and again[0].key == jobs[7].key
    assert jobs_of(["{a|b}"])[0].settings["prompt"] == "{a|b}"  # replayed: no templates


def test_keys_and_seeds_are_hashes_of_these_very_texts():
    """Folders of every release are resumed: what is hashed is written out here, and may not change."""
    line = '{"negative_prompt":"bad","prompt":"a cat\'s eye, été"}'
    seed = int(hashlib.sha256(f"0:0:{line}".encode()).hexdigest()[:16], 16) % (2**32 - 100_000)
    resolved = '{"guidance_scale":5,"height":128,"model":"sha-of-the-model","negative_prompt":"bad",'
    resolved += '"num_inference_steps":25,"prompt":"a cat\'s eye, été","sampler":"euler","seed":SEED,"width":128}'
    resolved = resolved.replace("SEED", str(seed))
    given = '{"guidance_scale":7,"height":128,"model":"sha-of-the-model","num_inference_steps":25,"prompt":"b",'
    given += '"sampler":"euler","seed":3,"width":128}'
    prompts = ["a cat's eye, été --n bad", {"prompt": "b", "cfg": 7, "seed": 3}, {"prompt": "b", "cfg": 7, "seed": 3}]
    jobs = jobs_of(prompts, {"guidance_scale": 5.0})
    assert [job.seed for job in jobs] == [seed, 3, 3]
    for job, text, equal_before in zip(jobs, (resolved, given, given), (0, 0, 1)):
        content = hashlib.sha256(text.encode()).digest()
        assert job.key == hashlib.sha256(content + equal_before.to_bytes(8, "big")).hexdigest()[:32]
    assert [job.key for job in jobs[:2]] == ["ea782057d541fb9274783d5de9b41212", "bec400593863909a8d7a99f5af81eaad"]


def test_variations_of_a_line_share_its_seed_and_count_their_own(tmp_path):
    """As generate's, so that A1111's lines give A1111's images."""

    def seeds(line, defaults=None):
        return [(job.seed, job.settings["variation_seed"]) for job in jobs_of([line], defaults)]

    varied = {"prompt": "a", "subseed": 5, "subseed_strength": 0.3, "num_images": 3}
    assert seeds({**varied, "seed": 7}) == [(7, 5), (7, 6), (7, 7)]
    (drawn,) = {seed for seed, _ in seeds(varied)}
    assert seeds(varied) == [(drawn, 5), (drawn, 6), (drawn, 7)]
    assert seeds({**varied, "seed": [1, 2, 9]}) == [(1, 5), (2, 6), (9, 7)]
    by_option = {"variation_seed": 5, "variation_strength": 0.3, "num_images": 2}
    assert seeds("a --d 7", by_option) == [(7, 5), (7, 6)]


def test_bad_lines_are_counted_and_what_the_model_refuses_is_one():
    def picky(settings):
        if settings.get("width") == 100:
            raise ConfigError("100 is not a multiple of 8", where="width", hint="use 96 or 104")
        return resolve(settings)

    lines = ["a", "b --w 100", "c --s 0", "d --n {d", "e --num_images 2"]
    plan = Plan(read_entries(lines), {}, picky, wildcards=Wildcards())
    items = list(plan)
    assert (plan.lines, plan.bad, plan.jobs, plan.other_shards) == (5, 3, 3, 0)
    assert [str(item.error) for item in items if isinstance(item, Entry)] == [
        "prompts, entry 2 (width): 100 is not a multiple of 8; use 96 or 104",
        "prompts, entry 3 (s): 0 is outside 1 to 1000",
        "prompts, entry 4 (negative_prompt): the { at character 1 is not closed; write \\{ for text",
    ]
    assert [item.index for item in items if isinstance(item, Job)] == [1, 2, 3]


def test_shards_share_the_jobs_out():
    lines = [f"line {i % 150} --num_images 2 --f same" for i in range(200)]
    whole = jobs_of(lines)
    plans = [Plan(read_entries(lines), {}, resolve, shard=Shard(i, 3)) for i in (1, 2, 3)]
    parts = [list(plan) for plan in plans]
    assert sorted((job for part in parts for job in part), key=lambda job: job.index) == whole
    assert all(80 < len(part) < 190 and plan.other_shards == 400 - len(part) for part, plan in zip(parts, plans))
    assert len({job.stem.casefold() for job in whole}) == 400


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3/5", ""])
def test_shards_that_are_none(text):
    with pytest.raises(ConfigError, match="is no shard"):
        Shard.read(text)


def test_shard_words():
    assert Shard.read(" 2/3 ") == Shard(2, 3) and Shard(2, 3).file("manifest") == "manifest-2-of-3.jsonl"
    assert Shard().file("manifest") == "manifest.jsonl"


# Names

HOSTILE = [
    *("..", ".", "../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "C:\\x", "C:x", "\\\\host\\share", "~/x", "~root"),
    *("-rf", "--", ".hidden", "...", ". .", " ", "a\tb", "a\nb", "con", "CON.png", "Nul", "com1.x.y", "LPT¹", "aux ."),
    *(
        "x" * 5000,
        "é" * 500,
        "e\u0301" * 500,
        "👨‍👩‍👧‍👦" * 90,
        "\u202egnp.exe",
        "a\u200bb",
        "a\u2028b",
        "\ufeffx",
        "％２ｅ％２ｅ／",
    ),
    *(
        "..%2f..%2fx",
        "$(rm -rf)",
        "`x`",
        "a;b|c&d",
        'q"q',
        "<script>",
        "*?",
        "name.PNG",
        "a.jpeg.png",
        ".png",
        "x.tar.gz",
    ),
    *("manifest.jsonl", ".lock", ".render", "000001-0123456789ab", "a.", "a ", "\u0338/", "／", "∕", "․․", "ＣＯＮ"),
]


def hostile_names(count):
    rng = random.Random(0)
    alphabet = [
        *"./\\-~ :*?\"<>|%$`';&\u00e9\u0301\u202e\u200d\u2044",
        "..",
        "../",
        "con",
        "nul.",
        "👩",
        "a",
        "B",
        "\u212a",
        "ß",
    ]
    made = ["".join(rng.choices(alphabet, k=rng.randrange(1, 60))) for _ in range(count - len(HOSTILE))]
    return [name if name.strip() else "x" for name in HOSTILE + made]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_safe_name_is_safe(name):
    safe = safe_name(name)
    assert safe == unicodedata.normalize("NFC", safe) and len(safe.encode()) <= 121
    assert (
        not set(safe) & set('/\\:*?"<>|\0')
        and not safe.startswith((".", "-", "~", " "))
        and not safe.endswith((".", " "))
    )
    assert ".." not in safe and all(unicodedata.category(c)[0] not in "CZ" for c in safe)
    assert safe.split(".")[0].rstrip(" ").upper() not in {"CON", "NUL", "AUX", "PRN", "COM1", "LPT1", "LPT¹"}


def test_names_people_give_stay_as_they_are():
    for name in ("my-cat_01", "Katze", "猫", "été 2024".replace(" ", "-"), "v1.5-test", "a(b)[c]"):
        assert safe_name(name) == name
    assert safe_name("my cat.PNG") == "my-cat" and safe_name("a/b") == "a-b" and safe_name("x.tar") == "x.tar"


def test_hostile_names_of_5000_lines_are_distinct_and_stay_in_the_folder(tmp_path):
    """Faults G 60."""
    folder = tmp_path / "out"
    folder.mkdir()
    jobs = jobs_of([{"prompt": "x", "name": name} for name in hostile_names(5000)])
    stems = [stem for job in jobs for stem in job.stems()]
    assert len({unicodedata.normalize("NFKC", job.stem).casefold() for job in jobs}) == 5000
    for stem in stems:
        path = folder / f"{stem}.png"
        assert path.resolve().parent == folder and len(path.name.encode()) <= 180
    for job in jobs:
        (folder / f"{job.stem}.png").touch(exist_ok=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"] and len(list(folder.iterdir())) == 5000


def test_names_keep_to_their_line():
    jobs = jobs_of(["a --f cat --num_images 2", "b --f Cat", "c --f cat.png", "d"])
    assert [job.stem for job in jobs[:2]] == ["cat", "cat-2"]
    assert jobs[2].stem == f"Cat-{jobs[2].key[:8]}" and jobs[3].stem == f"cat-{jobs[3].key[:8]}"
    assert jobs[4].stem == f"000005-{jobs[4].key[:12]}"
    assert jobs_of(["a"])[0].key == jobs_of(["a --f x"])[0].key  # a name changes no picture


# Memory


def test_table_agrees_with_a_dict():
    rng, table, known = random.Random(0), Table(8), {}
    for _ in range(5000):
        digest = (2 * rng.randrange(900)).to_bytes(8, "big") if rng.random() < 0.5 else rng.randbytes(16)
        digest = digest if rng.random() < 0.9 else bytes(8)
        assert table.count(digest) == known.get(digest[:8], 0)
        known[digest[:8]] = known.get(digest[:8], 0) + 1
    assert len(table) <= len(known) and table.get(b"\xff" * 8) is None
    assert all(table.get(d) == n for d, n in known.items() if int.from_bytes(d, "big") > 1)
    table.set(b"x" * 8, 2**64 - 1)
    assert table.get(b"x" * 8) == 2**64 - 1


MEASURE = """
import resource, sys
from ldm.render.jobs.jobs import Plan
from ldm.render.prompts.files import read_entries
plan = Plan(read_entries(sys.argv[1]), {}, lambda s: ({**s, "height": 128}, {"model": "x"}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for job in plan:
    pass
print(plan.jobs, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def memory_of(tmp_path, lines):
    """(jobs, KiB above the start) of going through a file of so many different lines."""
    path = tmp_path / "many.txt"
    with path.open("w") as handle:
        handle.writelines(f"picture number {i} of a cat --s {i % 50 + 1} --f name{i}\n" for i in range(lines))
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split()))


def test_memory_of_many_lines(tmp_path):
    jobs, kib = memory_of(tmp_path, 10_000)
    assert jobs == 10_000 and kib < 6 * 1024  # texts or jobs that were kept would need 10 MiB


@pytest.mark.slow
def test_memory_of_a_million_lines(tmp_path):
    """Faults G 61, 65."""
    jobs, kib = memory_of(tmp_path, 1_000_000)
    assert jobs == 1_000_000 and kib < 300 * 1024


def test_canonical_is_one_text_for_one_value():
    assert canonical({"b": 7.0, "a": (1, "é")}) == canonical({"a": [1, "é"], "b": 7}) == '{"a":[1,"é"],"b":7}'.encode()
    assert json.loads(canonical({"x": 0.1})) == {"x": 0.1}
    with pytest.raises(ValueError):
        canonical({"x": float("nan")})
