"""The gallery and the contact sheets: hostile texts stay texts, commands say the settings, failures are listed."""

import json
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from PIL import Image
from prompt_files import jobs_of

from ldm.cli import parse
from ldm.errors import ConfigError, NumericsError
from ldm.images import encode
from ldm.render.jobs.jobs import Shard
from ldm.render.output.folder import failures, finished
from ldm.render.output.manifest import Manifest, Report
from ldm.render.prompts.files import read_entries
from ldm.render.sheets.contact import write_contact_sheets
from ldm.render.sheets.gallery import command, write_gallery

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"double\" and 'single' quotes, $HOME `id` $(id) \\ !history",
    "two\nlines\tand a tab",
    "<!-- <script> --> &amp; ]]> {{x}} %s",
    "emoji \U0001f408, a separator \u2028 and é",
    "-rf --seed 3",
    "-- a dash",
    "--from x.png",
    "",
    " spaces ",
    "-n4",
    "a" * 5000,
]


def colour(i):
    return (10 + 9 * i % 240, 240 - 11 * i % 230, 7 * i % 250)


def render(folder, prompts, fail=(), shard=None, **options):
    jobs = jobs_of(prompts, shard=shard, **options)
    with Manifest(folder, shard) as ledger, Report(folder, shard) as report:
        for job in jobs:
            if job.index in fail:
                ledger.fail(job, NumericsError("the image holds <b>NaN</b>"))
            else:
                ledger.save(job, encode(Image.new("RGB", (128, 128), colour(job.index))))
        for entry in read_entries(["x --steps y</script>"]):
            report.bad_line(entry)
    return jobs


