"""Draw images again from their own metadata, and say whether they come out the same.

examples:
  ldm verify cat.png                               same bytes, same pixels, near, or different and why
  ldm verify images/                               every image of a folder, or of its manifest
  ldm verify images/manifest.jsonl --tolerance 2   a channel may be off by 2 of 255: another CPU or torch
  ldm verify old.png --model models/mine --lora-dir loras/
  ldm verify cat.png --json
  ldm verify --golden                              whether this machine draws as the release was drawn

The input of image-to-image is found by its pixels, where it was or beside the image under any name. Nothing is written.
The exit code is 3 where an image differs or cannot be drawn again, 2 where one holds no metadata.
"""

from __future__ import annotations

import argparse

from ldm.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("sources", metavar="IMAGE", nargs="*", help="images, folders, or manifest.jsonl of rendered folders")
    add("--tolerance", metavar="N", type=int, default=0, help="0 to 255: how far a channel may be off (0)")
    add("--model", metavar="MODEL", help="where the image's model is, if it cannot be found by its name")
    add("--vae", metavar="PATH", help="the VAE that it was drawn with, in place of the model's")
    add("--prediction-type", metavar="NAME", help="what it was drawn with, where its metadata (before 0.2.0) lacks it")
    add("--lora-dir", metavar="FOLDER", help="where the LoRAs of tags are")
    add("--device", metavar="NAME", help="cpu, cuda, mps (that of the image)")
    add("--json", action="store_true", help="print one JSON document")
    add("--golden", action="store_true", help="draw the 24 images of the release, and compare their hashes")


def run(args: argparse.Namespace) -> int:
    import dataclasses
    import json

    if args.golden:
        return _golden(args)
    if not args.sources:
        raise ConfigError("there are no images", hint="write ldm verify IMAGE, or --golden")
    from ldm.render.replay.verify import Verified, verdicts

    names = ("model", "vae", "lora_dir", "device", "prediction_type")
    found = []
    for verdict in verdicts(args.sources, args.tolerance, **{name: getattr(args, name) for name in names}):
        found.append(verdict)
        if not args.json and not (args.quiet and verdict.good):
            print(verdict.as_text(), flush=True)
    verified = Verified(tuple(found))
    if args.json:
        listed = [dataclasses.asdict(verdict) for verdict in found]
        print(json.dumps({"images": listed, "counts": verified.counts()}, indent=1, ensure_ascii=False))
    elif len(found) > 1 and not args.quiet:
        print(", ".join(f"{count} {result}" for result, count in verified.counts().items()))
    return verified.exit_code


def _golden(args: argparse.Namespace) -> int:
    """0: drawn as the release was, or no hashes are kept for this kind of machine; 3: otherwise."""
    import json

    from ldm.render.replay import golden

    kind, known = golden.kind(), golden.kind() in golden.hashes()
    same, other = golden.compare() if known else ([], [])
    if args.json:
        print(json.dumps({"kind": kind, "known": known, "same": same, "different": other}, indent=1))
    elif not known:
        print(f"no hashes are kept for {kind}: nothing to compare with")
    else:
        print(f"{kind}: {len(same)} of {len(golden.SET)} images are those of the release")
        print("".join(f"  different: {name}\n" for name in other), end="")
    return 3 if other else 0
