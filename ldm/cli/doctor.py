"""Describe this machine and installation on one page, for bug reports.

examples:
  ldm doctor                                       CPU, memory, GPU, torch, what auto picks, fonts, disk, hub, extras
  ldm doctor --json --offline                      as one JSON document, without asking whether the hub answers
  ldm doctor --paths                               with the folders of Python, the package and the caches

No name of a user or folder is shown unless --paths asks for it. The exit code is 3 where something is missing that
drawing needs.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--paths", action="store_true", help="show folders too, which may hold personal names")


def run(args: argparse.Namespace) -> int:
    import json

    from ldm.bench.machine import as_text, doctor

    found = doctor(offline=args.offline, paths=args.paths)
    print(json.dumps(found, indent=1, ensure_ascii=False) if args.json else as_text(found))
    return 3 if found["missing"] else 0
