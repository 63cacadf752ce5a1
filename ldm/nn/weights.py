"""Loading weights onto a module that was built without memory (on the meta device)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldm.errors import ModelError

Module = TypeVar("Module", bound=nn.Module)


def on_meta(build: Callable[[], Module]) -> Module:
    """The module that `build` makes, on the meta device: without memory."""
    with torch.device("meta"):
        return build()


def load_weights(module: Module, state: Mapping[str, Tensor], where: object = None) -> Module:
    """Gives a module the tensors of `state` themselves (no copy); returns it in eval mode. Raises as `check_keys`."""
    check_keys(module, state, where)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval()


def check_keys(module: nn.Module, state: Mapping[str, Tensor], where: object = None) -> None:
    """Compares names and shapes; raises ModelError that lists all that differs, five names of each sort."""
    expected = module.state_dict()
    if {name: t.shape for name, t in expected.items()} != {name: t.shape for name, t in state.items()}:
        what = f"weights do not fit {type(module).__name__} ({len(expected)} tensors): {_differences(expected, state)}"
        raise ModelError(what, where=where, hint="check that config and weights belong to the same model")


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
