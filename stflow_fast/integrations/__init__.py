"""The model as other programs want one, a module for each of them; none of them is imported."""
