"""A client's settings, checked before anything waits or is drawn, and the keywords of Pipeline that they become.

Words are those of `Pipeline` and `generate`, with their aliases. Models, VAEs and LoRAs are names of the catalogue,
images are bytes or ids of the gallery: no path and no URL of a client is ever opened.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from ldm.checkpoint import load_model
from ldm.data.images import read_image, read_with_alpha
from ldm.errors import ConfigError, DataError, LdmError, require
from ldm.images import encode
from ldm.pipeline import checks
from ldm.pipeline.keywords import ALIASES, EDITING_WORDS, GUIDANCE_WORDS, resolve_aliases
from ldm.pipeline.pipeline import OF_GENERATE, OF_PIPELINE, Pipeline
from ldm.pipeline.request import Request, check_request
from ldm.render.prompts.entry import Entry
from ldm.render.prompts.line_settings import WORDS, find_word
from ldm.render.sheets.axes import Axis, grid_entries, read_axes
from ldm.web import limits
from ldm.web.catalog import LOADING, Catalog
from ldm.web.store import Store

CHOSEN = ("model", "vae", "lora")  # by name
IMAGES = ("image", "mask_image")
OFFERED: tuple[str, ...] = ("prompt", "negative_prompt", *CHOSEN, "num_images", "seed", "num_inference_steps")
OFFERED += ("guidance_scale", "height", "width", "sampler", "spacing", "timesteps", "sigmas", "eta", "clip_skip")
OFFERED += ("true_cfg_scale", "step_cache")
OFFERED += ("emphasis", "strict", *GUIDANCE_WORDS, *EDITING_WORDS, "grid")
SERVERS = ("device", "dtype", "offload", "attention", "allow_unapplied", "lora_dir", "text_encoders")
ABSENT = tuple(name for name in (*OF_PIPELINE, *OF_GENERATE) if name not in (*OFFERED, *SERVERS))
AXES = ("prompt", "negative_prompt", "seed", "guidance_scale", "num_inference_steps", "sampler", "spacing", "eta")
AXES += ("clip_skip", "strength", "width", "height", "size", "variation_seed", "variation_strength")
AXES += ("guidance_rescale",)
DEFAULTS = {"guidance": "cfg", "emphasis": "original", "strict": False, "vae_tiling": "auto"}  # of generate
BASE64 = re.compile(r"data:image/[a-z.+-]{1,20};base64,")


@dataclass(frozen=True)
class Checked:
    """A request that can be drawn. `fields` and what is in `cells` are JSON, for the ledger."""

    fields: dict[str, Any]  # as given, under our names, with images by their digests
    cells: list[dict[str, Any]]  # of a grid, one image each; one cell without a grid
    seeds: list[list[int]]  # of each cell's images
    variations: list[list[int] | None]
    steps: list[int]  # of each image of a cell
    size: tuple[int, int]  # width, height of the first cell's images

    @property
    def images(self) -> int:
        return sum(map(len, self.seeds))


class Reader:
    """Reads requests for one server: its catalogue, its store, and the common keywords of Pipeline."""

    def __init__(self, catalog: Catalog, store: Store, common: Mapping[str, Any]):
        self.catalog, self.store, self._common = catalog, store, common

    def read(self, given: Mapping[str, Any]) -> Checked:
        """Check a request without reading weights. Raises LdmError naming the field, in one line, without paths."""
        fields = self._named(given)
        axes = check_axes(fields.get("grid"))
        cells = self._cells(fields, axes)
        checked = [self._check(cell) for cell in cells]
        images = sum(len(one.seeds) for one in checked)
        require(images <= limits.MAX_IMAGES, f"{images} images are more than {limits.MAX_IMAGES}", "num_images")
        first = checked[0].settings.runs[-1]
        return Checked(
            fields,
            cells,
            [list(one.seeds) for one in checked],
            [[seed for seed, _ in one.variations] if one.variations else None for one in checked],
            [sum(run.steps for run in one.settings.runs) for one in checked],
            (first.width, first.height),
        )

    def _named(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields under our names, images kept as files; None and absent mean the model's own."""
        for word in given:
            name = ALIASES.get(word, word)
            if name in SERVERS:
                raise ConfigError("is chosen where the server is started, not by its clients", where=str(word)[:80])
            if name in ABSENT:
                raise ConfigError("is not available to the server's clients", where=str(word)[:80])
        fields = resolve_aliases(given, dict.fromkeys(OFFERED))
        fields = {name: value for name, value in fields.items() if value is not None}
        require(isinstance(fields.get("prompt"), str), "expected a text", "prompt")
        for name in ("prompt", "negative_prompt"):
            text = fields.get(name, "")
            require(isinstance(text, str), "expected a text", name)
            require(len(text) <= limits.MAX_PROMPT, f"more than {limits.MAX_PROMPT:,} characters", name)
        for name in ("timesteps", "sigmas"):
            levels = fields.get(name, [])
            require(isinstance(levels, list) and len(levels) <= limits.MAX_STEPS + 1, "expected a short list", name)
        for name in IMAGES:
            if name in fields:
                fields[name] = self._kept(fields[name], name)
        fields["lora"] = [list(pair) for pair in _loras(fields.get("lora", []))]
        self.pipeline(fields)
        return {name: value for name, value in fields.items() if value != []}

    def _kept(self, value: Any, where: str) -> dict[str, str]:
        """{"input": digest} of an image: base64 text, {"id": …} of the gallery, or {"input": …}."""
        if isinstance(value, Mapping) and len(value) == 1:
            ((kind, name),) = value.items()
            data = None
            if isinstance(name, str) and kind == "id":
                data = self.store.image_bytes(name)
            elif isinstance(name, str) and kind == "input":
                data = self.store.input_bytes(name)
            if data is None:
                raise ConfigError("there is no such image", where=where)
        else:
            data = decode_base64(value, where)
        return {"input": self.store.add_input(encode(OPENED[where](data, where)))}

    def _cells(self, fields: dict[str, Any], axes: Sequence[Axis]) -> list[dict[str, Any]]:
        plain = {name: value for name, value in fields.items() if name != "grid"}
        if not axes:
            return [plain]
        cells = math.prod(len(axis.labels) for axis in axes)
        require(cells <= limits.MAX_CELLS, f"{cells} images are more than {limits.MAX_CELLS}", "grid")
        seed = self._check(plain).seeds[0]
        entries = grid_entries(Entry("grid", 1, "", {**plain, "seed": seed}), axes)
        for entry in entries:
            if entry.error is not None:
                raise entry.error
        found = [dict(entry.settings or {}) for entry in entries]
        for cell in found:
            self.pipeline(cell)  # checks prompts, which axes may change
        return found

    def _check(self, cell: Mapping[str, Any]) -> Request:
        """generate's own check of a cell, and the limits of this server."""
        call = {name: value for name, value in self.call(cell).items() if name in OF_GENERATE}
        request = check_request({**dict.fromkeys(OF_GENERATE), **DEFAULTS, **call}, 1, self._info(cell))
        for run in request.settings.runs:
            pixels = run.width * run.height
            require(pixels <= limits.MAX_PIXELS, f"{run.width}x{run.height} are too many pixels", "size")
        steps = max(request.settings.num_inference_steps, *(run.steps for run in request.settings.runs))
        require(steps <= limits.MAX_STEPS, f"{steps} steps are more than {limits.MAX_STEPS}", "num_inference_steps")
        return request

    def _info(self, cell: Mapping[str, Any]) -> Any:
        return self.catalog.info(cell.get("model", self.catalog.default), cell.get("vae"))

    def pipeline(self, cell: Mapping[str, Any]) -> Pipeline:
        """The pipeline of a cell. Reads no weights; raises LdmError as Pipeline does."""
        return Pipeline(cell["prompt"], **self.pipeline_words(cell))

    def warm(self) -> None:
        """Load the default model, so that the first image waits for nothing but itself. Raises LdmError."""
        if not self._common.get("offload"):
            where = {name: self._common.get(name, "auto") for name in ("device", "dtype")}
            default = self.catalog.default
            with LOADING:
                load_model(self.catalog.pick("model", default), **where, **self.catalog.parts(default))

    def pipeline_words(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Pipeline's keywords of a request, beside its prompt."""
        pick, words = self.catalog.pick, dict(self._common)
        model = fields.get("model", self.catalog.default)
        words["model"] = pick("model", model)
        words |= self.catalog.parts(model, fields.get("vae"))
        words["negative_prompt"] = fields.get("negative_prompt", "")
        words["lora_dir"] = self.catalog.lora_dir
        if fields.get("lora"):
            words["lora"] = [(pick("lora", name), weight) for name, weight in fields["lora"]]
        return words

    def call(self, cell: Mapping[str, Any]) -> dict[str, Any]:
        """generate's keywords of a cell, its images opened."""
        call = {name: value for name, value in cell.items() if name in OF_GENERATE}
        for name in IMAGES:
            if name in call:
                data = self.store.input_bytes(call[name]["input"])
                if data is None:
                    raise ConfigError("the image to begin at is gone", where=name)
                call[name] = OPENED[name](data, name)
        return call


def _loras(value: Any) -> list[tuple[str, float]]:
    """[(name, weight), …] from a name, or a list of names and of [name, weight] or {"name", "weight"}."""
    items = value if isinstance(value, list) else [value]
    require(len(items) <= limits.MAX_LORAS, f"more than {limits.MAX_LORAS} LoRAs", "lora")
    found = []
    for item in items:
        if isinstance(item, Mapping) and set(item) <= {"name", "weight"}:
            item = [item.get("name"), item.get("weight", 1.0)]
        name, weight = (item, 1.0) if isinstance(item, str) else item if _is_pair(item) else (None, 1.0)
        require(isinstance(name, str), "expected names, or pairs of a name and a weight", "lora")
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        require(number and math.isfinite(weight) and abs(weight) <= 100, "expected a weight from -100 to 100", "lora")
        found.append((name, float(weight)))
    return found


def _is_pair(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 2


def check_axes(value: Any) -> tuple[Axis, ...]:
    """The axes of ["steps=4,8", …]. Raises ConfigError, before a value is parsed, for a word that is not of AXES."""
    if value in (None, []):
        return ()
    texts = isinstance(value, list) and all(isinstance(item, str) and len(item) <= 4000 for item in value)
    require(texts, 'expected a list of texts such as "steps=4,8"', "grid")
    for item in value:
        word = item.partition("=")[0]
        if WORDS.get(find_word(word) or "") not in AXES:
            raise ConfigError(f"{word.strip()!r:.80} is no axis of a grid", where="grid", hint=f"use {', '.join(AXES)}")
    try:
        return read_axes(value)
    except ConfigError as error:
        raise ConfigError(error.what, where="grid", hint=error.hint) from None


def decode_base64(value: Any, where: str) -> bytes:
    """The bytes of base64 text or of a data: URL of an image; no other URL is taken."""
    require(isinstance(value, str), "expected an image as base64 text", where)
    if match := BASE64.match(value[:64]):
        value = value[match.end() :]
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError("expected an image as base64 text", where=where, hint="URLs are not fetched") from None


def opened(data: bytes, where: str) -> Image.Image:
    """An image of limited size, upright, in RGB, transparency laid on white. Raises ConfigError."""
    return _limited(read_image, data, where)


def opened_mask(data: bytes, where: str) -> Image.Image:
    """A mask of limited size, upright: in RGBA where it is transparent anywhere, else in RGB. Raises ConfigError."""
    return _limited(read_with_alpha, data, where)


OPENED = {"image": opened, "mask_image": opened_mask}  # a mask's transparency may be its shape: see pipeline/sources


def _limited(read: Callable[[BinaryIO], Image.Image], data: bytes, where: str) -> Image.Image:
    try:
        image = read(io.BytesIO(data))
    except DataError as error:
        raise ConfigError(error.what, where=where, hint=error.hint) from None
    require(image.width * image.height <= 4 * limits.MAX_PIXELS, f"{image.width}x{image.height} is too large", where)
    return image


PATHS = re.compile(r"(?<![\w.:/])~?(?:/[^/\s:;,'\"()]+)+/([^/\s:;,'\"()]*)")


def public(error: LdmError) -> str:
    """An error's line for a client: the field, what is wrong and what to do, with no path of this machine."""
    where = "" if error.where is None else str(error.where)
    folder = isinstance(error.where, Path) or "/" in where or "\\" in where
    text = "; ".join(part for part in (error.what, error.hint) if part)
    text = PATHS.sub(r"\1", text)
    return text if folder or not where else f"{where[:80]}: {text}"


def analyse(catalog: Catalog, prompt: str, model: str, steps: int = 25) -> dict[str, Any]:
    """How a model reads a prompt: its number of tokens, those that fit at once, unknown words, odd brackets."""
    from ldm.nn.text import cut_off, tokenize
    from ldm.prompts import Prompt, take_loras

    encoder = catalog.text(model)
    plain, _ = take_loras(checks.check_prompts(prompt)[0])
    parsed = Prompt.parse(plain)
    texts = [text for _, text in parsed.at_steps(steps)]
    tokens = [tokenize(encoder, text.pieces) for text in texts]
    counts = [max((sum(map(len, chunks)) for chunks in one.parts), default=0) for one in tokens]
    words = [word for text in texts for word in encoder.unknown_words(text.plain)]
    return {
        "tokens": max(counts, default=0),
        "chunk": getattr(encoder, "max_length", 77) - 2,
        "chunks": max((one.chunks for one in tokens), default=1),
        "unknown_words": list(dict.fromkeys(words)),
        "truncated": " … ".join(filter(None, (cut_off(encoder, text.plain) for text in texts))),
        "remarks": list(parsed.remarks),
    }
