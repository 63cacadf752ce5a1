"""Single files: a whole model in one .safetensors under Stable Diffusion's original names, read and written."""

from ldm.checkpoint.single.flow_texts import listed_texts
from ldm.checkpoint.single.header import stored_settings
from ldm.checkpoint.single.plan import Plan, plan_of
from ldm.checkpoint.single.read import hash_of_files, read_single, read_vae, vae_facts, vae_shapes
from ldm.checkpoint.single.tokenizers import digests_of_given
from ldm.checkpoint.single.vae_sizes import vae_sizes
from ldm.checkpoint.single.write import SUFFIX, check_target, save_single

__all__ = [
    "SUFFIX",
    "Plan",
    "check_target",
    "digests_of_given",
    "hash_of_files",
    "listed_texts",
    "plan_of",
    "read_single",
    "read_vae",
]
__all__ += ["save_single", "stored_settings", "vae_facts", "vae_shapes", "vae_sizes"]
