"""Models on disk: loaded, checked and saved as diffusers folders."""

from ldm.checkpoint.folder import default_folder, shipped
from ldm.checkpoint.model import card_of, check_model, clear_cache, load_model, settings_of
from ldm.checkpoint.save import save_model
from ldm.checkpoint.types import Model

__all__ = [
    "Model",
    "card_of",
    "check_model",
    "clear_cache",
    "default_folder",
    "load_model",
    "save_model",
    "settings_of",
    "shipped",
]
