"""The original names of SD3's and FLUX's tensors, in single files and in LoRAs, and diffusers'. No torch.

Sources: mmditx.py of Stability AI's sd3.5, model.py and layers.py of Black Forest Labs' flux.
"""

from __future__ import annotations

from ldm.nn.mmdit_config import MMDiTConfig

QKV, ADDED_QKV = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
EMBEDDERS = {"in_layer": "linear_1", "out_layer": "linear_2"}  # of FLUX
SD3_EMBEDDERS = {"mlp.0": "linear_1", "mlp.2": "linear_2"}
MLP_RATIO = 4  # of the hidden width of a single block's feed-forward layer to the network's
LAST = "adaLN_modulation.1"  # of layers whose halves, shift and scale, diffusers has in the other order


def flow_modules(config: MMDiTConfig) -> dict[str, tuple[str, ...]]:
    """Original name of a module or of a whole tensor -> diffusers' names of what is stacked in it; of all a network."""
    table = {**flow_layers(config), f"final_layer.{LAST}": ("norm_out.linear",)}
    if config.is_flux:
        for i in range(config.num_layers):
            for side, added in (("img", ""), ("txt", "added_")):
                for one, short in (("query", "q"), ("key", "k")):
                    new = f"transformer_blocks.{i}.attn.norm_{added}{short}.weight"
                    table[f"double_blocks.{i}.{side}_attn.norm.{one}_norm.scale"] = (new,)
        for i in range(config.num_single_layers):
            for one, short in (("query", "q"), ("key", "k")):
                new = f"single_transformer_blocks.{i}.attn.norm_{short}.weight"
                table[f"single_blocks.{i}.norm.{one}_norm.scale"] = (new,)
        return table
    table["pos_embed"] = ("pos_embed.pos_embed",)
    last = config.num_layers - 1
    table[f"joint_blocks.{last}.context_block.{LAST}"] = (f"transformer_blocks.{last}.norm1_context.linear",)
    for i in range(config.num_layers if config.qk_norm else 0):
        sides = {"x_block.attn": "attn.norm_", "context_block.attn": "attn.norm_added_"}
        sides |= {"x_block.attn2": "attn2.norm_"} if i in config.dual_attention_layers else {}
        for old, new in sides.items():
            table |= {f"joint_blocks.{i}.{old}.ln_{x}": (f"transformer_blocks.{i}.{new}{x}",) for x in "qk"}
    return table


def has_halves_swapped(module: str, config: MMDiTConfig) -> bool:
    """Whether a module of `flow_modules` holds shift and scale, and diffusers' the scale first."""
    return module in (f"final_layer.{LAST}", f"joint_blocks.{config.num_layers - 1}.context_block.{LAST}")


def shares(names: tuple[str, ...]) -> tuple[int, ...]:
    """How many parts of a stack belong to each of its layers: a single block's feed-forward layer has more."""
    return tuple(MLP_RATIO if ".proj_mlp" in name else 1 for name in names)


def flow_layers(config: MMDiTConfig) -> dict[str, tuple[str, ...]]:
    """Original name of a linear layer -> diffusers' names of those that are stacked in it, along the outputs.

    Without final_layer.adaLN_modulation.1 and the last context_block's, whose halves are in another order.
    """
    return _flux(config) if config.is_flux else _sd3(config)


def _flux(config: MMDiTConfig) -> dict[str, tuple[str, ...]]:
    table = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    for old, new in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        table |= {f"{old}.{a}": f"time_text_embed.{new}_embedder.{b}" for a, b in EMBEDDERS.items()}
    found = {old: (new,) for old, new in table.items()}
    for i in range(config.num_layers):
        old, new = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for side, qkv, out, ff, norm in (
            ("img", QKV, "to_out.0", "ff", "norm1"),
            ("txt", ADDED_QKV, "to_add_out", "ff_context", "norm1_context"),
        ):
            found |= {
                f"{old}.{side}_attn.qkv": tuple(f"{new}.attn.{name}" for name in qkv),
                f"{old}.{side}_attn.proj": (f"{new}.attn.{out}",),
                f"{old}.{side}_mlp.0": (f"{new}.{ff}.net.0.proj",),
                f"{old}.{side}_mlp.2": (f"{new}.{ff}.net.2",),
                f"{old}.{side}_mod.lin": (f"{new}.{norm}.linear",),
            }
    for i in range(config.num_single_layers):
        old, new = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        found |= {
            f"{old}.linear1": (*(f"{new}.attn.{name}" for name in QKV), f"{new}.proj_mlp"),
            f"{old}.linear2": (f"{new}.proj_out",),
            f"{old}.modulation.lin": (f"{new}.norm.linear",),
        }
    return found


def _sd3(config: MMDiTConfig) -> dict[str, tuple[str, ...]]:
    table = {"x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder"}
    table["final_layer.linear"] = "proj_out"
    for old, new in (("t_embedder", "timestep"), ("y_embedder", "text")):
        table |= {f"{old}.{a}": f"time_text_embed.{new}_embedder.{b}" for a, b in SD3_EMBEDDERS.items()}
    found = {old: (new,) for old, new in table.items()}
    for i in range(config.num_layers):
        last = i == config.num_layers - 1
        old, new = f"joint_blocks.{i}", f"transformer_blocks.{i}"
        for side, qkv, out, ff, norm in (
            ("x_block", QKV, "to_out.0", "ff", "norm1"),
            ("context_block", ADDED_QKV, "to_add_out", "ff_context", "norm1_context"),
        ):
            found[f"{old}.{side}.attn.qkv"] = tuple(f"{new}.attn.{name}" for name in qkv)
            if last and side == "context_block":
                continue
            found |= {
                f"{old}.{side}.attn.proj": (f"{new}.attn.{out}",),
                f"{old}.{side}.mlp.fc1": (f"{new}.{ff}.net.0.proj",),
                f"{old}.{side}.mlp.fc2": (f"{new}.{ff}.net.2",),
                f"{old}.{side}.adaLN_modulation.1": (f"{new}.{norm}.linear",),
            }
        if i in config.dual_attention_layers:
            found[f"{old}.x_block.attn2.qkv"] = tuple(f"{new}.attn2.{name}" for name in QKV)
            found[f"{old}.x_block.attn2.proj"] = (f"{new}.attn2.to_out.0",)
    return found
