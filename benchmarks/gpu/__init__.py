"""``make gpu``: every figure that matters from a GPU that is at hand for some minutes, whatever goes wrong."""

import time

BEGUN = time.monotonic()
"""Before anything else is imported, which takes some of the minutes."""
