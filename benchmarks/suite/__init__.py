"""The suite: cases, what runs them, the checks before and the measuring itself. It ends with lines of figures."""
