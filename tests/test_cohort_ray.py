"""The workers of a Ray cluster do what those of this machine do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from stflow_fast.cohort import RunConfig, SamplingConfig, predict, predict_iter, read_lines
from stflow_fast.errors import InputError, SlidesFailed

from .builders import cut, gene_names, slide_file, write_model
from .cohort_cases import values

ray = pytest.importorskip("ray", reason="ray is not installed")

from stflow_fast.cohort.ray_engine import _join  # noqa: E402

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", gene_names()[3:11])


ON_RAY = RunConfig(engine="ray", workers=2)


def test_a_cluster_predicts_what_this_machine_does(cluster: None, model: Path, tmp_path: Path) -> None:
    """Byte for byte, with a broken slide, and one that kills the worker that reads it."""
    for name, n in (("S0", 60), ("S1", 9), ("S2", 130), ("S3", 1), ("S4", 61)):
        slide_file(tmp_path / "in", name, n=n)
    for given in ({}, {"resume": True}):
        predict(model, tmp_path / "in", tmp_path / "here", **given)
        assert len(predict(model, tmp_path / "in", tmp_path / "there", config=ON_RAY, **given)) == 5
    assert values(tmp_path / "there") == values(tmp_path / "here")
    cut(slide_file(tmp_path / "in", "broken"))
    with pytest.raises(SlidesFailed, match="broken.h5ad: is not readable HDF5") as raised:
        predict(model, tmp_path / "in", tmp_path / "there", config=ON_RAY, overwrite=True)
    assert (len(raised.value.failed), raised.value.n_written) == (1, 5)
    assert values(tmp_path / "there") == values(tmp_path / "here")


def test_a_worker_that_is_killed_in_mid_slide_is_replaced(cluster: None, model: Path, tmp_path: Path) -> None:
    for number in range(12):
        slide_file(tmp_path / "in", f"S{number}", n=400)
    predict(model, tmp_path / "in", tmp_path / "here")
    lines = predict_iter(model, tmp_path / "in", tmp_path / "there", config=ON_RAY)
    assert next(lines).is_done
    children = psutil.Process().children(recursive=True)
    actors = [each for each in children if "ray::_Actor" in str(each.cmdline())]
    os.kill(actors[0].pid, signal.SIGKILL)
    assert all(line.is_done for line in lines)
    assert values(tmp_path / "there") == values(tmp_path / "here")
    assert max(line.attempts for line in read_lines(tmp_path / "there").values()) > 1
    assert not list((tmp_path / "there").rglob("*.part*"))


def test_what_a_cluster_cannot_do_is_a_line(cluster: None, model: Path, tmp_path: Path) -> None:
    slide_file(tmp_path, "S0")
    with pytest.raises(InputError, match=r"^workers: the Ray cluster has 2 CPUs, 3 are wanted$"):
        predict(model, tmp_path, tmp_path / "out", config=RunConfig(engine="ray", workers=3))
    with pytest.raises(InputError, match=r"^workers: the Ray cluster has 0 GPUs, 1 are wanted$"):
        predict(model, tmp_path, tmp_path / "out", config=RunConfig(engine="ray"), device="cuda", overwrite=True)
    with pytest.raises(InputError, match=r"^precision: tf32 is of NVIDIA GPUs, and the model is on the cpu$"):
        predict(model, tmp_path, tmp_path / "new", config=ON_RAY, sampling=SamplingConfig(precision="tf32"))
    with pytest.raises(InputError, match=r"^address: no Ray cluster at 127.0.0.1:1 \(.*refused\); see ray status$"):
        _join("127.0.0.1:1")
