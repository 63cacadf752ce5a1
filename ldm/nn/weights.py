"""Loading weights onto a module that was built without memory (on the meta device)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldm import console
from ldm.errors import ModelError

Module = TypeVar("Module", bound=nn.Module)
QUANTISED = ("scale", "quant", "absmax", "fp8", "zeros")  # marks of weights that mean something else without them


def on_meta(build: Callable[[], Module]) -> Module:
    """The module that `build` makes, on the meta device: without memory."""
    with torch.device("meta"):
        return build()


def load_weights(module: Module, state: Mapping[str, Tensor], where: object = None) -> Module:
    """Gives a module the tensors of `state` themselves (no copy); returns it in eval mode. Raises as `check_keys`.

    Leftovers of exporters, such as tables of noise levels and position ids, are left out, and told.
    """
    left = check_keys(module, state, where)
    if left:
        amount = f"{len(left)} tensor{'s' if len(left) > 1 else ''} that the model has no use for"
        names = ", ".join(left[:5]) + (", …" if len(left) > 5 else "")
        console.say(f"{where or type(module).__name__}: {amount}: {names}")
    module.load_state_dict({name: t for name, t in state.items() if name not in left}, strict=True, assign=True)
    return module.eval()


def check_keys(module: nn.Module, state: Mapping[str, Tensor], where: object = None) -> list[str]:
    """Compares names and shapes; returns the leftovers, which no network computes with.

    Raises ModelError that lists all else that differs, five names of each sort.
    """
    expected = module.state_dict()
    left = [name for name in state if name not in expected and _is_leftover(name)]
    if {name: t.shape for name, t in expected.items()} != {n: t.shape for n, t in state.items() if n not in left}:
        what = f"weights do not fit {type(module).__name__} ({len(expected)} tensors): {_differences(expected, state)}"
        raise ModelError(what, where=where, hint="check that config and weights belong to the same model")
    return left


def _is_leftover(name: str) -> bool:
    """Whether a tensor without a place is harmless: no weight of a layer, and no sign of quantised ones."""
    plain = name.removesuffix("logit_scale").lower()
    return not name.endswith(("weight", "bias")) and not any(mark in plain for mark in QUANTISED)


def _differences(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    sorts = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    return "; ".join(_first(names, sort) for sort, names in sorts.items() if names)


def _first(names: list[str], sort: str, count: int = 5) -> str:
    return f"{len(names)} {sort} ({', '.join(names[:count])}{', ...' if len(names) > count else ''})"
