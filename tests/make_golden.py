"""Write the hashes of the golden set for this machine into ldm/render/replay/golden.json; those of other machines stay.

    python tests/make_golden.py
    python tests/make_golden.py --alone     the images changed: the hashes of other machines are dropped

Run it where a release means to change images, and say in CHANGELOG.md what changes.
"""

import json
import sys
from pathlib import Path

import ldm
from ldm.render.replay import golden


def main() -> None:
    path = Path(golden.__file__).with_name(golden.FILE)
    alone = "--alone" in sys.argv[1:] or not path.is_file()
    kept = {} if alone else json.loads(path.read_text(encoding="utf-8"))["hashes"]
    drawn = {golden.kind(): dict(golden.draw())}
    data = {"format": 1, "ldm": ldm.__version__, "hashes": dict(sorted((kept | drawn).items()))}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {golden.kind()}")


if __name__ == "__main__":
    main()
