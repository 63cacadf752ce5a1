"""Tell what a model, a part of one or a LoRA is, from its settings and headers.

examples:
  ldm inspect model.safetensors                    family, prediction type, parts, dtypes, metadata
  ldm inspect lora.safetensors                     base, rank, alpha, and which keys would not apply
  ldm inspect runs/unet                            the model of a training run
  ldm inspect default --json                       everything, as one JSON document

No weight is read, so it takes no longer for a large file. Exit code 0 also where the keys of a LoRA would not apply.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="FILE_OR_FOLDER", help="a folder, a .safetensors file, or default")
    parser.add_argument("--json", action="store_true", help="print one JSON document, nothing cut")


def run(args: argparse.Namespace) -> int:
    import json

    from ldm.checkpoint.inspect import as_text, inspect

    found = inspect(args.path)
    print(json.dumps(found, indent=1) if args.json else as_text(found))
    return 0
