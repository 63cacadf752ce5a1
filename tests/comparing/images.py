"""Images of ldm.Pipeline and of `ldm generate`: samplers, batches, guidance, editing, texts, LoRAs, files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from registry import FP32, case, command

SAMPLERS = ("euler", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc")  # for all models
SAMPLERS += ("ddpm", "euler_ancestral", "heun", "dpm2", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_3m_sde", "lms", "lcm")
SPACINGS = ("leading", "linspace", "trailing", "karras", "exponential", "beta", "sgm_uniform", "simple", "ays")
FILES = ("image", "init_image", "mask_image", "lora", "lora_dir", "vae")  # settings that name a file of the inputs


def placed(settings: dict[str, Any], inputs: Path) -> dict[str, Any]:
    """`settings` with the files that they name in `inputs`."""

    def place(value: Any) -> Any:
        if isinstance(value, list):
            return [place(one) for one in value]
        return (place(value[0]), value[1]) if isinstance(value, tuple) else str(inputs / value)

    return {name: place(value) if name in FILES else value for name, value in settings.items()}


def save(images: Sequence[Any], out: Path) -> None:
    for i, image in enumerate(images):
        image.save(out / f"{i}.png")


# Images of Pipeline

D, CAT = "models/default", "a cat on a blue background"


def drawing(name: str, model: str, prompt: Any = "a red cat", quick: bool = False, of: Any = None, **call: Any) -> None:
    """A case of images: Pipeline(prompt, model, **of).generate(**call)."""

    def draw(inputs: Path, out: Path) -> None:
        import ldm

        own = {"device": "cpu", "dtype": "fp32", **placed(of or {}, inputs)}
        pipe = ldm.Pipeline(prompt, inputs / model, **own)
        save(pipe.generate(**{"num_inference_steps": 3, "seed": 7, **placed(call, inputs)}), out)

    case("generate", quick, name)(draw)


def add_samplers() -> None:
    for sampler in SAMPLERS:
        quick = sampler in ("euler", "dpmpp_2m", "dpmpp_sde", "unipc", "lms")
        drawing(f"default, {sampler}", D, CAT, quick, num_inference_steps=5, sampler=sampler)
        drawing(f"sd, {sampler}", "models/sd", quick=quick, num_inference_steps=5, sampler=sampler)
    for sampler in (*SAMPLERS[:5], "heun_flow"):
        quick = sampler == "heun_flow"
        drawing(f"flow, {sampler}", "models/flow", quick=quick, num_inference_steps=4, sampler=sampler)
    for spacing in SPACINGS:
        drawing(f"spacing {spacing}", "models/sd", num_inference_steps=5, sampler="euler", spacing=spacing)
    drawing("spacing ays_xl", "models/xl", num_inference_steps=5, sampler="euler", spacing="ays_xl")
    drawing("label", "models/sd", quick=True, num_inference_steps=5, sampler="DPM++ 2M Karras")
    drawing("timesteps", "models/sd", timesteps=[900, 500, 120], num_inference_steps=None)
    drawing("sigmas", "models/sd", sigmas=[11.0, 3.0, 0.4], num_inference_steps=None, sampler="euler")
    drawing("eta", "models/sd", sampler="ddim", eta=0.7, num_inference_steps=4)
    drawing("eta of an ancestral sampler", "models/sd", sampler="euler_ancestral", eta=0.4)


def add_batches() -> None:
    two = ["a red cat", "a dog on blue"]
    for count, size in ((1, None), (3, 2), (5, 5), (5, 2)):
        drawing(f"default, {count} by {size}", D, CAT, count != 1, num_images=count, batch_size=size)
    drawing("prompts", "models/sd", two, True, {"negative_prompt": ["blue", "a cat"]}, num_images=2, batch_size=3)
    drawing("seeds and scales", "models/sd", two, seed=[5, 900], guidance_scale=[2.0, 7.5])
    drawing("no guidance for some", D, [CAT, "a dog"], guidance_scale=[1.0, 5.0])
    drawing("size", "models/sd", num_images=2, height=72, width=56)
    drawing("size of default", D, CAT, height=96, width=136)
    drawing("chunked attention", "models/sd", of={"attention": "chunked"})
    drawing("bf16", D, CAT, of={"dtype": "bf16"}, num_inference_steps=2)
    drawing("another vae", "models/sd", of={"vae": "models/flow/vae"})
    drawing("another prediction", "models/sd", of={"prediction_type": "v_prediction"})


def add_guidance() -> None:
    kinds: dict[str, dict[str, Any]] = {
        "cfg": {"guidance_scale": 7.5},
        "none": {"guidance_scale": 1.0},
        "rescale": {"guidance_rescale": 0.7},
        "interval": {"guidance_interval": (0.25, 0.8), "num_inference_steps": 6},
        "sigma_interval": {"guidance_sigma_interval": (0.5, 5.0), "num_inference_steps": 6},
        "apg": {"guidance": "apg", "guidance_scale": 6.0},
        "apg options": {"guidance": "apg", "apg_eta": 0.3, "apg_momentum": 0.2, "apg_threshold": 2.0},
        "pag": {"guidance": "pag", "pag_scale": 2.0, "guidance_scale": 4.0, "num_images": 3},
        "pag alone": {"guidance": "pag", "guidance_scale": 1.0},
        "cfg_zero": {"guidance": "cfg_zero", "guidance_scale": 4.0},
    }
    for name, call in kinds.items():
        drawing(f"guidance {name}", D, CAT, name in ("apg", "pag", "interval"), **call)
        drawing(f"sd, guidance {name}", "models/sd", **call)
        drawing(f"xl, guidance {name}", "models/xl", **call)
        drawing(f"flow, guidance {name}", "models/flow", quick=name == "cfg_zero", sampler="euler", **call)
    drawing("guidance pag_layers", "models/sd", guidance="pag", pag_layers=["down.0", "mid"])
    drawing("guidance zero_init_steps", "models/flow", guidance="cfg_zero", zero_init_steps=2, num_inference_steps=5)
    heun = {"guidance_interval": (0.2, 0.7), "sampler": "heun", "num_inference_steps": 5}
    drawing("guidance interval with heun", "models/sd", **heun)


def add_editing() -> None:
    for model, side, prompt in ((D, 128, CAT), ("models/sd", 64, "a red cat"), ("models/xl", 64, "a red cat")):
        image, mask = f"images/image-{side}.png", f"images/mask-{side}.png"
        short, quick, steps = Path(model).name, model == D, {"num_inference_steps": 5}
        drawing(f"{short}, image", model, prompt, quick, image=image, strength=0.6, num_images=2, **steps)
        drawing(f"{short}, mask", model, prompt, quick, image=image, mask_image=mask, **steps)
        drawing(f"{short}, outpaint", model, prompt, quick, image=image, outpaint={"left": 32, "top": 16}, **steps)
        drawing(f"{short}, hires", model, prompt, quick, hires_scale=1.5, num_images=2)
        drawing(f"{short}, variations", model, prompt, quick, variation_seed=3, variation_strength=0.3, num_images=3)
    drawing(
        "inpainting model", "models/inpaint", quick=True, image="images/image-64.png", mask_image="images/mask-64.png"
    )
    drawing("an image each", "models/sd", ["a cat", "a dog"], image=["images/image-64.png", "images/a1111.png"])
    drawing("image resized", "models/sd", image="images/wide.png", height=64, width=64, sampler="euler_a")
    drawing("image with sde", "models/sd", image="images/image-64.png", sampler="dpmpp_sde", num_images=2)
    drawing("image with flow", "models/flow", image="images/image-64.png", strength=0.7, sampler="unipc")
    drawing("mask with flow", "models/flow", image="images/image-64.png", mask_image="images/mask-64.png")
    hires = {"hires_scale": 2, "hires_steps": 5, "hires_strength": 0.5, "sampler": "euler_ancestral"}
    drawing("hires steps", "models/sd", **hires)
    drawing("tiles", "models/sd", height=256, width=256, vae_tiling=True, image="images/image-64.png")
    old = {"init_image": "images/image-64.png", "denoising_strength": 0.5, "scale": 4, "schedule": "karras"}
    drawing("old names", "models/sd", quick=True, of={"neg": "blue"}, sampler_name="Euler", **old)


def add_texts() -> None:
    texts = {
        "emphasis": "a (red:1.3) cat on [blue], ((dog))",
        "break": "a red cat BREAK a dog on blue",
        "editing": "a [cat:dog:0.5] on [red|blue] and [blue:2]",
        "long": " ".join(["a red cat and a blue dog on"] * 6),
        "escaped": r"a \(red\) cat",
        "empty": "",
    }
    for name, prompt in texts.items():
        more = {"num_inference_steps": 5, "num_images": 2}
        drawing(f"text {name}", "models/sd", prompt, name in ("emphasis", "editing", "long"), **more)
        drawing(f"default, text {name}", D, prompt, **more)
        drawing(f"xl, text {name}", "models/xl", prompt, **more)
    drawing("negative edited", "models/sd", of={"negative_prompt": "[red:blue:0.3] (dog:1.5)"}, num_inference_steps=5)
    drawing("no_norm", "models/sd", "a (red:1.5) cat", emphasis="no_norm")
    drawing("clip_skip", "models/sd", quick=True, clip_skip=1)
    drawing("xl, clip_skip", "models/xl", clip_skip=1)
    drawing("t5", "models/t5", ["a red cat", "a dog"], True, num_images=2, batch_size=3)
    drawing("t5, edited", "models/t5", "a [cat:dog:0.5]", num_inference_steps=4)
    drawing("xl", "models/xl", ["a red cat", "a dog"], True, num_images=2, batch_size=3)


def add_loras() -> None:
    kohya, peft = "loras/kohya.safetensors", "loras/peft.safetensors"
    drawing("lora peft", "models/sd", quick=True, of={"lora": peft})
    drawing("lora kohya", "models/sd", of={"lora": (kohya, 0.8)})
    drawing("lora dora", "models/sd", of={"lora": "loras/dora.safetensors"})
    drawing("loras", "models/sd", of={"lora": [(kohya, -0.5), (peft, 1.2)]})
    tagged = ["a <lora:kohya:0.7> cat", "a dog", "a <lora:peft> red dog"]
    drawing("lora tags", "models/sd", tagged, True, {"lora_dir": "loras"}, num_images=2)
    drawing("lora of default", D, CAT, of={"lora": "loras/default.safetensors"}, num_images=2)


for _add in (add_samplers, add_batches, add_guidance, add_editing, add_texts, add_loras):
    _add()


@case("generate", quick=True)
def stream(inputs: Path, out: Path) -> None:
    """Every preview, and x0 behind it."""
    from safetensors.torch import save_file

    import ldm

    pipe, x0 = ldm.Pipeline([CAT, "a dog"], inputs / D, device="cpu", dtype="fp32"), {}
    for number, step in enumerate(pipe.stream(num_inference_steps=3, seed=5, num_images=2, batch_size=3)):
        step.preview.save(out / f"preview-{number:02d}.png")
        x0[f"{number:02d} {step.index} {step.rows}"] = step.x0.clone().contiguous()
    save(step.images, out)
    save_file(x0, out / "x0.safetensors")


@case("generate")
def callback(inputs: Path, out: Path) -> None:
    """x and x0 of each step, and what is finished where the callback stops the work."""
    from safetensors.torch import save_file

    import ldm

    seen: dict[str, Any] = {}

    def stop(i: int, x: Any, x0: Any) -> bool:
        seen[f"{len(seen):02d} {i} x"] = x.clone().contiguous()
        seen[f"{len(seen):02d} {i} x0"] = x0.clone().contiguous()
        return len(seen) >= 10

    pipe = ldm.Pipeline("a red cat", inputs / "models/sd", device="cpu", dtype="fp32")
    save(pipe.generate(num_images=4, batch_size=2, num_inference_steps=3, seed=3, callback=stop), out)
    save_file(seen, out / "steps.safetensors")


@case("generate")
def latents(inputs: Path, out: Path) -> None:
    import torch

    import ldm

    noise = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(3))
    pipe = ldm.Pipeline(["a cat", "a dog"], inputs / "models/sd", device="cpu", dtype="fp32")
    save(pipe.generate(latents=noise, num_inference_steps=3), out)


@case("generate", quick=True)
def files(inputs: Path, out: Path) -> None:
    """The names of saved files, models written and read again, and the image of a single file."""
    import ldm

    pipe = ldm.Pipeline(["a red cat", "a dog/cat: ü"], inputs / "models/sd", device="cpu", dtype="fp32")
    images = pipe.generate(num_images=2, num_inference_steps=2, seed=1)
    images.save(out / "saved")
    images.save(out / "named.webp")
    images.grid(gap=2).save(out / "grid.png")
    merged = ldm.Pipeline("a", inputs / "models/sd", lora=inputs / "loras/peft.safetensors", dtype="fp32", device="cpu")
    merged.save(out / "merged")
    for name in ("sd", "xl"):
        file = ldm.convert(inputs / "models" / name, out / f"{name}.safetensors")
        single = ldm.Pipeline("a red cat", file, device="cpu", dtype="fp32")
        save(single.generate(num_inference_steps=2, seed=1), out)
        ldm.convert(file, out / name, dtype="bf16")


@case("generate", quick=True, name="command")
def generate_command(inputs: Path, out: Path) -> None:
    """Images of the command line, and drawn again from their files and from a text of A1111."""
    tiny = ("--model", inputs / "models/sd", *FP32)
    command("generate", CAT, "-o", out / "cat.png", "--model", inputs / D, "--steps", 3, "--seed", 5, "-n", 2, *FP32)
    more = ("--cfg-scale", 4, "--sampler-name", "Euler a", "--neg", "a dog", "--lora")
    command("generate", "a red cat", "-o", f"{out}/folder/", "--seed", 5, "--steps", 3, *more, _lora(inputs), *tiny)
    edit = ("--image", inputs / "images/image-64.png", "--mask", inputs / "images/mask-64.png", "--strength", 0.7)
    command("generate", "a red cat", "-o", out / "edited.png", "--seed", 5, "--steps", 4, *edit, *tiny)
    command("generate", "--from", out / "folder/a-red-cat.png", "--set", "steps=4", "-o", out / "again.png", *tiny)
    command("generate", "--from", inputs / "images/a1111.png", "-o", out / "theirs.png", *tiny)


def _lora(inputs: Path) -> str:
    return f"{inputs / 'loras/peft.safetensors'}:0.5"
