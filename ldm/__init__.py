"""A small latent text-to-image diffusion stack: train from nothing, fine-tune, render."""

__version__ = "0.1.0"
