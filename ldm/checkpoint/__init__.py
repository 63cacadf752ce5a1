"""Models on disk: loaded, checked and saved as diffusers folders."""

from ldm.checkpoint.default import default_folder, shipped
from ldm.checkpoint.model import Model, check_model, clear_cache, load_model
from ldm.checkpoint.save import save_model

__all__ = ["Model", "check_model", "clear_cache", "default_folder", "load_model", "save_model", "shipped"]
