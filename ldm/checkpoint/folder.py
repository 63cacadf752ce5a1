"""A diffusers folder: where a model is and which files it consists of, checked without reading a weight.

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from ldm.checkpoint.safety import PICKLES, check_manifest, read_header, read_json, refuse_pickle
from ldm.errors import ModelError
from ldm.files import sha256

PACKAGE = Path(__file__).resolve().parents[1]  # …/ldm, through the links of an editable install too
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
INDEX = "model_index.json"
CARD = "README.md"  # not in the manifest, so that it can be edited
T5_PIPELINE = "LdmT5Pipeline"  # diffusers layout, our class: diffusers has none of this name and refuses the folder
T5_MODULE = ["ldm.nn.text", "T5Text"]  # in model_index.json; its StableDiffusionPipeline would drop the text's mask
CLIP_PIPELINE = "LdmTransformerPipeline"  # as well: a flow transformer that reads with one CLIP
CLIP_LAYOUT = "diffusers layout, our class: diffusers has no pipeline for a flow transformer with one CLIP"
T5_LAYOUT = "diffusers layout, our class: diffusers has no pipeline for T5 with this U-Net"
ONE = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
TWO = (*ONE, "text_encoder_2", "tokenizer_2")
FLUX = ("transformer", *TWO[1:])
SD3 = (*FLUX, "text_encoder_3", "tokenizer_3")
OPTIONAL = ("text_encoder_3", "tokenizer_3")  # SD3's T5: both or none
PIPELINES = {  # what is supported, and the components of each
    "StableDiffusionPipeline": ONE,
    "StableDiffusionImg2ImgPipeline": ONE,
    "LatentConsistencyModelPipeline": ONE,
    "LatentConsistencyModelImg2ImgPipeline": ONE,
    "StableDiffusionInpaintPipeline": ONE,
    "StableDiffusionXLPipeline": TWO,
    "StableDiffusionXLImg2ImgPipeline": TWO,
    "StableDiffusionXLInpaintPipeline": TWO,
    T5_PIPELINE: ONE,
    CLIP_PIPELINE: ("transformer", *ONE[1:]),
    "StableDiffusion3Pipeline": SD3,
    "StableDiffusion3Img2ImgPipeline": SD3,
    "StableDiffusion3InpaintPipeline": SD3,
    "FluxPipeline": FLUX,
    "FluxImg2ImgPipeline": FLUX,
    "FluxInpaintPipeline": FLUX,
}
T5 = ("T5EncoderModel", T5_MODULE[1])
CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
T5_TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
CLASSES = {  # what each component may be
    "unet": ("UNet2DConditionModel",),
    "transformer": ("SD3Transformer2DModel", "FluxTransformer2DModel"),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection", *T5),
    "text_encoder_2": ("CLIPTextModelWithProjection", T5[0]),
    "text_encoder_3": (T5[0],),
    "tokenizer": (*CLIP_TOKENIZERS, *T5_TOKENIZERS),
    "tokenizer_2": (*CLIP_TOKENIZERS, *T5_TOKENIZERS),
    "tokenizer_3": T5_TOKENIZERS,
    "scheduler": (),  # the schedule reads its settings and refuses what it does not know
}
IGNORED = ("safety_checker", "feature_extractor", "image_encoder")  # named in Model.info, not loaded
STEMS = dict.fromkeys(("unet", "transformer", "vae"), "diffusion_pytorch_model")
STEMS |= dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), "model")
CONFIGS = {**dict.fromkeys(STEMS, "config.json"), "scheduler": "scheduler_config.json"}
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
WORDS = "words.json"  # ours: the words that the text encoder was trained on
TOKENIZER += ("added_tokens.json", WORDS)
OTHER_TOWERS = ("vision_model.", "visual_projection.", "logit_scale")  # of CLIP, where a text encoder is asked for
OTHERS = {  # pipelines that people will bring, by a part of their class name
    "ControlNet": "ControlNet",
    "XL": "this kind of Stable Diffusion XL",
    "Diffusion3": "this kind of Stable Diffusion 3",
    "Flux": "this kind of FLUX",
}


def shipped(name: str) -> Path:
    """The folder `weights`, `configs` or `docs/prompts`, there or not: the wheel's `ldm/_<name>`, or the checkout's."""
    packaged = PACKAGE / f"_{name.rpartition('/')[2]}"
    return packaged if packaged.is_dir() else PACKAGE.parent / name


def default_folder() -> Path:
    """The default model's folder. Raises ModelError where this installation has none."""
    folder = shipped("weights") / "default"
    if not folder.is_dir():
        hint = "install the package again, or name a model folder"
        raise ModelError("the default model is not there", where=folder, hint=hint)
    return folder


