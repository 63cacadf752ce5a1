"""Text encoders for training: CLIP's, T5's and open_clip's, alone or in pairs, from folders of any layout.

What an encoder is comes from its config.json (or open_clip_config.json), so that widths are known before any weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoint import build
from ldm.checkpoint.folder import T5, TOKENIZER, WORDS, check_tokenizer
from ldm.checkpoint.part_places import OPEN_CLIP, Place, find_place, weights_of
from ldm.checkpoint.safety import read_header, read_json, read_tensors
from ldm.checkpoint.single.names import Part, destination_of, open_clip_modules
from ldm.checkpoint.single.read import pieces
from ldm.checkpoint.vocabulary import END, LENGTH, clip_tokenizer, vocabulary
from ldm.console import say
from ldm.errors import ModelError
from ldm.files import sha256

if TYPE_CHECKING:
    import torch

    from ldm.nn.text import ClipText, T5Text, TextEncoder

PROJECTED = "CLIPTextModelWithProjection"
KEPT = {"t5": ("encoder.", "shared."), "clip": ("text_model.", "text_projection.", "embeddings.", "encoder.")}
KEPT["clip"] += ("final_layer_norm.",)  # beginnings of a text encoder's names in a file with more than that
TEXT_CFG = ("context_length", "vocab_size", "width", "heads", "layers")  # of open_clip's plain causal towers


@dataclass(frozen=True)
class TextPart:
    """One text encoder on disk."""

    folder: Path
    config: Mapping[str, Any]  # as transformers has it, `architectures` with the class that is built
    form: str  # of its tensors' names: clip, t5, open_clip
    tokenizer: Path | None  # None: CLIP's own vocabulary

    @property
    def width(self) -> int:
        """Of the states."""
        return self.config.get("d_model", 512) if self.form == "t5" else self.config.get("hidden_size", 512)

    @property
    def projected(self) -> int | None:
        """The width of the projected pooled text; None where it has no projection."""
        return self.config.get("projection_dim", 512) if self.config["architectures"][0] == PROJECTED else None

    @property
    def files(self) -> list[Path]:
        """Every file that loading reads."""
        names = [self.folder / name for name in ("config.json", OPEN_CLIP)]
        names += [] if self.tokenizer is None else [self.tokenizer / name for name in TOKENIZER]
        return [*weights_of(self.folder), *(path for path in names if path.is_file())]

    def build(self, weights: bool, digests: dict[Path, str]) -> ClipText | T5Text:
        """The encoder in fp32 on the CPU, or without `weights` one that can tokenize alone. Raises ModelError."""
        state = dict(self._tensors(weights, digests))
        if self.form == "t5":
            assert self.tokenizer is not None
            return build.t5_text(self.config, state, self.tokenizer, self.folder)
        if self.tokenizer is None:
            pad = "!" if self.config.get("pad_token_id") == 0 or self.form == "open_clip" else END
            return build.clip_text(self.config, state, clip_tokenizer(pad), self.folder)
        path = self.tokenizer / WORDS
        words = read_json(path).get("words") if path.is_file() else None
        return build.clip_text(self.config, state, build.clip_tokenizer(self.tokenizer), self.folder, words)

    def _tensors(self, weights: bool, digests: dict[Path, str]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) in transformers' form."""
        import torch

        for path in (path for path in weights_of(self.folder) if path.suffix == ".safetensors"):
            wanted = {name: to for name in read_header(path).tensors if (to := self._destination(name)) is not None}
            if weights:
                found, digests[path] = read_tensors(path, torch.float32, "cpu", names=wanted)
            else:
                shapes = read_header(path).tensors
                found = {name: torch.empty(shapes[name].shape, device="meta") for name in wanted}
            for name, destination in wanted.items():
                if isinstance(destination, str):
                    yield destination, found[name]
                else:
                    yield from zip(destination.names, pieces(found[name], destination))

    def _destination(self, name: str) -> Any:
        """The name that a tensor of the file has in transformers' form, or its Destination; None for others."""
        if self.form == "open_clip":
            part = Part("text_encoder", ("text.", ""), open_clip_modules(self.config), "open_clip")
            return destination_of(part, name)
        if name.startswith("text_projection.") and self.projected is None:
            return None
        return name if name.startswith(KEPT[self.form]) else None


