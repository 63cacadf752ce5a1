"""Pictures of what a model knows, drawn by itself before it is fine-tuned, so that it is kept (Ruiz et al. 2023)."""

from __future__ import annotations

from pathlib import Path

from ldm import files
from ldm.config import require
from ldm.console import hushed, progress, say
from ldm.training.settings import FinetuneSettings

AT_ONCE = 32  # pictures of a call


def check_drawn_prior(settings: FinetuneSettings) -> None:
    """Raise ConfigError where nobody says what the pictures are to show."""
    s = settings
    told = s.prior_prompt is not None or s.model == "default" or not s.prior_images
    require(told, 'say what the pictures are to show, by prior_prompt="a dog"', "prior_images")


def drawn_prior(settings: FinetuneSettings, folder: Path) -> Path:
    """`folder` with `settings.prior_images` pictures and their captions, drawn by the model that is to be trained.

    They show `prior_prompt`, or where there is none what the default model was trained on: its objects, everyday ones
    above all, on its grounds. A folder that has as many already is left as it is. Raises ModelError, ResourceError.
    """
    s, count = settings, settings.prior_images
    if len(list(folder.glob("*.png"))) == count:
        return folder
    from ldm.checkpoint import load_model
    from ldm.pipeline import Pipeline

    prompts, asked = _prompts(s), None if s.prediction_type == "flow" else s.prediction_type
    model = load_model(s.model, s.device, "auto", s.vae, cache=False, prediction_type=asked)
    say(f"{count} pictures of what the model knows are drawn into {folder}")
    with files.atomic_folder(folder) as tmp, progress(total=count, desc="prior", unit="picture") as bar:
        for start in range(0, count, AT_ONCE):
            part = prompts[start : start + AT_ONCE]
            seeds = [s.seed + start + i for i in range(len(part))]
            with hushed():
                pipe = Pipeline(part, model=model)
                drawn = pipe.generate(seed=seeds, height=s.data.resolution, width=s.data.resolution)
            for i, (prompt, picture) in enumerate(zip(part, drawn), start):
                picture.save(tmp / f"{i:05d}.png")
                (tmp / f"{i:05d}.txt").write_text(prompt + "\n", encoding="utf-8")
            bar.update(len(part))
    return folder


def _prompts(settings: FinetuneSettings) -> list[str]:
    from ldm.data.emoji import SceneConfig, Scenes

    if settings.prior_prompt is not None:
        return [settings.prior_prompt] * settings.prior_images
    scenes = Scenes(SceneConfig(objects="all", everyday_share=0.7, mention=1.0), settings.seed)
    return [scenes.caption(i) for i in range(settings.prior_images)]
