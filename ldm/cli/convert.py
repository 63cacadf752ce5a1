"""Convert a model into a diffusers folder or a single file.

examples:
  ldm convert model.safetensors models/mine        a diffusers folder
  ldm convert models/mine mine.safetensors         one file, as A1111, ComfyUI and diffusers read it
  ldm convert owner/name small.safetensors --dtype fp16
  ldm convert v2.safetensors models/v2 --prediction-type v_prediction --vae better-vae.safetensors
  ldm convert flux1-dev.safetensors models/flux --vae ae.safetensors --text-encoders clip_l.safetensors
      --text-encoders t5xxl_fp16.safetensors --text-encoders tokenizer_2/

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
    texts = "a file or folder with a text encoder that a single file of SD3 or FLUX lacks; may be given several times"
    add("--text-encoders", metavar="PATH", action="append", help=texts)


def run(args: argparse.Namespace) -> int:
    from ldm.checkpoint.convert import convert

    path = convert(args.model, args.out, args.dtype, args.prediction_type, args.vae, args.text_encoders)
    if not args.quiet:
        print(path, flush=True)
    return 0