@dataclass(frozen=True)
class TextParts:
    """One text encoder, or XL's two; to a new U-Net no text is the empty text, and not zeros."""

    places: tuple[Place, ...]
    encoders: tuple[TextPart, ...]

    @property
    def width(self) -> int:
        """Of the states that the U-Net reads."""
        return sum(encoder.width for encoder in self.encoders)

    @property
    def pooled(self) -> int | None:
        """The width of XL's pooled text; None for one encoder."""
        return self.encoders[1].projected if len(self.encoders) > 1 else None

    @property
    def tokens(self) -> int:
        """How many tokens every text is padded or cut to. Raises ModelError as `check` does."""
        return self._built(False, {}).max_length

    @property
    def files(self) -> list[Path]:
        """Every file that loading reads."""
        return [path for encoder in self.encoders for path in encoder.files]

    @property
    def fingerprints(self) -> list[str]:
        """One digest for each place, in their order."""
        if len(self.places) == 1:
            return [self.places[0].fingerprint(self.files)]
        return [place.fingerprint(encoder.files) for place, encoder in zip(self.places, self.encoders)]

    def check(self) -> None:
        """Raise ModelError where weights that are here do not fit the settings or the tokenizer; reads no weight."""
        self._built(False, {})

    def load(self) -> TextEncoder:
        """The text encoder in fp32 on the CPU. Raises ModelError."""
        digests: dict[Path, str] = {}
        text = self._built(True, digests)
        for place in self.places:
            _compare(place, {**{path: "" for encoder in self.encoders for path in encoder.files}, **digests})
        return text

    def _built(self, weights: bool, digests: dict[Path, str]) -> TextEncoder:
        from ldm.nn.text import XLText

        texts = [encoder.build(weights, digests) for encoder in self.encoders]
        for text in texts:
            for module in text.modules:
                module.requires_grad_(False)
        return texts[0] if len(texts) == 1 else XLText(texts[0], texts[1], zero_empty=False)


def _compare(place: Place, digests: Mapping[Path, str]) -> None:
    """Raise ModelError where a file of the place is not the one in its manifest."""
    manifest = place.manifest
    for path, digest in digests.items() if manifest else ():
        if not path.is_relative_to(place.root):
            continue
        entry = manifest.get(path.relative_to(place.root).as_posix())
        if entry is None:
            raise ModelError("is not listed in the manifest", where=path, hint="remove it or the manifest")
        if entry["sha256"] != (digest or sha256(path)):
            raise ModelError("does not match the manifest's sha256", where=path, hint="get the file again")


def find_text(
    name: str,
    subfolder: str | None = None,
    second: str | None = None,
    second_subfolder: str | None = None,
    weights: bool = True,
) -> TextParts:
    """The text encoder of a name (see `find_place`), or two: a model of XL has both, `second` names the other one.

    Checked by its settings alone. Raises ModelError for other kinds of encoders, for one without a tokenizer, and for
    a second one that does not project.
    """
    places = [find_place(name, "text", subfolder, weights)]
    folders = list(places[0].folders)
    if second:
        places.append(find_place(second, "text", second_subfolder, weights))
        other = [f for f in places[1].folders if f.name.endswith("_2")] or list(places[1].folders)
        folders = [*folders[:1], *other[:1]]
    if not all(place.folders for place in places):
        where = next(place.root for place in places if not place.folders)
        raise ModelError("is a single file", where=where, hint="make a folder of it: ldm convert FILE FOLDER")
    encoders = tuple(_text_part(folder, number == 1) for number, folder in enumerate(folders))
    if len(encoders) > 1:
        _check_pair(encoders)
    return TextParts(tuple(places), encoders)


def _check_pair(encoders: tuple[TextPart, ...]) -> None:
    for encoder in encoders:
        if encoder.form == "t5":
            raise ModelError("is T5, and two text encoders are CLIP's", where=encoder.folder, hint="give T5 alone")
    if encoders[1].projected is None:
        what = "has no projection, and XL's pooled text is made of it"
        raise ModelError(what, where=encoders[1].folder, hint=f"the second text encoder has to be {PROJECTED}")


