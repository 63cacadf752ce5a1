"""The page of a run: what it shows, that it is safe to open, and that it is there while the run goes."""

import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from tests.training.toy import Toy, train_toy


class Page(HTMLParser):
    """The tags, texts and what is asked for of a page; raises where a tag is not closed."""

    VOID = ("meta", "img", "br", "rect", "line", "polyline", "polygon")

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.texts, self.links = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


class Noisy(Toy):
    def __init__(self, *given):
        super().__init__(*given)
        self.lines = ["12 found", "11 used, 1 skipped: <script>alert(1)</script> & more"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mine <b>"
    train_toy(out, kind=Noisy)
    return out


def test_it_shows_curves_pictures_settings_counts_speed_and_the_best_step(run):
    page = Page(run / "index.html")
    assert "mine <b>: toy, done" in page.text and "12 of 12" in page.text
    assert re.search(r"samples a second \d", page.text)
    assert "best checkpoint, by validation_loss step 12: 1.322" in page.text
    assert "11 used, 1 skipped: <script>alert(1)</script> & more" in page.text
    assert re.search(r"learning_rate 0\.05 ", page.text) and "decay_from 0.6" in page.text
    assert page.tags.count("svg") == 3  # both losses, the validation loss, the learning rate
    assert [unquote(link) for link in page.links] == [f"samples/step-{n:08d}.png" for n in (12, 8, 4, 0)]
    assert all((run / link).is_file() for link in page.links)


def test_it_runs_nothing_and_asks_nothing_of_a_network(run):
    text = (run / "index.html").read_text()
    page = Page(run / "index.html")
    assert "script" not in page.tags and not re.search(r"\son\w+=", text)
    assert "default-src 'none'" in text
    assert not [link for link in page.links if ":" in link or link.startswith("/")]
    assert 'http-equiv="refresh"' not in text  # nothing more is to come


def test_it_is_written_while_the_run_goes_and_tells_how_it_ended(tmp_path):
    seen, run = [], tmp_path / "run"

    def look(step, micro):
        seen.append((run / "index.html").read_text())
        if step == 9:
            raise RuntimeError("a cable was pulled")

    with pytest.raises(RuntimeError):
        train_toy(run, inside=look)
    assert "toy, running" in seen[0] and "0 of 12" in seen[0] and 'content="60"' in seen[0]
    assert "8 of 12" in seen[9] and "left, scores aside" in seen[9]
    page = Page(run / "index.html")
    assert "stopped: a cable was pulled" in page.text and "9 of 12" in page.text
    train_toy(run, "latest")
    assert "toy, done" in Page(run / "index.html").text


def test_of_many_grids_some_are_shown(tmp_path):
    train_toy(tmp_path / "run", steps=60, validate_every=1, save_every=100, log_every=60)
    page = Page(tmp_path / "run" / "index.html")
    assert len(page.links) == 24 and "(24 of 61)" in page.text
    assert page.links[0].endswith("60.png") and page.links[-1].endswith("00.png")
