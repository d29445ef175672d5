"""``python -m stflow_fast``, which ``accelerate launch -m`` needs."""

from .cli import main

main()
