"""Convert a model without loss: a folder, hub id or single file into a folder or a single file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ldm import console
from ldm.checkpoint import folder as layouts
from ldm.checkpoint import single
from ldm.checkpoint.model import card_of, check_model, is_single, load_model, resolve
from ldm.checkpoint.safety import PICKLES, Header, read_header
from ldm.checkpoint.save import refuse_foreign, save_model
from ldm.device import DTYPES, check_dtype
from ldm.errors import ModelError

# stored type -> the smallest of ours that holds it without loss
HALVES = {
    "F16": "fp16",
    "BF16": "bf16",
    "F8_E4M3": "bf16",
    "F8_E5M2": "bf16",
}
MAX_SHARD_MB = 50_000  # one file for each part, as other programs expect


def convert(
    model: str | Path,
    out: str | Path,
    dtype: str | None = None,
    prediction_type: str | None = None,
    vae: str | Path | None = None,
    text_encoders: Any = None,
) -> Path:
    """Write `model` (a folder, a single file, a hub id) as `out`: a single file if that ends with .safetensors, else a
    diffusers folder. Returns its path.

    `dtype` (fp32, fp16, bf16, or torch's names) is the weights' own by default. `prediction_type`, `vae` and
    `text_encoders` are as in load_model; the model card is copied. Raises ConfigError and ModelError before any weight
    is read: for a model that cannot be used, and an `out` that exists and is no model; ResourceError where it cannot be
    written.
    """
    import torch

    out = Path(os.path.expanduser(out))
    to_single = out.suffix.lower() == single.SUFFIX
    if out.suffix.lower() in PICKLES:
        raise ModelError(
            "only safetensors is written", where=out, hint=f"end the name with {single.SUFFIX}, or nothing"
        )
    dtype = check_dtype(dtype or "auto")
    (single.check_target if to_single else refuse_foreign)(out)
    check_model(model, vae, prediction_type, text_encoders)
    source = resolve(model)
    if out.exists() and out.samefile(source):
        raise ModelError("is the model itself", where=out, hint="choose another name")
    if dtype == "auto":
        dtype = stored_dtype(source, () if vae is None else ("vae",), single.listed_texts(text_encoders))
    weights_dtype = getattr(torch, DTYPES[dtype])
    options = {"cache": False, "prediction_type": prediction_type, "text_encoders": text_encoders}
    loaded = load_model(model, "cpu", weights_dtype, vae, **options)
    for group, count in loaded.info.get("ignored_keys", {}).items():
        console.say(f"left out: {count} of {group}")
    modules = (loaded.unet, loaded.vae.module, *loaded.text.modules)
    total = sum(p.numel() for module in modules for p in module.parameters()) * weights_dtype.itemsize
    with console.progress(total=total, desc=f"writing {out.name}", unit="B", disable=total < 1 << 30) as bar:
        if to_single:
            return single.save_single(loaded, out, weights_dtype, card_of(loaded), bar.update)
        return save_model(loaded, out, weights_dtype, MAX_SHARD_MB, card_of(loaded), bar.update)


def stored_dtype(path: Path, skip: tuple[str, ...] = (), texts: tuple[Path, ...] = ()) -> str:
    """fp32, fp16 or bf16: the smallest that holds every weight of a model's folder or file without loss."""
    if is_single(path):
        files = single.plan_of(path, "epsilon", skip, texts=texts).files
        stored = set().union(*(_kinds(header, destinations) for _, header, destinations in files))
    else:
        layout = layouts.read_layout(path, skip)
        headers = [read_header(path) for part in layout.weights for path in layout.shards(part)]
        stored = set().union(*(_kinds(header, header.tensors) for header in headers))
    names = {HALVES.get(dtype, "fp32") for dtype in stored}
    return names.pop() if len(names) == 1 else "fp32"


def _kinds(header: Header, names) -> set[str]:
    """The floating types of these tensors."""
    return {kind for name in names if (kind := header.tensors[name].dtype)[0] in "FB" and kind != "BOOL"}
