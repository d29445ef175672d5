"""The choice of what runs the operations, said once, and refusals that name what stands against it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stflow_fast.kernels import versions
from stflow_fast.kernels.conventions import Settings, Sizes

import stflow_fast
import stflow_fast.ops as ops
from stflow_fast.errors import InputError
from stflow_fast.ops import backend
from stflow_fast.ops.backend import EdgeWork, Workload, announce, backend_for

from .backend_cases import interpreted, large_tiles, nothing_is_asked_for, predict
from .test_model import inputs, small

__all__ = ["large_tiles", "nothing_is_asked_for"]  # fixtures

pytest.importorskip("triton")
edge_shape = pytest.importorskip("stflow_fast.kernels.edge_shape")
launch = pytest.importorskip("stflow_fast.kernels.launch")

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # a sigmoid of -90 is 0

CPU = torch.device("cpu")


def wide(hidden_dim: int, n_heads: int = 4, k: int = 8, training: bool = True) -> EdgeWork:
    """The attention of a network of this width."""
    sizes = Sizes(k, hidden_dim // 2, n_heads * hidden_dim, hidden_dim)
    kernels = ops.TRAINED_BY if training else ops.TRAINED_BY[:1]
    return EdgeWork(kernels, sizes, Settings(n_heads, "swiglu", "swiglu"))


def test_a_cpu_runs_plain_torch_though_kernels_could_be_interpreted() -> None:
    assert backend_for(Workload(CPU, n_spots=10)).name == "reference"
    assert backend_for(Workload(CPU, training=True)) == ("reference", "plain torch; the device is cpu")


@interpreted
def test_kernels_are_interpreted_when_asked_for() -> None:
    with ops.use_backend("triton"):
        assert backend_for(Workload(CPU)).name == "triton"


@interpreted
def test_the_environment_asks_for_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STFLOW_BACKEND", "triton")
    assert backend_for(Workload(CPU)).name == "triton"
    with ops.use_backend("reference"):
        assert backend_for(Workload(CPU, n_spots=10)).name == "reference"
    assert backend_for(Workload(CPU)).name == "triton"


def test_blocks_restore_what_was_chosen_before() -> None:
    def chosen() -> str:
        return backend._BACKEND()

    def fail_inside() -> None:
        with ops.use_backend("reference"):
            assert chosen() == "reference"
            raise ZeroDivisionError

    assert chosen() == "auto"
    with ops.use_backend("triton"):
        with pytest.raises(ZeroDivisionError):
            fail_inside()
        assert chosen() == "triton"
    assert chosen() == "auto"


@pytest.mark.parametrize(
    ("workload", "reason"),
    [
        (Workload(CPU, torch.float64), "its kernels do not compute in torch.float64"),
        (Workload(CPU, k=65), "its kernels take up to 64 neighbours, not 65"),
        (Workload(CPU, edges=wide(2050)), "its edge kernels take messages of up to 1024 columns, not 1025"),
        (Workload(torch.device("meta")), "the device is meta"),
    ],
)
@interpreted
def test_what_triton_cannot_run_is_refused_with_the_reason(
    workload: Workload, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if workload.device.type == "meta":
        monkeypatch.delenv("TRITON_INTERPRET")
    with ops.use_backend("triton"), pytest.raises(InputError, match=f"^STFLOW_BACKEND: is triton, but {reason}"):
        backend_for(workload)
    if workload.device.type == "cpu":
        with ops.use_backend("auto"):
            assert backend_for(workload._replace(n_spots=10)).name == "reference"


@interpreted
def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    model, (x, features, coords) = small().float(), inputs(8)
    with (
        ops.use_backend("triton"),
        pytest.raises(InputError, match="^STFLOW_BACKEND: is triton, but the device is cpu"),
    ):
        predict(model, x.float(), features.float(), coords)


@interpreted
def test_a_missing_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_triton_is_installed", lambda: False)
    with ops.use_backend("triton"), pytest.raises(InputError, match="^STFLOW_BACKEND: .*triton is not installed"):
        backend_for(Workload(CPU))
    assert backend_for(Workload(CPU, n_spots=10)).name == "reference"


@interpreted
@pytest.mark.parametrize("version", ["3.4.0", "3.4.0+git1234", "3.3", "2.99.1rc1"])
def test_a_triton_that_does_not_compile_the_kernels_is_refused(version: str, pretend: Callable[..., None]) -> None:
    pretend(triton=version)
    lacks = f"triton {version} is older than 3.5, from which on its kernels compile"
    for device in (CPU, torch.device("cuda", 0)):
        with ops.use_backend("triton"), pytest.raises(InputError) as refused:
            backend_for(Workload(device))
        assert str(refused.value) == f"STFLOW_BACKEND: is triton, but {lacks}; set it to auto or reference"
    assert backend_for(Workload(torch.device("cuda", 0))) == ("reference", f"plain torch; {lacks}")


@pytest.mark.parametrize("version", ["3.5", "3.5.0+git1234", "3.5.0rc1", "3.6.0", "3.10.1", "4.0", None, "unknown"])
def test_a_triton_of_another_version_is_not_refused(
    version: str | None, pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one whose version nobody wrote down, as in a build of one's own."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    pretend(triton=version)
    assert backend_for(Workload(torch.device("cuda", 0))).name == "triton"


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=4), st.sampled_from(["", "rc1", "a0", ".dev3", "+git12.3"]))
def test_the_numbers_of_a_version_are_read(numbers: list[int], rest: str) -> None:
    assert versions.release(".".join(map(str, numbers)) + rest) == tuple(numbers)


def test_what_setup_asks_for_is_what_is_looked_for() -> None:
    text = (Path(__file__).resolve().parents[1] / "setup.py").read_text()
    assert dict(re.findall(r'"(torch|triton)>=([\d.]+)', text)) == versions.OLDEST_VERSIONS


INTERPRETERS = [
    ("3.5.0", "2.4.0", False),
    ("3.6.0", "2.4.6", False),
    ("3.6.0", "2.10.0", False),
    ("3.6.0", "2.3.5", True),
    ("3.7.0", "2.4.6", True),
    ("3.7.1", "3.0", True),
    (None, "2.4.6", True),
]


@interpreted
@pytest.mark.parametrize(("triton", "numpy", "works"), INTERPRETERS)
def test_an_interpreter_that_fails_with_this_numpy_is_refused_with_the_mend(
    triton: str | None, numpy: str, works: bool, pretend: Callable[..., None]
) -> None:
    pretend(triton=triton, numpy=numpy)
    if works:
        assert launch.why_not_interpreted() is None
        with ops.use_backend("triton"):
            assert backend_for(Workload(CPU)).name == "triton"
        launch.check_device("x", torch.ones(1))
        return
    lacks = f"Triton {triton}'s interpreter fails with numpy {numpy}: install numpy<2.4 or triton>=3.7"
    assert launch.why_not_interpreted() == lacks
    with ops.use_backend("triton"), pytest.raises(InputError, match=f"^STFLOW_BACKEND: is triton, but {lacks}; set it"):
        backend_for(Workload(CPU))
    with pytest.raises(InputError, match=f"^TRITON_INTERPRET: is 1, but {lacks}$"):
        launch.check_device("x", torch.ones(1))
    assert backend_for(Workload(CPU)) == ("reference", "plain torch; the device is cpu")


@pytest.mark.parametrize(
    ("capability", "name"),
    [((7, 5), "reference"), ((8, 0), "triton"), ((8, 6), "triton"), ((9, 0), "triton"), ((10, 0), "triton")],
)
def test_a_gpu_runs_kernels_from_ampere_on(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert backend_for(Workload(gpu)).name == name
    assert backend_for(Workload(gpu, torch.float64)).name == "reference"
    assert backend_for(Workload(gpu, k=65)).name == "reference"
    if name == "reference":
        with ops.use_backend("triton"), pytest.raises(InputError, match="^STFLOW_BACKEND: .*older than Ampere"):
            backend_for(Workload(gpu))


@pytest.mark.parametrize(
    ("capability", "shared_kib", "dtype", "attention", "refused"),
    [
        ((8, 0), 163, torch.bfloat16, (1024, 4, 8), False),
        ((8, 0), 163, torch.float32, (512, 4, 8), False),
        ((8, 0), 163, torch.float32, (1024, 1, 8), True),
        ((8, 0), 163, torch.float32, (1024, 1, 8, False), False),
        ((8, 6), 99, torch.float32, (128, 4, 64), False),
        ((8, 6), 99, torch.float32, (256, 4, 8), False),
        ((8, 9), 99, torch.bfloat16, (1024, 4, 64), True),
        ((9, 0), 227, torch.float32, (1024, 4, 8), False),
        ((9, 0), 227, torch.float32, (1024, 4, 32), False),
        ((9, 0), 227, torch.float32, (1024, 2, 32), True),
    ],
)
def test_a_gpu_with_too_little_shared_memory_is_refused(
    capability: tuple[int, int],
    shared_kib: int,
    dtype: torch.dtype,
    attention: tuple[int, ...],
    refused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """How well it is estimated, `aot` tells: it fails where a kernel needs more."""
    monkeypatch.setattr(launch, "architecture", lambda device: 10 * capability[0] + capability[1])
    monkeypatch.setattr(edge_shape, "launch_of", launch.launch_of)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    properties = SimpleNamespace(shared_memory_per_block_optin=shared_kib << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = backend_for(Workload(torch.device("cuda", 0), dtype, k=attention[2], edges=wide(*attention)))
    assert found.name == ("reference" if refused else "triton"), found
    if refused:
        said = rf"for {attention[2]} neighbours .* need some \d+ KiB .* the GPU has {shared_kib}$"
        assert re.search(said, found.reason), found.reason


def test_a_gpu_that_is_not_nvidias_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert backend_for(Workload(torch.device("cuda", 0))) == ("reference", "plain torch; the GPU is not NVIDIA's")


@interpreted
def test_a_model_in_float64_is_refused_and_one_with_many_neighbours() -> None:
    x, features, coords = inputs(8)
    with ops.use_backend("triton"), torch.no_grad():
        with pytest.raises(InputError, match=r"^STFLOW_BACKEND: .*do not compute in torch\.float64"):
            predict(small(), x, features, coords)
        with pytest.raises(InputError, match="^STFLOW_BACKEND: .*up to 64 neighbours, not 65"):
            predict(small(n_neighbors=65).float(), x.float(), features.float(), coords)
        model = small(hidden_dim=16, pairwise_hidden_dim=2050, n_heads=2).float()
        with pytest.raises(InputError, match="^STFLOW_BACKEND: .*messages of up to 1024 columns, not 1025"):
            predict(model, x.float(), features.float(), coords)


@pytest.mark.parametrize("name", ["cuda", "Triton", ""])
def test_unknown_names_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    complaint = f"^STFLOW_BACKEND: must be auto, triton or reference, not '{name}'"
    with pytest.raises(InputError, match=complaint), stflow_fast.use_backend(name):
        pass
    monkeypatch.setenv("STFLOW_BACKEND", name)
    with pytest.raises(InputError, match=complaint):
        backend_for(Workload(CPU))


@interpreted
def test_the_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    announce.cache_clear()
    model, (x, features, coords) = small().float(), inputs(8)
    with caplog.at_level(logging.INFO, logger="stflow_fast"), torch.no_grad():
        for name in ("triton", "triton", "reference", "reference", "triton"):
            with ops.use_backend(name):
                predict(model, x.float(), features.float(), coords)
    said = [record.getMessage() for record in caplog.records if "edge attention by" in record.getMessage()]
    assert said == ["edge attention by triton: it was asked for", said[1]]
    assert said[1].startswith("edge attention by reference: ")
    assert {record.levelno for record in caplog.records if record.getMessage() in said} == {logging.INFO}
