"""Make, check and encode datasets.

examples:
  ldm data emoji -o scenes/ -n 2000 --seed 1       draws captioned emoji scenes as an imagefolder
  ldm data check images/                           layout, counts, copies, sizes; what to mend, and how
  ldm data check images/ --page check.html         the same with images, as one HTML file
  ldm data check images/ --captions names --json
  ldm data check owner/name --first 500            the first images of a set on the hub, without downloading it
  ldm data cache images/ -o cache/ --vae default --resolution 128
                                                   latents, made once; then: ldm train … data=cache/
  ldm data cache images/ -o /mnt/cache --vae owner/vae --text owner/clip --shard 2/8
                                                   with embeddings of the captions, on the second of eight machines

`ldm data check` reads a folder of any layout, a .tar, a .parquet or a set on the hub, and changes nothing. At the end
it runs two training steps on random numbers and estimates what `ldm finetune` would take on this machine. The exit
code is 3 when something should be mended.
"""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ldm.cli import common_options

    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", required=True)
    emoji = kinds.add_parser("emoji", help="draw captioned emoji scenes", parents=[common_options()])
    emoji.add_argument("-o", "--output", metavar="DIR", required=True, help="the folder to write")
    emoji.add_argument("-n", "--num-images", metavar="N", type=int, default=1000, help="scenes to draw (1000)")
    emoji.add_argument("--seed", metavar="N", type=int, default=0, help="scene i is a function of (seed, i) alone (0)")
    emoji.add_argument("--font", metavar="FILE", help="NotoColorEmoji.ttf, if it is not installed")
    check = kinds.add_parser("check", help="describe a set and find its faults", parents=[common_options()])
    check.add_argument("data", metavar="DATA", help="a folder, a .tar, a .parquet, or owner/name on the hub")
    _add_reading(check)
    check.add_argument("--resolution", metavar="N", type=int, help="of the intended training (the model's)")
    check.add_argument("--model", metavar="MODEL", default="default", help="model of the intended training (default)")
    check.add_argument("--no-estimate", action="store_true", help="run no training step")
    check.add_argument(
        "--first", metavar="N", type=int, help="for a set on the hub: check the first N images (1000); 0 downloads all"
    )
    check.add_argument("--page", metavar="FILE", help="write one HTML file with images")
    check.add_argument("--json", action="store_true", help="print one JSON document with the complete lists")
    cache = kinds.add_parser("cache", help="encode a set once, for ldm train", parents=[common_options()])
    cache.add_argument("data", metavar="DATA", help="a folder, a .tar, a .parquet, or owner/name on the hub")
    cache.add_argument("-o", "--output", metavar="CACHE", required=True, help="the folder of the shards")
    cache.add_argument("--vae", metavar="VAE", default="default", help="autoencoder, as vae= of ldm train (default)")
    cache.add_argument("--text", metavar="TEXT", help="embed the captions by this encoder, as text= of ldm train")
    cache.add_argument("--text-2", metavar="TEXT", help="the second of two text encoders")
    for part in ("vae", "text", "text-2"):
        cache.add_argument(f"--{part}-subfolder", metavar="NAME", help=argparse.SUPPRESS)
    cache.add_argument("--vae-scaling-factor", metavar="X", type=float, help="of a single file that does not tell it")
    cache.add_argument("--resolution", metavar="N", type=int, default=512, help="resolution of the training (512)")
    cache.add_argument("--square", action="store_true", help="crop all images to squares: no other buckets")
    cache.add_argument(
        "--embeddings",
        choices=("auto", "yes", "no"),
        default="auto",
        help="keep embeddings; auto: unless they are larger than the images (auto)",
    )
    cache.add_argument("--masks", action="store_true", help="learn what an alpha channel or NAME-mask.png shows")
    cache.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of what is stored (bf16)")
    cache.add_argument("--shard", metavar="I/N", default="1/1", help="make the i-th of n parts (1/1)")
    cache.add_argument("--batch-size", metavar="N", type=int, default=8, help="images that are encoded together (8)")
    cache.add_argument("--workers", metavar="N", type=int, default=1, help="threads that read images (1)")
    _add_reading(cache)
    cache.add_argument("--allow-empty-captions", action="store_true", help="take images without a caption too")
    cache.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, mps (auto)")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """How a set is read."""
    add = parser.add_argument
    add("--captions", metavar="HOW", default="auto", help="auto, names (of folders and files), whole (auto)")
    add(
        "--split",
        metavar="NAME",
        help="train, validation, test or all (train, if 95 %% of the images are in it; else you are asked)",
    )
    add("--layout", metavar="NAME", default="auto", help="auto, files, kohya, metadata, tars, parquet (auto)")
    add("--exclude", metavar="PATTERN", action="append", default=[], help="leave these out: 'sample/*', '*.gif'")


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    exclude = [part for text in args.exclude for part in text.split(",") if part]
    return {"captions": args.captions, "split": args.split, "layout": args.layout, "exclude": exclude}


def run(args: argparse.Namespace) -> int:
    return {"emoji": _emoji, "check": _check, "cache": _cache}[args.kind](args)


def _cache(args: argparse.Namespace) -> int:
    from ldm.training import cache

    names = ("vae", "text", "text_2", "vae_subfolder", "text_subfolder", "text_2_subfolder", "resolution", "square")
    names += ("vae_scaling_factor",)
    names += ("embeddings", "dtype", "shard", "batch_size", "workers", "allow_empty_captions", "masks")
    options = {name: getattr(args, name) for name in (*names, "device")}
    folder = cache(args.data, args.output, **options, **_reading(args))
    if not args.quiet:
        print(folder)
    return 0


def _emoji(args: argparse.Namespace) -> int:
    from ldm.data import emoji

    folder = emoji.export(args.output, args.num_images, seed=args.seed, font=args.font)
    if not args.quiet:
        print(folder)
    return 0


def _check(args: argparse.Namespace) -> int:
    import json

    from ldm.training.finetuning.data_check import check_data

    options = {name: getattr(args, name) for name in ("resolution", "model", "page", "first")}
    diagnosis = check_data(args.data, **options, **_reading(args), estimate=not args.no_estimate)
    print(json.dumps(diagnosis.as_json(), indent=1, ensure_ascii=False) if args.json else diagnosis.as_text())
    return 0 if diagnosis.sound else 3
