"""The README and the guides: every command is one that the program takes, and the `sh` blocks of the guides run."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from ldm.cli import main, parse
from ldm.errors import ConfigError

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDES]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def lines_of(page: Path, kinds: tuple[str, ...]) -> list[str]:
    blocks = [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind in kinds]
    return [line for text in blocks for line in text.splitlines() if line.strip()]


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)


COMMANDS = [(page.name, line) for page in PAGES for line in lines_of(page, ("", "sh")) if line.startswith("ldm ")]


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 50 and len(GUIDES) >= 9


@pytest.mark.parametrize("page, line", [pair for pair in COMMANDS if "…" not in pair[1]])
def test_each_command_is_one_that_the_program_takes(page, line):
    assert callable(parse(words_of(line)[1:]).run)


def test_a_misspelt_option_would_be_found():
    with pytest.raises(ConfigError, match="unknown option --stpes"):
        parse(words_of('ldm generate "a cat" --stpes 8')[1:])


@pytest.mark.parametrize("page", [page for page in GUIDES if lines_of(page, ("sh",))], ids=lambda page: page.stem)
def test_the_first_commands_of_a_guide_run(page, tmp_path, monkeypatch, capfd):
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    before = set(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    for line in lines_of(page, ("sh",)):
        if not line.startswith("ldm "):
            subprocess.run(["bash", "-c", line], check=True)
            continue
        code = main(words_of(line)[1:])
        assert code == 0, f"{line}\n{capfd.readouterr().err[-2000:]}"
    made = set(tmp_path.iterdir()) - before
    assert made or all("--dry-run" in line or "--text" in line for line in lines_of(page, ("sh",)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_readme_is_short_and_its_count_of_lines_is_right():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 170
    rooms = ("nn", "diffusion", "pipeline")
    lines = sum(len(path.read_text().splitlines()) for room in rooms for path in (ROOT / "ldm" / room).rglob("*.py"))
    (told,) = re.findall(r"\(([\d,]+) lines together\)", text)
    assert abs(int(told.replace(",", "")) - lines) <= 150, lines
