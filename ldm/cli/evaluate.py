"""Measure what a model draws: a judge without a network names the objects and backgrounds of its images.

examples:
  ldm evaluate                                         the shipped model, 100 held-out prompts of everyday objects
  ldm evaluate runs/unet/model --prompts tuning -n 30  the list to tune with, its first 30 prompts
  ldm evaluate --prompts pairs-20 -o scores/           writes scores.json and sheet.png, a sheet of all verdicts
  ldm evaluate --prompts mine.tsv --guidance-scale 3   a list of your own, in the form of docs/prompts/

  ldm evaluate --fast                                  the shipped few-step LoRA on the shipped model, in its steps
  ldm evaluate --lora runs/fast --steps 2              another LoRA
  ldm evaluate --control edges                         drawn by the edges of true scenes: are their contours followed?
  ldm evaluate --text -n 2000                          what a linear reader can tell from the text encoder's states

It prints how often all that a prompt asks for is the judge's first guess among the 849 objects, how often it is among
the first five, and how often the background has the right colour. Below come the same numbers for true scenes, for true
scenes with shuffled captions, and for true scenes that the model's autoencoder encoded and decoded: they show what the
judge itself can do. With --text no image is drawn: linear readers of the text encoder's mean states are fitted, and
tell of unseen captions which object, which colour, and which of two things is where.
"""

from __future__ import annotations

import argparse

FROM_CALL = ("seed", "n", "batch_size", "controls", "control", "font")
SETTINGS = ("num_inference_steps", "guidance_scale", "sampler", "spacing", "lora", "fast", "vae", "device", "dtype")
SETTINGS += ("controlnet",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", default="default", help="a folder or a hub id (the shipped model)")
    lists = "everyday, all, tuning, small, everyday-30, pairs-20, counts-20, cards-20, unknown, strangers, or a file"
    add("--prompts", metavar="LIST", default="everyday", help=f"{lists} (everyday)")
    add("-o", "--output", metavar="DIR", help="folder for scores.json and sheet.png (none)")
    add("-n", "--num-prompts", dest="n", type=int, metavar="N", help="only the first N prompts")
    add("--text", action="store_true", help="read the text encoder instead, over N unseen captions (10000)")
    add("--fit", type=int, metavar="N", default=16000, help="with --text: captions that the readers learn from (16000)")
    add("--seed", type=int, metavar="N", default=0, help="image i, from 1, is drawn with seed N + i (0)")
    add("--steps", dest="num_inference_steps", type=int, metavar="N", help="(the model's)")
    add("--guidance-scale", type=float, metavar="X", help="(the model's)")
    add("--sampler", metavar="NAME", help="(the model's)")
    add("--spacing", metavar="NAME", help="(the model's)")
    add("--batch-size", type=int, metavar="N", help="images drawn together; on a CPU it changes no image")
    add("--lora", metavar="FILE", help="a LoRA, or the run that made it")
    add("--fast", action="store_true", default=None, help="with the shipped few-step LoRA of the shipped model")
    add("--control", metavar="KIND", help="draw each by this condition of its true scene, such as edges")
    add("--controlnet", metavar="NET", help="with --control: another ControlNet than the model's own")
    add("--vae", metavar="FOLDER", help="another VAE")
    add("--device", metavar="NAME", help="auto, cpu, cuda, mps")
    add("--dtype", metavar="NAME", help="auto, fp32, bf16, fp16")
    add("--font", metavar="FILE", help="NotoColorEmoji.ttf, if it is not installed")
    add("--no-controls", dest="controls", action="store_false", help="leave out the scores of true scenes")


def run(args: argparse.Namespace) -> int:
    from ldm.config import require
    from ldm.evaluation import evaluate, evaluate_text

    settings = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    require(args.control is not None or args.controlnet is None, "needs --control KIND", "controlnet")
    require(args.control is None or not args.text, "is for images: leave it out with --text", "control")
    if args.text:
        device, n = settings.pop("device", "auto"), 10_000 if args.n is None else args.n
        require(not settings, "is for images: leave it out with --text", next(iter(settings), None))
        evaluate_text(args.model, args.output, n=n, fit=args.fit, seed=args.seed, device=device)
        return 0
    evaluate(args.model, args.prompts, args.output, **{name: getattr(args, name) for name in FROM_CALL}, **settings)
    return 0
