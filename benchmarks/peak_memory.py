"""Peak memory of sampling one slide, above its inputs; a process of its own. Linux.

python -m benchmarks.peak_memory N_SPOTS off|on
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from stflow_fast import sample
from stflow_fast.ops import COMPILED_BLOCK, use_compile

from .workload import SAMPLE_STEPS, network, slide


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak). Not getrusage: its peak is inherited from the process that started us."""
    kilobytes = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)
    return int(kilobytes) * 1024


def main(n_spots: int, mode: str) -> None:
    model = network()
    with use_compile(mode):
        # Code first, so that torch.compile's own memory is not counted; then the inputs; then what sampling adds.
        for small in (COMPILED_BLOCK, 2 * COMPILED_BLOCK):
            features, coords, noise = slide(small)
            sample(model, (features, coords), x_0=noise, n_sample_steps=SAMPLE_STEPS)
        features, coords, noise = slide(n_spots)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident_bytes("VmRSS")
        sample(model, (features, coords), x_0=noise, n_sample_steps=SAMPLE_STEPS)
    print(json.dumps({"peak_above_inputs": resident_bytes("VmHWM") - before, "inputs_and_code": before}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
