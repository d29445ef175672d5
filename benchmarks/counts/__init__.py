"""What is counted or compiled without a GPU. Nothing here is timed."""
