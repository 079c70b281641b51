"""The seam with Hugging Face transformers: which models are served, how their attention reaches LESS, and the cache."""

from .cache import LessCache

__all__ = ["LessCache"]
