"""Show what a model, a part of one or a LoRA is, from its settings and headers.

examples:
  ldm inspect model.safetensors                    family, prediction type, parts, dtypes, metadata
  ldm inspect lora.safetensors                     base model, rank, alpha, keys that would not apply
  ldm inspect runs/unet                            the model of a training run
  ldm inspect default --json                       everything, as one JSON document

No weights are read, so a large file takes no longer. The exit code is 0 even if keys of a LoRA would not apply.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="FILE_OR_FOLDER", help="a folder, a .safetensors file, or default")
    parser.add_argument("--json", action="store_true", help="print one JSON document, with nothing cut")


def run(args: argparse.Namespace) -> int:
    import json

    from ldm.checkpoint.inspect import inspect
    from ldm.checkpoint.inspect_text import as_text

    info = inspect(args.path)
    print(json.dumps(info, indent=1) if args.json else as_text(info))
    return 0
