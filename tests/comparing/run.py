"""What `compare_commits.py` makes of one commit: `python tests/comparing/run.py SECTION INPUTS OUT [--quick]`.

These files run with old and new code alike: they use what is public (ldm.Pipeline, ldm.render, ldm.finetune, ldm.train,
ldm.convert, the command line) and the oldest names of settings. Every case has a folder OUT/SECTION/CASE; an error is
written there as error.txt, and is a difference unless the other commit has the same.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import images  # noqa: F401
import prompt_files  # noqa: F401
import training  # noqa: F401
from registry import CASES, QUICK


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=CASES)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", action="append", default=[], help="only this one; may be given several times")
    args = parser.parse_args()
    os.chdir(args.inputs)
    import torch

    torch.set_num_threads(1)
    for name, function in CASES[args.section].items():
        if (args.case and name not in args.case) or (args.quick and (args.section, name) not in QUICK):
            continue
        folder, began = args.out / args.section / name, time.monotonic()
        folder.mkdir(parents=True)
        try:
            function(args.inputs, folder)
        except Exception as error:
            traceback.print_exc()
            (folder / "error.txt").write_text(f"{type(error).__name__}: {error}\n")
        print(f"{time.monotonic() - began:6.2f} s  {args.section}/{name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
