"""What the header of a single file says beside its tensors: our own settings, and what others write; no torch.

Our key is `ldm`: one JSON table with every config of the model's folder, so that a model of any width comes back whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm import config
from ldm.checkpoint.families import Family
from ldm.checkpoint.folder import beside
from ldm.checkpoint.safety import MAX_JSON, Header
from ldm.errors import ConfigError, ModelError, nearest

KEY, FORMAT = "ldm", 1
V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"  # empty tensors whose names say all (NoobAI, ComfyUI, Forge)
WORDS = {"eps": "epsilon", "epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
WORDS |= {"x": "sample", "x0": "sample", "sample": "sample"}
SAYS = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")  # metadata that names it outright
ARCHITECTURES = {"stable-diffusion-v2-768-v": "v_prediction", "stable-diffusion-v2-512": "epsilon"}
UNSAID = "its prediction type is not in the file: the same names hold epsilon and v models"
SAY = "give --prediction-type epsilon (2.x base, 512 pixels) or v_prediction (2.x, 768 pixels)"


def own_settings(header: Header, where: object) -> dict[str, Any] | None:
    """The table that `save_single` wrote; None in a file of others. Raises ModelError for one that is damaged."""
    if KEY not in header.metadata:
        return None
    try:
        own = json.loads(header.metadata[KEY])
        complete = isinstance(own["configs"], dict) and {"unet", "vae", "text_encoder", "scheduler"} <= set(
            own["configs"]
        )
        complete &= own["format"] == FORMAT and set(own["tokenizers"]) <= set(own["configs"])
    except (ValueError, LookupError, TypeError, RecursionError):
        complete = False
    if not complete:
        todo = "get the file again, or a newer ldm"
        raise ModelError(
            f"the settings in its header (format {FORMAT} is known) cannot be used", where=where, todo=todo
        )
    return own


def check_prediction_type(value: str | None) -> str | None:
    """epsilon, v_prediction or sample (or short: eps, v, x0) as diffusers spells it. Raises ConfigError."""
    if value is not None and value not in WORDS:
        raise ConfigError(f"unknown prediction type {value!r:.80}", todo=nearest(str(value), WORDS))
    return value and WORDS[value]


def prediction_type(header: Header, family: Family, path: Path, asked: str | None) -> str:
    """What the network's output means: as asked, as the file or the YAML beside it says, or as the family does.

    Raises ModelError where nothing says it for a 2.x model, and where two disagree.
    """
    if asked is not None:
        return asked
    said = {source: value for source, value in _said(header, path).items() if value is not None}
    if len(set(said.values())) > 1:
        what = ", ".join(f"{source} says {value}" for source, value in said.items())
        raise ModelError(f"its prediction type is told in two ways: {what}", where=path, todo="give --prediction-type")
    found = next(iter(said.values()), family.prediction_type)
    if found is None:
        raise ModelError(f"this is {family.title}, and {UNSAID}", where=path, todo=SAY)
    return found


def _said(header: Header, path: Path) -> dict[str, str | None]:
    metadata = header.metadata
    said = {key: WORDS.get(metadata.get(key, "").lower()) for key in SAYS}
    trained = metadata.get("ss_v_parameterization", "").lower()  # kohya's
    said["ss_v_parameterization"] = {"true": "v_prediction", "false": "epsilon"}.get(trained)
    name = metadata.get("modelspec.architecture", "").lower().partition("/")[0].removesuffix("-inpainting")
    said["modelspec.architecture"] = ARCHITECTURES.get(name)
    said[f"the key {V_KEY}"] = "v_prediction" if V_KEY in header.tensors else None
    said |= {settings.name: _of_yaml(settings) for settings in beside(path)}
    return said


def _of_yaml(path: Path) -> str | None:
    """The prediction type in a settings file of the original code (or of sgm); None where there is none."""
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_JSON:
        raise ModelError("is too large for a settings file", where=path)
    try:
        params = config.load(path)["model"]["params"]
        if "denoiser_config" in params:
            target = params["denoiser_config"]["params"]["scaling_config"]["target"]
            return "v_prediction" if target.rpartition(".")[2].startswith("V") else "epsilon"
        return WORDS.get(str(params.get("parameterization", "eps")))
    except (KeyError, TypeError, AttributeError):  # a YAML of another kind
        return None
    except ConfigError as error:
        raise ModelError(error.what, where=error.where or path, todo=error.todo) from None


def zero_snr(header: Header) -> bool:
    """Whether the file says that it was trained down to pure noise."""
    return ZERO_SNR_KEY in header.tensors or header.metadata.get("ss_zero_terminal_snr", "").lower() == "true"


def metadata_of(own: Mapping[str, Any], title: str) -> dict[str, str]:
    """The header's metadata: our table, and what others read (ModelSpec 1.0.0)."""
    configs = own["configs"]
    scheduler, size = configs["scheduler"], configs["unet"].get("sample_size")
    found = {"format": "pt", KEY: json.dumps(own, ensure_ascii=False, sort_keys=True), "modelspec.title": title}
    found |= {"modelspec.sai_model_spec": "1.0.0", "modelspec.implementation": "ldm"}
    v = scheduler["prediction_type"] == "v_prediction"
    architecture = {"sd1": "v1", "sd2": "v2-768-v" if v else "v2-512", "xl": "xl-v1-base"}
    name, _, inpainting = (own["family"] or "").partition("-")
    if name in architecture:
        found["modelspec.architecture"] = f"stable-diffusion-{architecture[name]}{'-inpainting' if inpainting else ''}"
    if scheduler["prediction_type"] in ("epsilon", "v_prediction"):
        found["modelspec.prediction_type"] = "v" if v else "epsilon"
    if size:
        side = size * 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        found["modelspec.resolution"] = f"{side}x{side}"
    return found
