"""Make a condition for a ControlNet of an image.

examples:
  ldm preprocess edges photo.png -o edges.png
  ldm preprocess segmentation drawing.png -o regions.png --size 512x512
  ldm preprocess depth photo.png -o depth.png --depth-model Depth-Anything-V2-Small-hf/
  ldm preprocess pose keypoints.json -o pose.png

Kinds: edges (Canny), soft-edges, lineart, palette, tile, blur, segmentation (of flat drawings), which `ldm generate`
and `ldm render` make too, in the size that is drawn (--control-image KIND:IMAGE); depth and normals by a transformers
depth model; pose from OpenPose's JSON. The path of the result is printed.
"""

from __future__ import annotations

import argparse
from typing import Any

from ldm.errors import ConfigError, nearest

BY_MODELS = {"depth": "depth", "normals": "normals", "normal": "normals", "pose": "pose", "openpose": "pose"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "kind",
        metavar="KIND",
        help="of those below",
    )
    add("image", metavar="IMAGE", help="what it is made of; of a pose OpenPose's JSON")
    add("-o", "--output", metavar="FILE", required=True, help="a .png, .jpg or .webp file")
    add("--size", metavar="WIDTHxHEIGHT", help="in pixels (the image's)")
    add("--depth-model", metavar="FOLDER", help="of depth and normals: a transformers depth model")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from ldm.files import atomic_write
    from ldm.images import encode, file_format

    suffix = file_format(Path(args.output).suffix)
    if Path(args.output).is_dir():
        raise ConfigError("is a folder", where=args.output, hint="name a file")
    atomic_write(args.output, encode(_condition(args), suffix))
    if not args.quiet:
        print(args.output, flush=True)
    return 0


def _condition(args: argparse.Namespace) -> Any:
    from pathlib import Path

    from PIL import Image

    from ldm.control import ALIASES, KINDS, condition_of
    from ldm.pipeline.sources import open_image
    from ldm.render.prompts.values import size

    kind = BY_MODELS.get(args.kind, args.kind)
    if kind not in (known := [*KINDS, *ALIASES, *BY_MODELS]):
        raise ConfigError(f"unknown kind of control {kind!r:.80}", hint=nearest(kind, known))
    wanted = None if args.size is None else size(args.size, "--size", Path())
    if args.depth_model is not None and kind not in ("depth", "normals"):
        raise ConfigError(f"is of depth and normals, not of {kind}", where="--depth-model")
    if kind == "pose":
        from ldm.control.pose import draw_poses, read_poses

        people, canvas = read_poses(args.image)
        return draw_poses(people, wanted or canvas)
    image, _, _ = open_image(args.image, "image")
    image = image if wanted is None else image.resize(wanted, Image.Resampling.LANCZOS)
    if kind not in ("depth", "normals"):
        return condition_of(kind, image)
    from ldm.control.depth import depth_image, depth_of, normal_image

    if args.depth_model is None:
        raise ConfigError(f"{kind} needs a depth model", where="--depth-model", hint="give its folder")
    depth = depth_of(image, args.depth_model)
    return depth_image(depth) if kind == "depth" else normal_image(depth)