def is_hub_id(name: str) -> bool:
    """Whether this can only be a repository: `owner/name`, and neither that path nor a folder `owner` exists here."""
    if Path(name).suffix.lower() in (*PICKLES, ".safetensors"):
        return False
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists() and not Path(name).parent.exists()


@dataclass(frozen=True)
class Layout:
    """The files of one model (or of an autoencoder alone, without an index), checked; all paths exist."""

    folder: Path
    index: Mapping[str, Any]  # model_index.json
    configs: Mapping[str, Mapping[str, Any]]  # component -> its config.json
    weights: Mapping[str, list[Path]]  # component -> [file] or [index.json, shards…]
    manifest: Mapping[str, Mapping[str, Any]]  # path in the folder -> sha256, size; {} without a manifest

    def settings(self) -> list[str]:
        """Every file beside the weights that loading reads, as paths in the folder."""
        paths = [path for paths in self.weights.values() for path in paths if path.suffix == ".json"]
        paths += [self.tokenizer(part) / name for part in self.texts() for name in TOKENIZER]
        names = [path.relative_to(self.folder).as_posix() for path in paths if path.is_file()]
        if not self.index and not self.texts():  # an autoencoder's folder
            return [*names, "config.json"]
        return [*names, *(f"{part}/{CONFIGS[part]}" for part in self.configs), *([INDEX] if self.index else ())]

    @property
    def network(self) -> str:
        """The component that denoises: unet or transformer."""
        return "transformer" if "transformer" in self.configs else "unet"

    def texts(self) -> list[str]:
        """The text encoders in their order."""
        return [part for part in self.weights if part.startswith("text_encoder")]

    def tokenizer(self, part: str) -> Path:
        """The folder of a text encoder's tokenizer."""
        return self.folder / part.replace("text_encoder", "tokenizer")

    def text_class(self, part: str) -> str:
        """The class of a text encoder: by model_index.json, else by its config.json, else CLIPTextModel."""
        named = self.index.get(part) or self.configs[part].get("architectures") or ()
        return next((name for name in CLASSES[part] if name in named), CLASSES[part][0])

    def shards(self, part: str) -> list[Path]:
        return [path for path in self.weights[part] if path.suffix == ".safetensors"]


def read_layout(folder: Path, skip: tuple[str, ...] = ()) -> Layout:
    """Check a model folder as far as possible without reading a weight; components in `skip` may be missing.

    Raises ModelError: no folder, a pipeline that is not supported, a part missing, malformed or of another size.
    """
    layout = read_configs(folder, skip)
    weights = {part: weight_files(folder / part, STEMS[part]) for part in layout.configs if part in STEMS}
    return _checked(dataclasses.replace(layout, weights=weights, manifest=check_manifest(folder)))


def read_configs(folder: Path, skip: tuple[str, ...] = ()) -> Layout:
    """The layout of a model folder whose weights may not be there: its settings alone. Raises ModelError."""
    index = check_index(folder)
    absent = [part for part in OPTIONAL if not _named(index, part)]
    parts = [part for part in PIPELINES[index["_class_name"]] if part not in (*skip, *absent)]
    configs = {part: read_json(folder / part / CONFIGS[part]) for part in parts if part in CONFIGS}
    return Layout(folder, index, configs, {}, {})


def _checked(layout: Layout) -> Layout:
    """The same layout, its text encoders, tokenizers and the tensor table of every weight file checked."""
    for part in layout.texts():
        named, kind = layout.text_class(part), layout.configs[part].get("model_type")
        if (kind == "t5") != (named in T5):
            path = layout.folder / part / CONFIGS[part]
            raise ModelError(f"is of model type {kind}, but the index names the text encoder {named}", where=path)
        check_tokenizer(layout.tokenizer(part), named in T5)
    for part in layout.weights:
        for path in layout.shards(part):
            read_header(path)
    return layout


