"""``make gpu``: every figure that matters from a GPU that is at hand for some minutes, whatever goes wrong."""