def _text_part(folder: Path, second: bool) -> TextPart:
    """The text encoder of a folder, as its settings say."""
    if not (folder / "config.json").is_file() and (folder / OPEN_CLIP).is_file():
        config, form = _of_open_clip(read_json(folder / OPEN_CLIP), folder / OPEN_CLIP, second), "open_clip"
    else:
        config, form = _of_transformers(read_json(folder / "config.json"), folder / "config.json", second)
    tokenizer = _tokenizer_of(folder, config, form)
    if tokenizer is not None:
        check_tokenizer(tokenizer, form == "t5")
    return TextPart(folder, config, form, tokenizer)


def _of_transformers(config: Mapping[str, Any], where: Path, second: bool) -> tuple[dict[str, Any], str]:
    """(config of the text encoder, form) of a config.json, which may be that of a whole CLIP or T5."""
    kind, named = config.get("model_type"), (config.get("architectures") or ["CLIPTextModel"])[0]
    named = config.get("_class_name", named)  # of diffusers
    if kind == "t5" or named in T5:
        return {**config, "architectures": ["T5EncoderModel"]}, "t5"
    if kind == "clip":  # CLIP as a whole, of which the text encoder is used
        inside = {**(config.get("text_config") or {}), "projection_dim": config.get("projection_dim", 512)}
        return {**inside, "model_type": "clip_text_model", "architectures": [_class(second)]}, "clip"
    if kind in (None, "clip_text_model") and named in ("CLIPTextModel", PROJECTED):
        return {**config, "architectures": [named if second else _class(second)]}, "clip"
    what = f"is of class {named}, which is no text encoder that is supported"
    raise ModelError(what, where=where, hint="CLIP's, T5's and open_clip's are")


def _class(second: bool) -> str:
    """Only a second encoder's projection is read; diffusers would take the first one's for the states."""
    return PROJECTED if second else "CLIPTextModel"


def _of_open_clip(settings: Mapping[str, Any], where: Path, second: bool) -> dict[str, Any]:
    """An open_clip tower as transformers' settings; alone without its last layer, as Stable Diffusion 2.x uses it."""
    model = settings.get("model_cfg", settings)
    text = model.get("text_cfg")
    if not isinstance(text, Mapping) or "embed_dim" not in model:
        raise ModelError("has no text_cfg and embed_dim", where=where, hint="get the folder again")
    if unknown := sorted(set(text) - set(TEXT_CFG)):
        raise ModelError(f"has another kind of text tower ({', '.join(unknown)})", where=where)
    width, layers = text.get("width", 512), text.get("layers", 12)
    return {
        "architectures": [_class(second)],
        "model_type": "clip_text_model",
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": text.get("heads", 8),
        "num_hidden_layers": layers if second else layers - 1,
        "max_position_embeddings": text.get("context_length", LENGTH),
        "vocab_size": text.get("vocab_size", len(vocabulary())),
        "projection_dim": model["embed_dim"],
        "bos_token_id": len(vocabulary()) - 2,
        "eos_token_id": len(vocabulary()) - 1,
        "pad_token_id": 0,
    }


def _tokenizer_of(folder: Path, config: Mapping[str, Any], form: str) -> Path | None:
    """The folder of the encoder's tokenizer, inside or beside; None: CLIP's own. Raises ModelError."""
    beside = folder.name.replace("text_encoder", "tokenizer") if "text_encoder" in folder.name else "tokenizer"
    marks = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "spiece.model")
    for place in (folder, folder / "tokenizer", folder.parent / beside):
        if any((place / name).is_file() for name in marks):
            return place
    if form != "t5" and config.get("vocab_size", 49408) == len(vocabulary()):
        say(f"{folder}: has no tokenizer; it has CLIP's number of tokens, so CLIP's own is used", verbosity=1)
        return None
    raise ModelError("has no tokenizer inside or beside it", where=folder, hint="put it into tokenizer/ there")