def check_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a supported kind. Raises ModelError that says what the path is instead."""
    where = folder / INDEX
    index = read_json(where) if where.is_file() else _no_index(folder)
    components = PIPELINES.get(str(index.get("_class_name")))
    if components is None:
        raise _unknown(index.get("_class_name"), where)
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list) or part in IGNORED or value == [None, None]:
            continue
        name = value[-1] if value and isinstance(value[-1], str) else str(value)
        if part not in components or (CLASSES[part] and name not in CLASSES[part]):
            raise ModelError(f"the component {part} ({name}) is not supported", where=where)
    optional = OPTIONAL if not any(_named(index, part) for part in OPTIONAL) else ()
    if missing := [part for part in components if part not in optional and not _named(index, part)]:
        raise _incomplete(index, missing, where)
    return index


def _named(index: Mapping[str, Any], part: str) -> bool:
    return index.get(part) not in (None, [None, None])


def vae_layout(folder: Path) -> Layout:
    """The layout of an autoencoder's folder, checked as far as possible without reading a weight."""
    if not folder.is_dir():
        refuse_pickle(folder)
        raise ModelError("is not an autoencoder's folder", where=folder, hint="name a folder with config.json")
    config = read_json(folder / "config.json")
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise ModelError(f"is {config['_class_name']}, not AutoencoderKL", where=folder / "config.json")
    weights = weight_files(folder, STEMS["vae"])
    manifest = check_manifest(folder)
    if not manifest and folder.name == "vae":  # a part of a whole model
        whole = check_manifest(folder.parent).items()
        manifest = {name.removeprefix("vae/"): entry for name, entry in whole if name.startswith("vae/")}
    return _checked(Layout(folder, {}, {"vae": config}, {"vae": weights}, manifest))


def _no_index(folder: Path) -> NoReturn:
    """Raise ModelError that says what is there instead of a model's folder."""
    if folder.is_file():
        refuse_pickle(folder)
        if folder.suffix.lower() == ".safetensors":
            read_header(folder)
            hint = "make a folder of it: ldm convert FILE FOLDER"
            raise ModelError("is a single file, and a model folder is needed here", where=folder, hint=hint)
        raise ModelError("is neither a model folder nor a weight file", where=folder)
    if not folder.is_dir():
        raise ModelError("no such model folder", where=folder, hint="check the path, or leave --model out")
    hint = "name the folder that has one"
    if (folder / "model" / INDEX).is_file():
        hint = f"did you mean {folder / 'model'}?"
    elif pickle := next((p.name for p in sorted(folder.iterdir()) if p.suffix.lower() in PICKLES), None):
        hint = f"{pickle} is a pickle, and pickles are never opened: get the model as safetensors"
    elif (folder / "config.json").is_file() and (name := read_json(folder / "config.json").get("_class_name")):
        hint = f"this is a single {name}, not a whole model"
    raise ModelError(f"is no model folder, it has no {INDEX}", where=folder, hint=hint)


def _unknown(pipeline: object, where: Path) -> ModelError:
    known = next((name for part, name in OTHERS.items() if part in str(pipeline)), None)
    what = f"{known} ({pipeline})" if known else f"the pipeline {pipeline}"
    return ModelError(f"{what} is not supported", where=where, hint=f"supported: {', '.join(PIPELINES)}")


def _incomplete(index: Mapping[str, Any], missing: list[str], where: Path) -> ModelError:
    pipeline = index["_class_name"]
    if (
        "text_encoder" in missing
        and PIPELINES[pipeline] is TWO
        and not {"text_encoder_2", "tokenizer_2"} & set(missing)
    ):
        return ModelError(f"the XL refiner ({pipeline}) is not supported", where=where)
    return ModelError(f"names no {' and no '.join(missing)}", where=where, hint="get the whole model folder")


def check_tokenizer(folder: Path, t5: bool) -> None:
    """Raise ModelError where a tokenizer's folder lacks a vocabulary, or holds a malformed file."""
    has = {name for name in TOKENIZER if (folder / name).is_file()}
    if t5 and "tokenizer.json" not in has:
        hint = "transformers' T5TokenizerFast writes it from spiece.model"
        raise ModelError("no tokenizer.json", where=folder, hint=hint)
    if not ("tokenizer.json" in has or {"vocab.json", "merges.txt"} <= has):
        raise ModelError("no vocab.json and merges.txt, nor tokenizer.json", where=folder, hint="get the whole folder")
    for name in has - {"merges.txt"}:
        read_json(folder / name)


def check_digest(layout: Layout, name: str, digest: str) -> str:
    """Raise ModelError unless the manifest (if there is one) lists `name` with this sha256; returns the digest."""
    if layout.manifest and name not in layout.manifest:
        raise ModelError("is not listed in the manifest", where=layout.folder / name, hint="remove it or the manifest")
    if layout.manifest and layout.manifest[name]["sha256"] != digest:
        raise ModelError("does not match the manifest's sha256", where=layout.folder / name, hint="get the file again")
    return digest


