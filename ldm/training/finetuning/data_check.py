"""`ldm data check`: the doctor of data, with the plan that a fine-tuning of the model would follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from ldm.checkpoint.describe import text_without_weights
from ldm.data import doctor
from ldm.data.buckets import bucket_of
from ldm.data.doctor import Diagnosis
from ldm.data.doctor.image_info import ImageInfo
from ldm.data.sources import Layout, Source
from ldm.errors import LdmError, ModelError
from ldm.training.data.images import ImageSet, Item
from ldm.training.finetuning.forecast import forecast, outlook
from ldm.training.finetuning.presets import Plan, make_plan

UNKNOWN = 512  # pixels, where the model cannot be read


def check_data(
    data: str | Path,
    captions: Literal["auto", "names", "whole"] = "auto",
    split: str | None = None,
    resolution: int | None = None,
    model: str | Path = "default",
    page: str | Path | None = None,
    first: int | None = None,
    layout: Layout = "auto",
    exclude: Sequence[str] = (),
    estimate: bool = False,
) -> Diagnosis:
    """Check every image and caption of a set, which is never changed, as a fine-tuning of `model` would read it.

    resolution  of the intended training, in pixels (the model's)
    page        where to write one HTML file with images
    first       images to read of a set on the hub, as a stream (1000); 0 downloads and reads all
    estimate    take two steps of that training on random numbers, to say what it would take
    The others are those of `ldm.data.sources.open_source`. Buckets, steps, the limit of captions and what is left out
    are those of `ldm finetune` with nothing else given. Raises DataError for anything that is no set of images,
    ConfigError for a page inside the set and for `first` with a local set.
    """
    reading = {"captions": captions, "split": split, "layout": layout, "exclude": tuple(exclude)}
    given = {"model": str(model), "data.folder": str(data), **{f"data.{name}": v for name, v in reading.items()}}
    given |= {} if resolution is None else {"data.resolution": resolution}
    options = {**reading, "page": page, "first": first}
    try:
        plan = make_plan(given)
        cut = text_without_weights(str(model)).truncated
    except ModelError as error:
        unknown = (f"no estimate ({error})",)
        return doctor.check_data(data, resolution=resolution or UNKNOWN, estimate=lambda *_: unknown, **options)
    return doctor.check_data(
        data, config=plan.data.buckets, cut=cut, estimate=_forecast(plan, cut, estimate), **options
    )


def _forecast(plan: Plan, cut: Callable[[str], str], measured: bool) -> Callable[[Source, list[ImageInfo]], list[str]]:
    def lines(source: Source, infos: list[ImageInfo]) -> list[str]:
        """The trainer's own counts, and what it would take; or why that is unknown: the check itself goes on."""
        config = plan.data.buckets
        items = [
            Item(i.id, i.digest.hex(), i.size, bucket_of(i.size, config), s.captions, s.repeats, i.profile)
            for s, i in zip(source, infos, strict=True)
        ]
        images = ImageSet(source, items, plan.data, cut)
        if not images.trained:
            return ["nothing: no image is left to train on"]
        settings = plan.build(plan.complete(images))
        found = [images.lines[-1], outlook(settings)]
        try:
            return [*found, *(forecast(settings, plan.facts.side) if measured else ())]
        except LdmError as error:
            return [*found, f"no estimate ({error})"]

    return lines
