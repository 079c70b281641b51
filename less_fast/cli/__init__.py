"""The command `less-kv`: it parses, calls and prints. app: what all commands share; options; then the commands by what they do:
talking, measuring, making."""

from . import making, measuring, talking  # noqa: F401  their commands
from .app import app, main

__all__ = ["app", "main"]
