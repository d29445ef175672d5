"""The published algorithm written plainly, and other ways to write it, which exist to be compared with."""
