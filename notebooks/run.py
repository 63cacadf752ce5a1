"""Execute the notebooks from start to end and write their outputs, with a hash of the cells that made them.

python notebooks/run.py                 all of them; `python notebooks/run.py 01-generate` one
python notebooks/run.py --check         writes nothing: only whether every cell runs
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def cells_hash(notebook: dict[str, Any]) -> str:
    """sha256 of every cell's kind and source, in order: what the outputs were made by."""
    cells = [[cell["cell_type"], "".join(cell["source"])] for cell in notebook["cells"]]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def execute(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with new outputs, executed in an empty folder. Raises CellExecutionError where a cell fails."""
    import nbformat  # the tests read notebooks with this file, and need no Jupyter
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        cells = nbformat.reads(json.dumps(notebook), as_version=4)
        client = NotebookClient(cells, timeout=600, resources={"metadata": {"path": folder}})
        return json.loads(nbformat.writes(client.execute()))


def tidied(notebook: dict[str, Any]) -> dict[str, Any]:
    """Without what changes from run to run and what nobody reads again; images small; stamped."""
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            cell["outputs"] = [small(one) for one in cell["outputs"] if one.get("name") != "stderr"]  # progress bars
    notebook["metadata"] = METADATA | {"ldm": {"cells_sha256": cells_hash(notebook)}}
    return notebook


def small(output: dict[str, Any]) -> dict[str, Any]:
    """An output that has an image: that one alone, as a JPEG or a PNG of few colours, whichever is smaller."""
    data = output.get("data", {})
    if "image/png" in data:
        kind, encoded = recoded(base64.b64decode("".join(data["image/png"])))
        output["data"] = {kind: base64.b64encode(encoded).decode("ascii")}
        output["metadata"] = {}
    return output


def recoded(png: bytes) -> tuple[str, bytes]:
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    flat, photo = io.BytesIO(), io.BytesIO()
    image.quantize(64, dither=Image.Dither.NONE).save(flat, "PNG", optimize=True)
    image.save(photo, "JPEG", quality=85, optimize=True)
    return min(("image/png", flat.getvalue()), ("image/jpeg", photo.getvalue()), key=lambda pair: len(pair[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 01-generate (all of them)")
    parser.add_argument("--check", action="store_true", help="execute, and write nothing")
    parser.add_argument("--within", type=float, metavar="SECONDS", help="fail where all of them take longer")
    asked = parser.parse_args()
    known = {path.stem: path for path in NOTEBOOKS}
    if unknown := [name for name in asked.names if Path(name).stem not in known]:
        parser.error(f"no notebook {unknown[0]!r}: there are {', '.join(known)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    began = time.monotonic()
    for path in [known[Path(name).stem] for name in asked.names] or NOTEBOOKS:
        start, worked = time.monotonic(), os.times().children_user
        done = tidied(execute(json.loads(path.read_text(encoding="utf-8"))))
        cells = sum(cell["cell_type"] == "code" for cell in done["cells"])
        took, worked = time.monotonic() - start, os.times().children_user - worked
        print(f"{path.name}: {cells} cells in {took:.0f} s, {worked:.0f} s of CPU", flush=True)
        if not asked.check:
            path.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    seconds = time.monotonic() - began
    if asked.within and seconds > asked.within:
        print(f"{seconds:.0f} s are more than {asked.within:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