class Reader(HTMLParser):
    """What a browser's parser makes of a page: (tag, attributes, text) of each element in order."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.inside = [], False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        self.inside = True

    def handle_endtag(self, _tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.elements[-1][2] += data

    def one(self, tag, **attributes):
        (found,) = [e for e in self.elements if e[0] == tag and attributes.items() <= e[1].items()]
        return found[2]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """(the folder, its jobs, the page as parsed, its data)"""
    folder = tmp_path_factory.mktemp("<b>title & 'name'")
    prompts = [{"prompt": text, "negative_prompt": text, "seed": i} for i, text in enumerate(HOSTILE)]
    prompts.append({"prompt": "named", "name": "odd #%?& é name", "seed": 99, "steps": 3})
    jobs = render(folder, prompts, fail=(3,))
    page = Reader(write_gallery(folder).read_text(encoding="utf-8"))
    return folder, jobs, page, json.loads(page.one("script", id="data"))


def test_hostile_prompts_are_data_and_nothing_else(gallery):
    folder, jobs, page, data = gallery
    drawn = [job for job in jobs if job.index != 3]
    assert [picture["settings"]["prompt"] for picture in data["images"]] == [job.settings["prompt"] for job in drawn]
    assert [{**data["common"], **picture["settings"]} for picture in data["images"]] == [job.settings for job in drawn]
    assert [tag for tag, _, _ in page.elements].count("script") == 2  # the data and the script
    assert page.one("title") == data["title"] == folder.name
    assert not [e for e in page.elements if {"src", "href", "onerror", "onclick", "style"} & set(e[1])]


def test_the_page_may_load_nothing_but_pictures_beside_it(gallery):
    import base64
    import hashlib

    folder, _, page, _ = gallery
    policy = next(e[1]["content"] for e in page.elements if e[1].get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "'self' file:"
    (script,) = [text for tag, attributes, text in page.elements if tag == "script" and not attributes]
    for text, rule in ((script, "script-src"), (page.one("style"), "style-src")):
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    source = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]|url\(|@import|innerHTML|eval\(", source)


def test_every_picture_is_there_under_its_name(gallery):
    folder, _, _, data = gallery
    for picture in data["images"]:
        assert unquote(picture["url"]) == picture["file"] and (folder / picture["file"]).is_file()
        assert not re.search(r"[^\w.%/~-]", picture["url"], re.ASCII)
    assert "odd-#%-&-é-name.png" in [picture["file"] for picture in data["images"]]


def test_failures_are_listed(gallery):
    _, jobs, _, data = gallery
    assert data["failures"][0] == f"{jobs[2].where}: the image holds <b>NaN</b>"
    assert "expected a whole number" in data["failures"][1] and len(data["failures"]) == 2


def test_commands_say_the_settings_again(gallery):
    _, jobs, _, data = gallery
    drawn = [job for job in jobs if job.index != 3]
    for picture, job in zip(data["images"], drawn, strict=True):
        words = shlex.split(picture["command"])
        assert words[:2] == ["ldm", "generate"]
        args = vars(parse(words[1:]))
        assert {name: args[name] for name in job.settings} == job.settings


ALL = {
    "model": "my models/x.safetensors",
    "vae": "-v",
    "dtype": "bf16",
    "guidance_scale": 6.25,
    "seed": 2**62,
    "eta": 0.5,
}
ALL |= {"num_inference_steps": 9, "height": 64, "width": 32, "sampler": "ddim", "spacing": "leading", "guidance": "pag"}
ALL |= {"guidance_rescale": 0.7, "guidance_interval": [0.0, 0.8], "pag_scale": 1e-07, "pag_layers": ["mid", "up.1"]}
ALL |= {"clip_skip": 1, "emphasis": "no_norm", "timesteps": [900.0, 1.5], "sigmas": [14.5, 0.1]}
ALL |= {"apg_eta": 0.1, "apg_momentum": -0.5, "apg_threshold": 3.0, "zero_init_steps": 1, "negative_prompt": "-x: 'y'"}


def test_every_option_goes_through_the_commands_own_parser():
    loras = [["a b.safetensors", 0.8], ["odd:name.safetensors", -1.5]]
    args = vars(parse(shlex.split(command({"prompt": "-p", **ALL, "lora": loras}, "x.png"))[1:]))
    expected = {"prompt": "-p", **ALL, "lora": [tuple(lora) for lora in loras], "pag_layers": ("mid", "up.1")}
    expected |= {"timesteps": (900.0, 1.5), "sigmas": (14.5, 0.1)}
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("setting", [{"vortex": 1}, {"negative_prompt": None}, {"vortex": None, "x": []}, {"seed": {}}])
def test_what_no_option_says_is_drawn_from_the_file(setting):
    words = shlex.split(command({"prompt": "a cat", **setting}, "-it's.png"))
    assert words == ["ldm", "generate", "--from", "./-it's.png"]
    assert parse(words[1:]).source == "./-it's.png"


def test_odd_manifests_make_a_page_all_the_same(tmp_path):
    jobs = render(tmp_path, ["a", "b", "c"])
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    lines[0]["settings"] |= {
        "prompt": 5,
        "x": [1, {"y": float("nan")}],
        "guidance_scale": float("inf"),
        "lone": "\ud800",
    }
    lines[1]["path"] = "../outside.png"
    lines[2]["index"] = "x"
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "manifest.jsonl").write_text(f"{text}\nnull\n[]\n{{}}\nnot json\n")
    (tmp_path / "report-1-of-2.jsonl").write_text("[1]\nnull\n{}\n")
    data = json.loads(Reader(write_gallery(tmp_path).read_text()).one("script", id="data"))
    assert len(data["images"]) == 2 and len(jobs) == 3 and data["images"][0]["number"] == "x"
    assert len(write_contact_sheets(tmp_path)) == 1


def test_shards_are_merged_and_a_retried_job_is_no_failure(tmp_path):
    prompts = [f"picture {i} --d {i}" for i in range(12)]
    for number in (1, 2, 3):
        render(tmp_path, prompts, fail=(5,), shard=Shard(number, 3))
    assert len(finished(tmp_path)) == 11 and len(failures(tmp_path)) == 2  # one bad line, told by three shards
    render(tmp_path, prompts)
    assert [line["index"] for line in finished(tmp_path)] == list(range(1, 13)) and len(failures(tmp_path)) == 1


def test_a_folder_that_was_not_rendered_is_refused(tmp_path):
    for write in (write_gallery, write_contact_sheets):
        with pytest.raises(ConfigError, match=r"holds no manifest\.jsonl"):
            write(tmp_path)


def test_contact_sheets_show_every_picture_in_order_and_old_pages_go(tmp_path):
    render(tmp_path, [f"picture {i}" for i in range(14)])
    pages = write_contact_sheets(tmp_path, columns=3, rows=2)
    assert [page.name for page in pages] == ["page-001.jpg", "page-002.jpg", "page-003.jpg"]
    found = []
    for page in pages:
        with Image.open(page) as image:
            for row in range(image.height // 192):
                found += [image.getpixel((72 + 136 * column, 72 + 192 * row)) for column in range(3)]
    near = [min(range(1, 15), key=lambda i: sum(abs(a - b) for a, b in zip(colour(i), pixel))) for pixel in found[:14]]
    assert near == list(range(1, 15))
    (tmp_path / "contact" / "mine.jpg").touch()
    assert len(write_contact_sheets(tmp_path)) == 1
    assert sorted(path.name for path in (tmp_path / "contact").iterdir()) == ["mine.jpg", "page-001.jpg"]
    with pytest.raises(ConfigError, match="columns"):
        write_contact_sheets(tmp_path, columns=0)


@pytest.mark.skipif(not shutil.which("node"), reason="there is no node to read the script")
def test_the_script_shows_searches_and_pages(gallery, tmp_path):
    """The script in node, with a document of a few lines: what is asked of it is asked of any browser."""
    _, _, page, data = gallery
    (script,) = [text for tag, attributes, text in page.elements if tag == "script" and not attributes]
    stand_in = """
