"""The notebooks' outputs belong to their cells as they are now. `.ci/run` executes them."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))

from run import NOTEBOOKS, cells_hash, recoded  # noqa: E402

LIMIT = 1_500_000  # bytes of all notebooks
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_there_are_three_and_they_are_small():
    assert [path.stem for path in NOTEBOOKS] == ["01-generate", "02-how-it-works", "03-train-your-own"]
    assert sum(path.stat().st_size for path in NOTEBOOKS) <= LIMIT


@by_name
def test_the_outputs_are_those_of_the_cells(path):
    notebook = read(path)
    hint = f"python notebooks/run.py {path.stem}"
    assert notebook["metadata"]["ldm"]["cells_sha256"] == cells_hash(notebook), f"cells changed since: run {hint}"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in one.get("data", {}) or "image/jpeg" in one.get("data", {}) for one in outputs) >= 4
    assert not [output for output in outputs if output.get("name") == "stderr"]


@by_name
def test_it_ends_with_an_exercise_whose_answer_is_folded(path):
    last = read(path)["cells"][-1]
    text = "".join(last["source"])
    assert last["cell_type"] == "markdown" and text.startswith("## Exercise")
    assert "<details><summary>Answer</summary>" in text and text.rstrip().endswith("</details>")
    answer = text.split("```python\n")[1].split("```")[0]
    compile(answer, path.name, "exec")


def test_a_changed_cell_changes_the_hash():
    notebook = {"cells": [{"cell_type": "code", "source": ["a = 1\n", "a"], "outputs": []}]}
    before = cells_hash(notebook)
    notebook["cells"][0]["outputs"] = [{"output_type": "stream"}]
    notebook["cells"][0]["source"] = "a = 1\na"  # as Jupyter and nbformat may write it
    assert cells_hash(notebook) == before
    notebook["cells"][0]["source"] = ["a = 2\n", "a"]
    assert cells_hash(notebook) != before


def test_images_become_small():
    from io import BytesIO

    from PIL import Image

    noisy = Image.effect_noise((200, 200), 50).convert("RGB")
    data = BytesIO()
    noisy.save(data, "PNG")
    kind, small = recoded(data.getvalue())
    assert kind in ("image/png", "image/jpeg") and len(small) < len(data.getvalue()) / 2
    assert Image.open(BytesIO(small)).size == (200, 200)
