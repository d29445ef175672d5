"""The command line: ``program.py`` is the entry point, and the commands lie by what they are for."""

# In the order in which --help lists their commands.
from . import learning, predicting, looking  # noqa: F401, I001
from .program import app, main

__all__ = ["app", "main"]