def check_settings(layout: Layout) -> dict[str, str]:
    """Check and return the sha256 of every file beside the weights that loading reads."""
    return {name: check_digest(layout, name, sha256(layout.folder / name)) for name in layout.settings()}


def identity(folder: Path) -> tuple:
    """Names, sizes, times and inodes of a model's files, of a single file with the settings beside it; () for none."""
    parts = [folder, *(folder / part for part in CLASSES)]
    paths = [path for part in parts if part.is_dir() for path in part.iterdir()]
    paths += [folder, *beside(folder)] if folder.is_file() else []
    stats = ((path, path.stat()) for path in sorted(paths) if path.is_file())
    return tuple((str(path), s.st_size, s.st_mtime_ns, s.st_ino) for path, s in stats)


def beside(file: Path) -> tuple[Path, Path]:
    """The settings of the original code beside a single file: its name with .yaml or .yml."""
    return file.with_suffix(".yaml"), file.with_suffix(".yml")


def digest_of(digests: Mapping[str, str]) -> str:
    """One sha256 over (path, sha256) of a model's files, the same with and without a manifest."""
    return hashlib.sha256("".join(f"{d}  {name}\n" for name, d in sorted(digests.items())).encode()).hexdigest()


def read_card(folder: Path) -> str | None:
    """README.md of a model's folder; None where there is none."""
    path = folder / CARD
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def card_settings(text: str) -> dict[str, Any]:
    """The settings between the `---` lines at the head of a model card; {} where there are none."""
    import yaml

    card = None
    with contextlib.suppress(yaml.YAMLError, ValueError):  # a malformed date is a ValueError
        card = yaml.safe_load(text[4:].split("\n---", 1)[0]) if text.startswith("---\n") else None
    return card if isinstance(card, dict) else {}


def card_with(text: str | None, drawing: Mapping[str, Any]) -> str:
    """A model card with these settings as the model's own for drawing, in place of those that it had."""
    head, _, rest = text[4:].partition("\n---") if text and text.startswith("---\n") else ("", "", f"\n\n{text or ''}")
    kept = re.sub(r"^ldm:.*\n?(?:[ \t].*\n?)*", "", head, flags=re.MULTILINE).rstrip("\n")
    lines = [*filter(None, [kept]), f"ldm: {json.dumps(dict(drawing))}"]
    return "\n".join(["---", *lines, f"---{rest}"])


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of one component: [single file] or [index.json, shards…], full precision before `.fp16`.

    Raises ModelError: none or a pickle alone; an index that is malformed or names files missing or elsewhere.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    for single in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        variant = single.removeprefix(stem).removesuffix("safetensors")
        index = f"{stem}.safetensors.index{variant}json"
        if single in names:
            return [folder / single]
        if index in names:
            return [folder / index, *_shards(folder / index)]
    raise _no_weights(folder, stem, names)


def _no_weights(folder: Path, stem: str, names: set[str]) -> ModelError:
    for name in sorted(names):
        if name.startswith((stem, "pytorch_model")):
            refuse_pickle(folder / name)
    return ModelError("no weights here", where=folder / f"{stem}.safetensors", hint="get the whole model folder")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not files or not all(isinstance(file, str) for file in files):
        raise ModelError("has no weight_map", where=index, hint="get the file again")
    shards = [index.parent / file for file in sorted(set(files))]
    for shard in shards:
        if shard.parent != index.parent or shard.suffix != ".safetensors" or shard.name in ("", ".."):
            raise ModelError(f"names {shard.name!r}, which is no safetensors file beside it", where=index)
        if not shard.is_file():
            raise ModelError(f"names {shard.name!r}, which is missing", where=index, hint="get the whole model folder")
    return shards


def index_for(pipeline: str, texts: Mapping[str, Any], scheduler_class: str) -> dict[str, Any]:
    """model_index.json as diffusers' pipelines write it; `texts` are the entries of text encoders and tokenizers."""
    index = {
        "_class_name": pipeline,
        "_diffusers_version": version("diffusers"),
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler_class],
        "vae": ["diffusers", "AutoencoderKL"],
        **texts,
    }
    if "transformer" in PIPELINES[pipeline]:
        index["transformer"] = ["diffusers", CLASSES["transformer"][pipeline.startswith("Flux")]]
    else:
        index["unet"] = ["diffusers", "UNet2DConditionModel"]
    if PIPELINES[pipeline] is ONE:
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    return dict(sorted(index.items()))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
