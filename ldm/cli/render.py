"""Draw every picture that a prompt file asks for.

examples:
  ldm render prompts.txt -o pictures/
  ldm render prompts.csv -o pictures/ --steps 40 --seed 7 --strict
  ldm render prompts.txt -o pictures/ --dry-run    what would be done, and how long it may take
  ldm render prompts.txt -o pictures/ --shard 2/3  the second third, on the second of three machines
  ldm render prompts.txt -o pictures/ --ray auto   on all machines of a Ray cluster (pip install 'ldm-pipeline[ray]')
  ls animals/ | ldm render - -o pictures/
  ldm render --from pictures/ --set steps=50 -o again/
  ldm render prompts.txt -o grid/ --grid "steps=4,8,16" --grid "sampler=euler,DPM++ 2M"
  ldm render prompts.txt -o pictures/ --gallery    and a page of all pictures, index.html

A line is a prompt; it may say more: `a cat --n blurry --w 512 --h 512 --d 7 --s 30 --l 6`, `--prompt a cat --steps 30`,
{"prompt": "a cat", "seed": 7}; or columns of a .csv, tables of a .toml. # begins a comment. {red|blue} and
__colours__ (a line of FOLDER/colours.txt, with --wildcards FOLDER) are chosen by the seed. Options are for lines that
do not say it themselves. A run that was stopped is taken up by the same command, and no picture is drawn twice.
DIR/manifest.jsonl tells of every picture, DIR/report.jsonl of what is wrong: bad lines are named and the others drawn
(exit code 3).
"""

from __future__ import annotations

import argparse

from ldm.cli.options import MODEL, SAMPLING, add_editing, add_model, add_sampling, names_of
from ldm.pipeline.keywords import EDITING_WORDS

OF_RUN = ("seed", "wildcards", "batch_size", "shard", "ray", "strict", "dry_run")
OF_RUN += ("sources", "changes", "grid", "gallery", "contact_sheet")
OF_LINES = ("num_images", "negative_prompt", *SAMPLING, *EDITING_WORDS, *MODEL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompts", metavar="PROMPTS", nargs="?", help=".txt .jsonl .json .csv .tsv .toml; - is standard input")
    add("-o", "--output", metavar="DIR", required=True, help="the folder of the pictures")
    add("--seed", type=int, default=0, metavar="N", help="of the run: lines without a seed get theirs from it (0)")
    add("-n", *names_of("num_images"), type=int, metavar="N", help="pictures of a line (1)")
    add("--wildcards", metavar="FOLDER", help="where __name__ in prompts finds name.txt")
    add("--batch-size", type=int, metavar="N", help="pictures drawn together (by free memory); changes no picture")
    add("--shard", metavar="I/N", help="draw only this part of the file")
    add("--ray", metavar="ADDRESS", help="draw on a Ray cluster: host:port, auto, or local (starts one here)")
    add("--strict", action="store_true", help="draw nothing if a line is bad")
    add("--dry-run", action="store_true", help="print what would be drawn and an estimate, write nothing")
    add("--format", metavar="NAME", default="png", help="png, jpg, webp (png)")
    add("--no-metadata", action="store_true", help="write nothing about prompt and settings into the files")
    sources = "draw these pictures, manifests or rendered folders again"
    add("--from", dest="sources", metavar="FILE", action="append", default=[], help=sources)
    changes = "with --from: another value for all of them; may be given several times"
    add("--set", dest="changes", metavar="KEY=VALUE", action="append", default=[], help=changes)
    axis = "draw every prompt with each value, and a sheet of them; up to three axes"
    add("--grid", metavar="KEY=A,B,…", action="append", default=[], help=axis)
    add("--gallery", action="store_true", help="write DIR/index.html: all pictures, with search and settings")
    add("--contact-sheet", action="store_true", help="write DIR/contact/page-001.jpg, …: all pictures, small")
    add_sampling(parser)
    add_editing(parser)
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    from ldm.render.drawing.runner import render

    words = {name: getattr(args, name) for name in (*OF_RUN, *OF_LINES)}
    found = render(args.prompts, args.output, format=args.format, metadata=not args.no_metadata, **words)
    return found.exit_code
