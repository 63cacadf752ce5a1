"""Draw every image of a prompt file.

examples:
  ldm render prompts.txt -o images/
  ldm render prompts.csv -o images/ --seed 7 --fast  in four steps, by the shipped few-step LoRA
  ldm render prompts.txt -o images/ --dry-run    what would be done, and how long it may take
  ldm render prompts.txt -o images/ --shard 2/3  the second third, on the second of three machines
  ldm render prompts.txt -o images/ --ray auto   on all machines of a Ray cluster (pip install 'ldm-pipeline[ray]')
  ls animals/ | ldm render - -o images/
  ldm render --from images/ --set steps=50 -o again/
  ldm render prompts.txt -o grid/ --grid "steps=4,8,16" --grid "sampler=euler,DPM++ 2M"
  ldm render prompts.txt -o images/ --gallery    and a page of all images, index.html

A line is a prompt, and may hold settings: `a cat --n blurry --w 512 --h 512 --d 7 --s 30 --l 6`,
`--prompt a cat --steps 30`, {"prompt": "a cat", "seed": 7}; or columns of a .csv, tables of a .toml. # begins a
comment. {red|blue} and __colours__ (a line of FOLDER/colours.txt, with --wildcards FOLDER) are chosen by the seed.
Options are for lines that leave these settings out. A run that was stopped goes on by the same command, and no image
is drawn twice.
DIR/manifest.jsonl has a line for every image, DIR/report.jsonl for all that is wrong: the rest is drawn (exit code 3).
"""

from __future__ import annotations

import argparse
import inspect

from ldm.cli.options import add_drawing, names_of, with_controls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option under the name of render's keyword."""
    add = parser.add_argument
    add("prompts", metavar="PROMPTS", nargs="?", help=".txt .jsonl .json .csv .tsv .toml; - is standard input")
    add("-o", "--output", metavar="DIR", required=True, help="the folder of the images")
    add("--seed", type=int, default=0, metavar="N", help="of the run: lines without a seed get theirs from it (0)")
    add("-n", *names_of("num_images"), type=int, metavar="N", help="images of a line (1)")
    add("--wildcards", metavar="FOLDER", help="where __name__ in prompts finds name.txt")
    add("--batch-size", type=int, metavar="N", help="images drawn together (by free memory); changes no image on a CPU")
    add("--shard", metavar="I/N", help="draw only this part of the file")
    add("--ray", metavar="ADDRESS", help="draw on a Ray cluster: host:port, auto, or local (starts one here)")
    add("--strict", action="store_true", help="draw nothing if a line is bad")
    add("--dry-run", action="store_true", help="print what would be drawn and an estimate, write nothing")
    add("--format", metavar="NAME", default="png", help="png, jpg, webp (png)")
    add("--no-metadata", dest="metadata", action="store_false", help="no prompt and settings in the files")
    sources = "draw these images, manifests or rendered folders again"
    add("--from", dest="sources", metavar="FILE", action="append", default=[], help=sources)
    changes = "with --from: another value for all of them; may be given several times"
    add("--set", dest="changes", metavar="KEY=VALUE", action="append", default=[], help=changes)
    axis = "draw every prompt with each value, and a sheet of them; up to three axes"
    add("--grid", metavar="KEY=A,B,…", action="append", default=[], help=axis)
    add("--gallery", action="store_true", help="write DIR/index.html: all images, with search and settings")
    add("--contact-sheet", action="store_true", help="write DIR/contact/page-001.jpg, …: all images, small")
    add("--keep-conditions", action="store_true", help="write what ControlNets saw: DIR/conditions/NAME.png")
    add_drawing(parser)


def run(args: argparse.Namespace) -> int:
    """Call render with every option that is one of its keywords or a setting of the table."""
    from ldm.render.drawing.runner import render
    from ldm.render.prompts.setting_table import SETTINGS

    names = {*SETTINGS, *inspect.signature(render).parameters}
    given = with_controls({name: value for name, value in vars(args).items() if name in {*args.typed, "prompts"}})
    return render(**{name: value for name, value in given.items() if name in names}).exit_code
