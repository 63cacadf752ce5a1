"""Prompts and a model in, images out. Public names are imported when they are first asked for."""

__all__ = ["Images", "Pipeline"]


def __getattr__(name: str) -> type:
    if name == "Pipeline":
        from ldm.pipeline.pipeline import Pipeline

        return Pipeline
    if name == "Images":
        from ldm.pipeline.result import Images

        return Images
    raise AttributeError(f"module 'ldm.pipeline' has no attribute {name!r}")