class Element {
  constructor(tag) { this.tag = tag; this.children = []; this.heard = {}; this.value = ""; this.textContent = ""; }
  append(...more) { for (const one of more) this.children.push(...(one.tag === "#part" ? one.children : [one])); }
  replaceChildren(...more) { this.children = more; }
  addEventListener(name, heard) { this.heard[name] = heard; }
  getBoundingClientRect() { return { top: 0 }; }
  querySelector(selector) { return known(this.tag + " " + selector); }
  showModal() { this.open = true; }
}
const all = {};
const known = (selector) => all[selector] ??= new Element(selector);
globalThis.document = { createElement: (tag) => new Element(tag), createDocumentFragment: () => new Element("#part"),
  getElementById: (id) => known("#" + id), querySelector: known, addEventListener() {} };
globalThis.innerHeight = 100;
globalThis.addEventListener = () => {};
globalThis.IntersectionObserver = class { observe() {} };
known("#data").textContent = DATA;
"""
    asked = """
const pictureNames = () => known("#images").children.map((figure) => figure.children[0].children[0].src);
const answers = { all: pictureNames(), title: known("#title").textContent };
answers.failures = known("#failures ul").children.length;
known("#search").value = "NAMED num_inference_steps:3";
known("#search").heard.input();
answers.found = pictureNames();
answers.count = known("#count").textContent;
known("#images").children[0].children[0].heard.click();
answers.command = known("#one pre").textContent;
answers.rows = known("#one table").children.map((row) => row.children.map((cell) => cell.textContent));
console.log(JSON.stringify(answers));
"""
    stand_in = stand_in.replace("DATA", json.dumps(json.dumps(data)))
    (tmp_path / "page.js").write_text(stand_in + script.replace('"use strict";', "") + asked, encoding="utf-8")
    done = subprocess.run(["node", tmp_path / "page.js"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answers, last = json.loads(done.stdout), data["images"][-1]
    assert answers["all"] == [picture["url"] for picture in data["images"]] and answers["failures"] == 2
    assert answers["found"] == [last["url"]] and answers["count"] == f"1 of {len(data['images'])} images"
    assert answers["command"] == last["command"] and ["prompt", "named"] in answers["rows"]
    assert answers["title"] == data["title"]
