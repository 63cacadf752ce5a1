"""The metadata in the header of a single file: the settings that `save_single` stores, and what other tools write.

Our key is `ldm`: one JSON table with every config of the model's folder, so that a model of any width can be loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint.families import Family
from ldm.checkpoint.folder import beside
from ldm.checkpoint.safety import MAX_JSON, Header
from ldm.checkpoint.types import PREDICTION_TYPES
from ldm.errors import ConfigError, ModelError
from ldm.nn.mmdit_config import FLUX, SD3
from ldm.settings_files import load

KEY, FORMAT = "ldm", 1
V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"  # empty tensors: their names are the message (NoobAI, ComfyUI, Forge)
# metadata whose value is the prediction type
NAMED_BY = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
ARCHITECTURES = {"stable-diffusion-v2-768-v": "v_prediction", "stable-diffusion-v2-512": "epsilon"}
FLOWS = {SD3: "stable-diffusion-3", FLUX: "flux-1-{}"}
UNKNOWN = "its prediction type is not in the file: epsilon and v models have the same names"
HINT = "give --prediction-type epsilon (2.x base, 512 pixels) or v_prediction (2.x, 768 pixels)"


def stored_settings(header: Header, where: object) -> dict[str, Any] | None:
    """The table that `save_single` wrote; None in a file of another tool. Raises ModelError where it is damaged."""
    if KEY not in header.metadata:
        return None
    try:
        settings = json.loads(header.metadata[KEY])
        parts = set(settings["configs"])
        complete = isinstance(settings["configs"], dict) and {"vae", "text_encoder", "scheduler"} <= parts
        complete &= "unet" in parts or "transformer" in parts
        complete &= settings["format"] == FORMAT and set(settings["tokenizers"]) <= parts
    except (ValueError, LookupError, TypeError, RecursionError):
        complete = False
    if not complete:
        what = f"the settings in its header (format {FORMAT} is known) cannot be used"
        raise ModelError(what, where=where, hint="get the file again, or a newer ldm")
    return settings


def find_prediction_type(header: Header, family: Family, path: Path, override: str | None) -> str:
    """What the network predicts: `override`, else what the file or the YAML beside it names, else the family's default.

    Raises ModelError where nothing names it for a 2.x model, and where two sources disagree.
    """
    if override is not None:
        return override
    declared = {source: value for source, value in _declared(header, path).items() if value is not None}
    if len(set(declared.values())) > 1:
        what = ", ".join(f"{source} says {value}" for source, value in declared.items())
        raise ModelError(f"its prediction type is ambiguous: {what}", where=path, hint="give --prediction-type")
    value = next(iter(declared.values()), family.prediction_type)
    if value is None:
        raise ModelError(f"this is {family.title}, and {UNKNOWN}", where=path, hint=HINT)
    return value


def _declared(header: Header, path: Path) -> dict[str, str | None]:
    metadata = header.metadata
    declared = {key: PREDICTION_TYPES.get(metadata.get(key, "").lower()) for key in NAMED_BY}
    trained = metadata.get("ss_v_parameterization", "").lower()  # kohya's
    declared["ss_v_parameterization"] = {"true": "v_prediction", "false": "epsilon"}.get(trained)
    name = metadata.get("modelspec.architecture", "").lower().partition("/")[0].removesuffix("-inpainting")
    declared["modelspec.architecture"] = ARCHITECTURES.get(name)
    declared[f"the key {V_KEY}"] = "v_prediction" if V_KEY in header.tensors else None
    declared |= {settings.name: _of_yaml(settings) for settings in beside(path)}
    return declared


def _of_yaml(path: Path) -> str | None:
    """The prediction type in a settings file of the original code (or of sgm); None where there is none."""
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_JSON:
        raise ModelError("is too large for a settings file", where=path)
    try:
        params = load(path)["model"]["params"]
        if "denoiser_config" in params:
            target = params["denoiser_config"]["params"]["scaling_config"]["target"]
            return "v_prediction" if target.rpartition(".")[2].startswith("V") else "epsilon"
        return PREDICTION_TYPES.get(str(params.get("parameterization", "eps")))
    except (KeyError, TypeError, AttributeError):  # a YAML of another kind
        return None
    except ConfigError as error:
        raise ModelError(error.what, where=error.where or path, hint=error.hint) from None


def zero_snr(header: Header) -> bool:
    """Whether the file is marked as trained down to pure noise (zero terminal SNR)."""
    return ZERO_SNR_KEY in header.tensors or header.metadata.get("ss_zero_terminal_snr", "").lower() == "true"


def metadata_of(settings: Mapping[str, Any], title: str) -> dict[str, str]:
    """The header's metadata: our table, and what other tools read (ModelSpec 1.0.0)."""
    configs = settings["configs"]
    network = configs.get("unet") or configs["transformer"]
    scheduler, size = configs["scheduler"], network.get("sample_size")
    metadata = {"format": "pt", KEY: json.dumps(settings, ensure_ascii=False, sort_keys=True), "modelspec.title": title}
    metadata |= {"modelspec.sai_model_spec": "1.0.0", "modelspec.implementation": "ldm"}
    v = scheduler.get("prediction_type") == "v_prediction"
    architecture = {"sd1": "v1", "sd2": "v2-768-v" if v else "v2-512", "xl": "xl-v1-base"}
    name, _, inpainting = (settings["family"] or "").partition("-")
    if name in architecture:
        suffix = "-inpainting" if inpainting else ""
        metadata["modelspec.architecture"] = f"stable-diffusion-{architecture[name]}{suffix}"
    if flow := FLOWS.get(network.get("_class_name")):
        metadata["modelspec.architecture"] = flow.format("dev" if network.get("guidance_embeds") else "schnell")
    if scheduler.get("prediction_type") in ("epsilon", "v_prediction"):
        metadata["modelspec.prediction_type"] = "v" if v else "epsilon"
    if size:
        side = size * 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        metadata["modelspec.resolution"] = f"{side}x{side}"
    return metadata
