"""Convert a model into a diffusers folder or a single file.

examples:
  ldm convert model.safetensors models/mine        a diffusers folder
  ldm convert models/mine mine.safetensors         one file, as A1111, ComfyUI and diffusers read it
  ldm convert owner/name small.safetensors --dtype fp16
  ldm convert v2.safetensors models/v2 --prediction-type v_prediction --vae better-vae.safetensors

Weights keep their stored precision unless --dtype is given. Only a model is ever overwritten. The path of the result is
printed.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="IN", help="a diffusers folder, a .safetensors file, a hub id, or default")
    add("out", metavar="OUT", help="a folder, or a file that ends with .safetensors")
    add("--dtype", metavar="NAME", help="fp32, fp16 or bf16 (as stored)")
    add("--prediction-type", metavar="NAME", help="epsilon, v_prediction or sample (the model's)")
    add("--vae", metavar="PATH", help="the folder or file of a VAE that replaces the model's")


def run(args: argparse.Namespace) -> int:
    from ldm.checkpoint.convert import convert

    path = convert(args.model, args.out, args.dtype, args.prediction_type, args.vae)
    if not args.quiet:
        print(path, flush=True)
    return 0
