"""Peak memory of one sample above its inputs: ``python -m benchmarks.peak_memory 100000 on`` prints JSON."""

from __future__ import annotations

import json
import resource
import sys

from stflow_fast import sample
from stflow_fast.ops import COMPILED_BLOCK, use_compile

from .workload import SAMPLE_STEPS, network, slide


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(n_spots: int, mode: str) -> None:
    model = network()
    with use_compile(mode):
        # Code first, so that torch.compile's own memory is not counted; then the inputs; then what sampling adds.
        for small in (COMPILED_BLOCK, 2 * COMPILED_BLOCK):
            features, coords, noise = slide(small)
            sample(model, (features, coords), x_0=noise, n_sample_steps=SAMPLE_STEPS)
        features, coords, noise = slide(n_spots)
        before = peak_bytes()
        sample(model, (features, coords), x_0=noise, n_sample_steps=SAMPLE_STEPS)
    print(json.dumps({"peak_above_inputs": peak_bytes() - before, "peak_with_inputs": before}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
