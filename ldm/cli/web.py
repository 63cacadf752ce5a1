"""Draw in the browser, and answer programs: a page and HTTP APIs on this machine.

examples:
  ldm web                                          opens http://127.0.0.1:7860, images go to ./images
  ldm web -o gallery/ --port 8000 --no-open
  ldm web --model default --model runs/unet/model --lora-dir loras/
  ldm web --listen 0.0.0.0 --token "$(openssl rand -hex 16)"

Programs that know A1111's API (/sdapi/v1/txt2img, …) or OpenAI's (/v1/images/generations) can use it as it is; our own
is /api/jobs. /docs describes all. Models, VAEs and LoRAs are chosen by the names that are given here; no other file of
this machine can be reached. Ctrl-C ends it; jobs that wait are drawn at the next start.
"""

from __future__ import annotations

import argparse

OWN = ("vae", "text_encoders", "prediction_type", "lora", "lora_dir", "port", "listen", "token", "host", "max_gb")
COMMON = ("device", "dtype", "offload", "attention", "allow_unapplied")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-o", "--output", metavar="DIR", default="images", help="folder of the gallery (images)")
    add("--port", type=int, metavar="N", help="(7860, or a free one where that is taken; 0: a free one)")
    add("--listen", metavar="ADDR", default="127.0.0.1", help="another address of this machine; needs --token")
    add("--token", metavar="TEXT", help="what clients must send: Authorization: Bearer TEXT (16 characters or more)")
    add("--host", metavar="NAME", action="append", default=[], help="a name that the server is asked for by")
    add("--max-gb", type=float, default=20.0, metavar="X", help="of the gallery, beyond which no job is taken (20)")
    add("--no-open", action="store_true", help="do not open a browser")
    group = parser.add_argument_group("model (the first of each kind that may be given several times is the default)")
    add = group.add_argument
    add(
        "--model",
        metavar="MODEL",
        action="append",
        help="a folder, a .safetensors file or a hub id (the shipped model)",
    )
    add("--vae", metavar="PATH", action="append", default=[], help="a VAE that can be chosen")
    texts = "what a file of SD3 or FLUX lacks of CLIP and T5; several times"
    add("--text-encoders", metavar="PATH", action="append", default=[], help=texts)
    add("--prediction-type", metavar="NAME", help="of one model: epsilon, v_prediction, sample (what the model says)")
    add("--lora", metavar="FILE", action="append", default=[], help="a LoRA that can be chosen")
    add("--lora-dir", metavar="FOLDER", help="all LoRAs in it can be chosen, and named by <lora:name:0.8> in prompts")
    add("--allow-unapplied", action="store_true", help="warn of a LoRA's keys that fit nowhere, instead of refusing it")
    add("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", metavar="NAME", default="auto", help="auto, fp32, bf16, fp16")
    add("--offload", action="store_true", help="keep parts in main memory, on the GPU only while they work")
    blocks = {"dest": "offload", "action": "store_const", "const": "blocks"}
    add("--offload-blocks", **blocks, help="the blocks of SD3 and FLUX too, one at a time")
    add("--attention", metavar="NAME", default="auto", help="of the network: auto, sdpa, chunked, xformers")


def run(args: argparse.Namespace) -> int:
    from ldm.web import web

    own = {name: getattr(args, name) for name in OWN}
    common = {name: getattr(args, name) for name in COMMON}
    web(args.output, model=args.model or "default", open_browser=not args.no_open, debug=args.debug, **own, **common)
    return 0
