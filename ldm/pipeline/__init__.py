"""From prompts to pictures: `Pipeline("a cat").generate()`."""

from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.result import Images

__all__ = ["Images", "Pipeline"]
