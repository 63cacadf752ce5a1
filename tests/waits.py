"""What a GPU would be waited for, and how often it is given work, counted without one.

The "meta" device stands for the GPU: it computes nothing, so that whatever asks for a number of it raises.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
VIEWS = ("view", "slice", "select", "expand", "permute", "transpose", "t.", "alias", "detach", "unsqueeze", "squeeze")
VIEWS += ("split", "unbind", "as_strided", "_unsafe_view", "empty", "unfold", "chunk", "lift", "is_", "_has_", "sym_")


class Waits(TorchDispatchMode):
    """`waits` by operation: copies from or to the device that hold the process up; `launches` on the device."""

    def __init__(self):
        super().__init__()
        self.waits, self.launches = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = str(func).removeprefix("aten.")
        out = result if isinstance(result, torch.Tensor) else None
        tensors = [one for one in torch.utils._pytree.tree_leaves((args, kwargs, result)) if torch.is_tensor(one)]
        if name.startswith(("_to_copy", "copy_")) and len({one.device for one in tensors}) > 1:
            asynchronous = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            self.waits[name] += not asynchronous
        elif name.startswith("_local_scalar_dense") and tensors[0].device.type != "cpu":
            self.waits[name] += 1
        on_device = out is None or out.device == META
        if on_device and any(one.device == META for one in tensors) and not name.startswith(VIEWS):
            self.launches[name] += 1
        return result
