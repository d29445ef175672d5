"""The path, the solver, the priors, and what a sample depends on."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stflow_fast import ops, sampling, use_backend
from stflow_fast.arrays import as_array, as_tensor
from stflow_fast.config import DenoiserConfig, parse_bytes
from stflow_fast.errors import InputError
from stflow_fast.flow import CondOTPath, EulerSolver, time_grid
from stflow_fast.graph import knn_graph
from stflow_fast.model import Denoiser, EncoderState
from stflow_fast.pretrained import Provenance
from stflow_fast.priors import PRIORS, Prior, slide_seed, sources
from stflow_fast.sampling import PreparedSlide, Sampler, sample
from stflow_fast.slides import Slide
from stflow_fast.slides.rows import stored_rows

from .cuda_stand_in import StandIn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def model(n_genes: int = 5) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(DenoiserConfig(n_genes=n_genes, feature_dim=6, hidden_dim=16, pairwise_hidden_dim=16, n_layers=2))


def slide(n: int = 40, name: str = "a") -> Slide:
    rng = np.random.default_rng(n)
    features = rng.normal(size=(n, 6)).astype(np.float32)
    return Slide(name, features, rng.uniform(size=(n, 2)) * 1000, np.arange(n).astype(str))


def test_a_step_keeps_the_type_of_x_t_where_a_network_under_autocast_returns_another() -> None:
    x_t, x_1 = torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bfloat16)
    stepped = CondOTPath.step(x_t, x_1, 0.0, 0.25)
    assert stepped.dtype == torch.float32
    assert torch.equal(stepped, torch.full((3, 2), 0.25))


def test_a_step_stays_on_the_path() -> None:
    x_0, x_1 = torch.rand(2, 4, 3).double()

    def at(t: float) -> torch.Tensor:
        return CondOTPath.sample(x_0, x_1, torch.tensor(t, dtype=torch.float64))

    for t, after in ((0.0, 0.1), (0.3, 0.9), (0.9, 1.0)):
        torch.testing.assert_close(CondOTPath.step(at(t), x_1, t, after), at(after))


@pytest.mark.parametrize("n_sample_steps", [2, 5, 20])
def test_a_perfect_prediction_is_reached_from_anywhere_along_a_straight_line(n_sample_steps: int) -> None:
    x_0, x_1 = torch.rand(2, 4, 3).double()
    solver = EulerSolver(time_grid(n_sample_steps))
    visited = []

    def predict(x_t: torch.Tensor, t: float) -> torch.Tensor:
        visited.append((t, x_t))
        return x_1

    assert torch.equal(solver.solve(predict, x_0), x_1)
    assert len(visited) == solver.nfe == n_sample_steps - 1
    assert visited[0][0] == pytest.approx(0.01)
    for t, x_t in visited:
        along = (t - 0.01) / 0.99
        torch.testing.assert_close(x_t, x_0 + along * (x_1 - x_0))


@pytest.mark.parametrize("n_genes", [5, 40])
def test_a_precision_is_an_autocast_of_the_samplers_own(n_genes: int) -> None:
    network, spots = model(n_genes).float().eval(), slide()
    exact = sample(network, spots).expression
    with torch.autocast("cpu", torch.bfloat16):
        expected = sample(network, spots).expression
        assert torch.equal(sample(network, spots, precision="float32").expression, exact)
    prepared = Sampler(network, precision="bf16").prepare(spots)
    found = prepared.draw().expression
    assert torch.equal(found, expected)
    assert found.dtype == prepared.draw(trajectory=True).expression.dtype == torch.float32
    assert prepared.denoise(torch.zeros(len(found), n_genes), 0.5).dtype == torch.float32
    assert 0 < (found - exact).norm() / exact.norm() < 0.05
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("n", [1, 30, 1024, 2500])
@pytest.mark.parametrize(("n_genes", "non_negative"), [(5, False), (40, False), (40, True)])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_sample_by_blocks_is_the_sample(
    n: int, n_genes: int, non_negative: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, in whatever thread it is read, in blocks of one piece of rows; also when the slide is gone."""
    monkeypatch.setattr(sampling, "EXPRESSION_BYTES", 1)
    monkeypatch.setattr(sources, "PIECE", 1000)
    config = dataclasses.replace(model(n_genes).config, non_negative=non_negative)
    prepared = Sampler(Denoiser(config), precision=precision).prepare(slide(n))
    expected = prepared.draw(seed=3).expression
    drawn, slide_graph = prepared.draw_blocks(seed=3), weakref.ref(prepared.graph)
    del prepared
    assert slide_graph() is None
    found = torch.full(drawn.shape, torch.nan)

    def read() -> None:
        for rows, part in drawn.blocks():
            assert rows.start % 1024 == 0
            found[rows] = part

    reader = threading.Thread(target=read)
    reader.start()
    reader.join()
    assert torch.equal(found, expected)
    assert drawn.nfe == 4


@pytest.mark.parametrize(("n_genes", "non_negative"), [(5, False), (40, False), (40, True)])
@pytest.mark.parametrize("n", [1, 3, 300])
def test_a_share_of_the_neighbours_is_mixed_in(n: int, n_genes: int, non_negative: bool) -> None:
    config = dataclasses.replace(model(n_genes).config, non_negative=non_negative)
    network, places = Denoiser(config), slide(n)
    plain = Sampler(network).prepare(places)
    sharp = plain.draw(seed=3).expression
    expected, near = sharp.clone(), knn_graph(places.coords, config.n_neighbors)
    for spot, row in enumerate(near):
        row = row[row >= 0]
        if len(row):
            expected[spot] = 0.75 * sharp[spot] + 0.25 * sharp[row].mean(dim=0)
    prepared = Sampler(network, smooth=0.25).prepare(places)
    torch.testing.assert_close(prepared.draw(seed=3).expression, expected)
    torch.testing.assert_close(prepared.draw_blocks(seed=3).expression, expected)
    source = torch.zeros(n, n_genes, dtype=sharp.dtype)
    assert torch.equal(prepared.denoise(source, 0.5), plain.denoise(source, 0.5))
    assert torch.equal(Sampler(network, smooth=0.0).prepare(places).draw(seed=3).expression, sharp)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_between_none_and_all(share: float) -> None:
    with pytest.raises(InputError, match="smooth: must be a share from 0 to 1"):
        Sampler(model(5), smooth=share)


def test_memory_of_a_sample_by_blocks_does_not_depend_on_the_genes() -> None:
    """No tensor of the draw has more numbers than a block, or than what the network makes of the spots."""
    n, n_genes = 5000, 4000
    prepared = Sampler(model(n_genes).float()).prepare(slide(n))
    with torch.profiler.profile(record_shapes=True) as profile:
        for _ in prepared.draw_blocks().blocks():
            pass
    largest = max(int(np.prod(shape)) for event in profile.events() for shape in event.input_shapes if shape)
    assert largest <= sampling.EXPRESSION_BYTES // 4 < n * n_genes


def test_tf32_lasts_until_the_last_thread_that_wants_it_has_left() -> None:
    matmul = torch.backends.cuda.matmul
    before, inside = matmul.fp32_precision, threading.Barrier(2, timeout=30)

    def other() -> None:
        with sampling._TF32:
            inside.wait()  # both are
            inside.wait()  # the first has left
            inside.wait()

    thread = threading.Thread(target=other)
    thread.start()
    with sampling._TF32:
        inside.wait()
    assert matmul.fp32_precision == "tf32"
    inside.wait()
    inside.wait()
    thread.join()
    assert matmul.fp32_precision == before


def test_a_precision_that_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="precision: must be float32 or tf32 or bf16, not 'half'"):
        Sampler(model(), precision="half")
    with pytest.raises(InputError, match=r"precision: bf16 is of a float32 model, not one of torch.float64"):
        Sampler(model().double(), precision="bf16")
    with pytest.raises(InputError, match=r"^precision: tf32 is of NVIDIA GPUs, and the model is on the cpu$"):
        Sampler(model(), precision="tf32")


@pytest.mark.parametrize("n_genes", [5, 40])
def test_a_sample_is_the_published_loop(n_genes: int) -> None:
    """Also with more genes than the gene heads read, where the loop is of gene terms and not of genes."""
    network, spots = model(n_genes).double().eval(), slide()
    features, coords = torch.from_numpy(spots.features), torch.from_numpy(spots.coords)
    x_t = torch.rand(len(coords), n_genes, generator=torch.Generator().manual_seed(1)).double()
    prepared = Sampler(network, 4).prepare(spots)
    assert (prepared.states.heads is not None) == (n_genes == 40)
    found, followed = prepared.draw(x_t), prepared.draw(x_t, trajectory=True)
    grid, predictions = time_grid(4), []
    for t, after in itertools.pairwise(grid):
        times = torch.tensor([t]).double()
        with torch.no_grad():
            x_1 = network.inference(x_t[None], features.double()[None], coords[None], times)[0]
        torch.testing.assert_close(prepared.denoise(x_t, t), x_1, rtol=1e-10, atol=1e-12)
        x_t = x_t + (after - t) * (x_1 - x_t) / (1 - t)
        predictions.append(x_1)
    torch.testing.assert_close(found.expression, predictions[-1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(followed.expression, predictions[-1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(followed.trajectory, torch.stack(predictions), rtol=1e-10, atol=1e-12)


def test_one_call_between_the_times_of_the_grid() -> None:
    network = model().eval()
    prepared, x_t = Sampler(network).prepare(slide()), torch.rand(40, 5)
    with torch.no_grad():
        rows = network.denoise(
            prepared.graph, prepared.graph.to_rows(x_t), prepared.image, torch.tensor([0.3]).double()
        )
    assert torch.equal(prepared.denoise(x_t, 0.3), prepared.graph.to_spots(rows))
    with pytest.raises(InputError, match=r"slide a: x_t: must have shape \[40, 5\], not \[39, 5\]"):
        prepared.denoise(x_t[1:], 0.3)
    with pytest.raises(InputError, match=r"t: must be in \[0, 1\], not 1.5"):
        prepared.denoise(x_t, 1.5)


def test_the_solution_may_leave_the_coordinates_that_it_was_solved_in() -> None:
    solver = EulerSolver(time_grid(4))
    x_0 = torch.rand(3, 2).double()

    def predict(x_t: torch.Tensor, t: float) -> torch.Tensor:
        return x_t.square() + t

    def doubled(x_t: torch.Tensor, t: float) -> torch.Tensor:
        return 2 * predict(x_t, t)

    assert torch.equal(solver.solve(predict, x_0, last=doubled), 2 * solver.solve(predict, x_0))


def test_a_grid_needs_two_times() -> None:
    with pytest.raises(InputError, match="n_sample_steps: must be at least 2"):
        time_grid(1)


def test_zinb_has_the_published_distribution() -> None:
    """theta 1 and logits 0.1 make a geometric distribution of mean e^0.1; half of the draws are excess zeros."""
    counts = np.expm1(Prior("zinb").draw(2000, 500, np.random.SeedSequence(0)))
    mean, n = np.exp(0.1), counts.size
    stop = 1 / (1 + mean)
    expected = [0.5 + 0.5 * stop, 0.5 * stop * (1 - stop), 0.5 * stop * (1 - stop) ** 2]
    for value, probability in enumerate(expected):
        share = np.isclose(counts, value, atol=1e-3).mean()
        assert abs(share - probability) < 5 * np.sqrt(probability * (1 - probability) / n)
    assert abs(counts.mean() - mean / 2) < 0.01


def test_the_other_priors() -> None:
    assert not Prior("zero").draw(10, 3, np.random.SeedSequence(0)).any()
    drawn = Prior("gaussian").draw(2000, 500, np.random.SeedSequence(0))
    assert abs(drawn.mean()) < 0.005
    assert abs(drawn.std() - 1) < 0.005


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"name": "normal"}, "prior"), ({"total_count": 0.0}, "total_count"), ({"logits": float("nan")}, "logits")],
)
def test_impossible_priors_are_refused(settings: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=f"{field}: must be"):
        Prior(**settings)


@pytest.mark.parametrize("name", PRIORS)
def test_noise_of_a_spot_does_not_depend_on_the_spots_behind_it(name: str) -> None:
    seed = slide_seed(0, "a")
    assert np.array_equal(
        Prior(name, total_count=2.5).draw(5, 7, seed), Prior(name, total_count=2.5).draw(9, 7, seed)[:5]
    )


@pytest.mark.parametrize("chunks", [None, (1, 6), (300, 4), (2500, 6)])
@pytest.mark.parametrize("threads", [1, 2])
def test_features_on_a_disk_give_the_same_bits(tmp_path: Path, chunks: tuple[int, int] | None, threads: int) -> None:
    """More spots than a block, read by pieces of whole chunks, however large those are."""
    in_memory, path = slide(2500), tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        stored = file.create_dataset("f", data=in_memory.features, chunks=chunks, compression=chunks and "gzip")
        rows = stored_rows(path, "f", stored)
    on_disk = dataclasses.replace(in_memory, features=rows)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, expected = (sample(model(), each, seed=3).expression for each in (on_disk, in_memory))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected)
    as_arrays = (sample(model(), (features, in_memory.coords)).expression for features in (rows, in_memory.features))
    assert torch.equal(*as_arrays)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_features_on_a_disk_are_counted(tmp_path: Path, value: float) -> None:
    path, features = tmp_path / "a.h5", slide(2500).features.copy()
    features[[3, 1030, 2499], [0, 5, 2]] = value
    with h5py.File(path, "w") as file:
        rows = stored_rows(path, "f", file.create_dataset("f", data=features))
    on_disk = dataclasses.replace(slide(2500), features=rows)
    with pytest.raises(InputError, match=r"^slide a: features: 3 of 2500 spots are NaN or infinite; remove them"):
        sample(model(), on_disk)
    with pytest.raises(InputError, match=r"^slide a: features: must have shape \[N, 6\], not \[2500, 5\]; use embedd"):
        sample(model(), dataclasses.replace(on_disk, features=dataclasses.replace(rows, columns=5)))
    with pytest.raises(InputError, match=r"^slide a: has no patch features; give a file of them too \(--embeddings\)"):
        sample(model(), dataclasses.replace(on_disk, features=None))


def test_a_sample_is_drawn_as_the_model_was_trained() -> None:
    denoiser = model()
    settings = {"n_sample_steps": 4, "prior": "zinb", "prior_total_count": 3.0, "prior_logits": -1.0}
    trained = Denoiser(denoiser.config, Provenance(training={"training": settings}))
    trained.load_state_dict(denoiser.state_dict())
    found = sample(trained, slide())
    expected = sample(denoiser, slide(), n_sample_steps=4, prior=Prior("zinb", 3.0, -1.0))
    assert torch.equal(found.expression, expected.expression)
    assert found.nfe == 3
    assert torch.equal(sample(trained, slide(), prior="zinb").expression, expected.expression)
    assert not torch.equal(sample(trained, slide(), prior="zero").expression, expected.expression)
    assert sample(denoiser, slide(), n_sample_steps=np.int64(5), seed=np.int64(0)).nfe == 4


def test_noise_belongs_to_seed_and_slide() -> None:
    def draw(seed: int, name: str) -> np.ndarray:
        return Prior().draw(30, 4, slide_seed(seed, name))

    assert np.array_equal(draw(0, "a"), draw(0, "a"))
    assert not np.array_equal(draw(0, "a"), draw(1, "a"))
    assert not np.array_equal(draw(0, "a"), draw(0, "b"))


def test_a_sample_is_a_function_of_the_seed_and_leaves_the_model_alone() -> None:
    denoiser = model().train()
    torch.manual_seed(1)
    first = sample(denoiser, slide(), seed=3)
    torch.manual_seed(2)
    assert torch.equal(sample(denoiser, slide(), seed=3).expression, first.expression)
    assert not torch.equal(sample(denoiser, slide(), seed=4).expression, first.expression)
    assert denoiser.training
    assert first.nfe == 4
    assert first.trajectory is None


def test_the_trajectory_ends_in_the_sample() -> None:
    drawn = sample(model(), slide(), n_sample_steps=4, trajectory=True)
    assert drawn.trajectory.shape == (3, 40, 5)
    assert torch.equal(drawn.trajectory[-1], drawn.expression)


@pytest.mark.parametrize("budget", [0, "20kB", "1GiB"])
def test_memory_does_not_change_the_result(budget: int | str) -> None:
    whole = sample(model(), slide(200), memory_budget="4GiB").expression
    torch.testing.assert_close(
        sample(model(), slide(200), memory_budget=budget).expression, whole, rtol=1e-5, atol=1e-5
    )


def test_the_default_budget_holds_the_messages_of_the_largest_public_slide():
    network = Denoiser(DenoiserConfig(n_genes=50, feature_dim=8))
    layers = Sampler(network).states.layers
    needed = sum(ops.message_bytes(605_471, network.config.n_neighbors, layer.attention.edges) for layer in layers)
    assert Sampler(network).memory_budget >= needed


def test_a_slide_and_its_tensors_give_the_same() -> None:
    one = slide(name="")
    tensors = torch.from_numpy(one.features), torch.from_numpy(one.coords)
    assert torch.equal(sample(model(), one).expression, sample(model(), tensors).expression)


def test_samples_follow_the_order_of_the_spots() -> None:
    one, order = slide(), np.random.default_rng(0).permutation(40)
    x_0 = torch.rand(40, 5)
    plain = sample(model(), one, x_0=x_0).expression
    permuted = sample(model(), one.subset(order), x_0=x_0[order]).expression
    torch.testing.assert_close(permuted, plain[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [0, 1, 2, 8, 9])
def test_small_slides(n: int) -> None:
    drawn = sample(model(), (torch.rand(n, 6), torch.rand(n, 2))).expression
    assert drawn.shape == (n, 5)
    assert drawn.isfinite().all()


@pytest.mark.parametrize(
    ("features", "coords", "complaint"),
    [
        (torch.rand(4, 7), torch.rand(4, 2), r"features: must have shape \[N, 6\], not \[4, 7\]; use embeddings"),
        (torch.rand(4, 6), torch.rand(3, 2), r"coords: must have shape \[4, 2\]"),
        (torch.tensor([[0.0] * 6, [float("nan")] * 6]), torch.rand(2, 2), "features: 1 of 2 spots are NaN"),
        (torch.rand(2, 6), torch.tensor([[0.0, float("inf")], [0, 0]]), "coords: 1 of 2 spots are NaN"),
    ],
)
def test_bad_inputs_are_named(features: torch.Tensor, coords: torch.Tensor, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        sample(model(), (features, coords))


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parse_bytes(text) for text in (7, "7", "4GiB", "500 MB", "1.5k")] == [7, 7, 2**32, 5 * 10**8, 1500]
    with pytest.raises(InputError, match="memory_budget: must be a size"):
        parse_bytes("much")


def test_a_prepared_slide_draws_as_sample_does() -> None:
    network, drawn = model(), slide(30)
    prepared = Sampler(network, n_sample_steps=3).prepare(drawn)
    for seed in (0, 1):
        expected = sample(network, drawn, n_sample_steps=3, seed=seed).expression
        torch.testing.assert_close(prepared.draw(seed=seed).expression, expected, rtol=0, atol=0)


class CastsOf(TorchDispatchMode):
    """Counts the casts of some tensors, and of what shares their memory."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.aten._to_copy.default:
            self.count += args[0].untyped_storage().data_ptr() in self._memory
        return function(*args, **(kwargs or {}))


overflows = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # a sigmoid of -90 is 0


@overflows
@pytest.mark.parametrize("n_genes", [5, 40])
def test_weights_are_cast_once_for_all_steps_and_draws_under_an_autocast(n_genes: int) -> None:
    pytest.importorskip("triton")
    counts = {}
    for n_sample_steps in (3, 5):
        sampler = Sampler(model(n_genes).to(DEVICE), n_sample_steps, cuda_graph=False)
        prepared = sampler.prepare(slide(10))
        folded = [leaf for leaf in tree_leaves(sampler.states) if isinstance(leaf, torch.Tensor)]
        casts = counts[n_sample_steps] = []
        for _ in range(2):
            with use_backend("triton"), torch.autocast(DEVICE, torch.bfloat16):
                with CastsOf([*folded, *sampler.model.parameters()]) as cast:
                    prepared.draw()
                casts.append(cast.count)
    assert counts[3] == counts[5]
    assert counts[3][0] > counts[3][1] == 0


@overflows
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("n_genes", [5, 40])
def test_weights_cast_before_give_the_bits_of_weights_cast_in_every_call(
    monkeypatch: pytest.MonkeyPatch, backend: str, n_genes: int
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    network, drawn = model(n_genes).to(DEVICE), slide(10)
    for budget in (0, "1GiB"):
        with use_backend(backend), torch.autocast(DEVICE, torch.bfloat16), monkeypatch.context() as patch:
            found = sample(network, drawn, memory_budget=budget).expression
            patch.setattr(EncoderState, "of_autocast", lambda states: states)
            assert torch.equal(found, sample(network, drawn, memory_budget=budget).expression)


def test_autocast_leaves_a_model_in_float64_alone() -> None:
    network, drawn = model().double(), slide(10)
    expected = sample(network, drawn, memory_budget=0).expression
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sample(network, drawn, memory_budget=0).expression, expected)


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_a_prepared_slide_gives_its_memory_back_at_once() -> None:
    prepared = Sampler(model()).prepare(slide(30))
    prepared.draw()
    prepared.draw(trajectory=True)
    gone = weakref.ref(prepared.image)
    with without_garbage_collection():
        del prepared
        assert gone() is None


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(monkeypatch)


@pytest.fixture
def sampler(cuda: StandIn) -> Sampler:
    """On the CPU, with a stream as if it were on a GPU."""
    sampler = Sampler(model(), n_sample_steps=4)
    assert sampler.stream is None
    sampler.stream = torch.cuda.Stream()
    return sampler


@pytest.fixture
def plain(sampler: Sampler) -> PreparedSlide:
    return Sampler(sampler.model, n_sample_steps=4).prepare(slide())


def test_the_first_draw_runs_the_second_is_captured_and_all_behind_are_replayed(
    cuda: StandIn, sampler: Sampler, plain: PreparedSlide
) -> None:
    prepared, counts = sampler.prepare(slide()), []
    for seed in range(4):
        found = prepared.draw(seed=seed)
        counts.append((len(cuda.graphs), cuda.replays))
        assert torch.equal(found.expression, plain.draw(seed=seed).expression)
        assert found.nfe == 3
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 3)]


def test_what_is_captured_ran_on_the_same_stream_before(cuda: StandIn, sampler: Sampler) -> None:
    prepared, current = sampler.prepare(slide()), torch.cuda.current_stream()
    prepared.draw()
    assert cuda.streams == [sampler.stream]
    assert sampler.stream.waited_for == [current]
    assert current.waited_for == [sampler.stream]
    prepared.draw()
    assert cuda.streams == [sampler.stream] * 2
    assert not cuda.workspaces  # they are the graph's, and nobody else may use them


def test_a_sample_outlives_later_replays(sampler: Sampler, plain: PreparedSlide) -> None:
    prepared = sampler.prepare(slide())
    draws = [prepared.draw(seed=seed).expression for seed in range(4)]
    for seed, draw in enumerate(draws):
        assert torch.equal(draw, plain.draw(seed=seed).expression)


def test_a_trajectory_is_no_replay_and_no_run_before_a_capture(
    cuda: StandIn, sampler: Sampler, plain: PreparedSlide
) -> None:
    prepared = sampler.prepare(slide())
    for seed, replays in enumerate((0, 0, 1, 2)):
        found = prepared.draw(seed=seed, trajectory=True)
        assert torch.equal(found.expression, plain.draw(seed=seed).expression)
        assert torch.equal(found.trajectory[-1], found.expression)
        assert cuda.replays == replays
        prepared.draw()


def test_a_slide_without_spots_is_not_captured(cuda: StandIn, sampler: Sampler) -> None:
    prepared = sampler.prepare((torch.rand(0, 6), torch.rand(0, 2)))
    assert [prepared.draw().expression.shape for _ in range(3)] == [(0, 5)] * 3
    assert not cuda.streams


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "other", [lambda: use_backend("reference"), lambda: torch.autocast("cpu", torch.bfloat16), tf32]
)
def test_under_other_circumstances_it_starts_again(
    cuda: StandIn, sampler: Sampler, plain: PreparedSlide, other: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    prepared, counts = sampler.prepare(slide()), []
    for circumstances in (contextlib.nullcontext, other, contextlib.nullcontext):
        for seed in range(3):
            with circumstances():
                assert torch.equal(prepared.draw(seed=seed).expression, plain.draw(seed=seed).expression)
            counts.append((len(cuda.graphs), cuda.replays))
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 2), (2, 3), (2, 4), (2, 4), (3, 5), (3, 6)]


def test_a_failed_capture_is_forgotten_and_so_is_the_one_before(
    cuda: StandIn, sampler: Sampler, plain: PreparedSlide
) -> None:
    prepared, runs = sampler.prepare(slide()), []

    def draw(seed: int) -> None:
        before = len(cuda.graphs), cuda.replays
        assert torch.equal(prepared.draw(seed=seed).expression, plain.draw(seed=seed).expression)
        runs.append((len(cuda.graphs) - before[0], cuda.replays - before[1]))

    draw(0)
    draw(1)
    with use_backend("reference"):
        draw(2)
        cuda.fails = True
        with pytest.raises(torch.OutOfMemoryError):
            prepared.draw()
        cuda.fails = False
        draw(3)
        draw(4)
        draw(5)
    run, capture, replay = (0, 0), (1, 1), (0, 1)
    assert runs == [run, capture, run, run, capture, replay]


def test_a_captured_slide_gives_its_memory_back_at_once(cuda: StandIn, sampler: Sampler) -> None:
    prepared = sampler.prepare(slide())
    prepared.draw()
    prepared.draw()
    gone = weakref.ref(prepared.image)
    with without_garbage_collection():
        cuda.graphs.clear()
        del prepared
        assert gone() is None


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_gpu_samples_as_the_cpu_does(monkeypatch: pytest.MonkeyPatch, cuda_graph: bool) -> None:
    """Features stream in from the host in several chunks; the graph is replayed for later draws."""
    monkeypatch.setattr("stflow_fast.sampling.FEATURE_CHUNK", 7)
    network, drawn = model(), slide(30)
    x_0 = torch.rand(30, network.config.n_genes, generator=torch.Generator().manual_seed(0))
    expected = sample(network, drawn, x_0=x_0).expression
    prepared = Sampler(network.cuda(), cuda_graph=cuda_graph).prepare(drawn)
    for _ in range(3):
        torch.testing.assert_close(prepared.draw(x_0).expression, expected, rtol=1e-4, atol=1e-5)
        prepared.draw(seed=1)
    trajectory = prepared.draw(x_0, trajectory=True).trajectory
    torch.testing.assert_close(trajectory[-1], expected, rtol=1e-4, atol=1e-5)


def last_corner(side: int, width: int) -> torch.Tensor:
    """Spots of a square of so many rows, those of its last rows and columns."""
    spot = torch.arange(side * side)
    return torch.minimum(spot // side, spot % side) >= side - width


def error_in_the_last_corner(network: Denoiser, side: int, patch: int, margin: int) -> float:
    """Of a large sample of a jittered square lattice, against plain torch on a patch around the corner: a layer carries
    a spot's influence less than 2.7 rows on, in each call, and behind that margin nothing is left of the border."""
    config, generator = network.config, torch.Generator().manual_seed(0)
    features = torch.randn(side * side, config.feature_dim, generator=generator)
    x_0 = torch.rand(side * side, config.n_genes, generator=generator)
    spot = torch.arange(side * side)
    coords = torch.stack([spot % side, spot // side], dim=1) + 0.8 * torch.rand(side * side, 2, generator=generator)
    drawn = sample(network, (features, coords), x_0=x_0, n_sample_steps=3).expression
    near = last_corner(side, patch)
    with use_backend("reference"):
        expected = sample(network, (features[near], coords[near]), x_0=x_0[near], n_sample_steps=3).expression
    corner = last_corner(patch, patch - margin)
    return ((drawn[near][corner] - expected[corner]).norm() / expected[corner].norm()).item()


def test_the_last_corner_of_a_slide_is_what_its_patch_alone_gives() -> None:
    network = model()
    assert error_in_the_last_corner(network, side=40, patch=20, margin=11) < 1e-6
    assert error_in_the_last_corner(network, side=40, patch=20, margin=0) > 1e-4  # a border is seen


@pytest.mark.gpu
def test_the_last_corner_of_a_million_spots_is_what_its_patch_alone_gives() -> None:
    torch.manual_seed(0)
    network = Denoiser(DenoiserConfig(n_genes=50, feature_dim=32)).cuda()
    assert error_in_the_last_corner(network, side=1000, patch=100, margin=22) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_a_gpus_sample_by_blocks_is_its_sample(precision: str) -> None:
    prepared = Sampler(model(40).float().cuda(), precision=precision).prepare(slide(3000))
    before, drawn = torch.backends.cuda.matmul.fp32_precision, prepared.draw_blocks(seed=3)
    found = torch.cat([part for _, part in drawn.blocks()])
    torch.testing.assert_close(found, prepared.draw(seed=3).expression, rtol=2**-8, atol=2**-8)
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.gpu
def test_arrays_on_a_gpu_stay_there() -> None:
    x = torch.rand(6, 4, device="cuda")
    for value in (x, x[None], x.clone().requires_grad_(), [*x], x.to(torch.uint32), x.bfloat16()):
        assert as_tensor("x", value, (6, 4)).is_cuda
    assert np.array_equal(as_array("x", x, (6, 4), np.float32), x.cpu().numpy())


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_draw_waits_for_the_gpu_once_at_its_end(cuda_graph: bool) -> None:
    """Neither the source nor the sample is copied from or to memory that is not pinned."""
    prepared = Sampler(model().cuda(), cuda_graph=cuda_graph).prepare(slide(30))
    expected = [prepared.draw(seed=0).expression for _ in range(2)][-1]
    torch.cuda.set_sync_debug_mode("error")  # lets an event or a stream be waited for
    try:
        found = prepared.draw(seed=0).expression
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.is_pinned()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_a_source_on_the_gpu_is_judged_without_another_wait() -> None:
    prepared = Sampler(model().cuda()).prepare(slide(30))
    x_0 = torch.rand(30, prepared.sampler.model.config.n_genes, device="cuda")
    expected = [prepared.draw(x_0).expression for _ in range(2)][-1]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = prepared.draw(x_0).expression
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    x_0[3, 1] = torch.nan
    with pytest.raises(InputError, match="x_0: has values that are NaN or infinite"):
        prepared.draw(x_0)


@pytest.mark.gpu
def test_a_replay_under_a_new_autocast_reads_no_freed_weights() -> None:
    """Each draw in an autocast of its own, another slide alive; then in float32, which is captured anew."""
    sampler = Sampler(model().cuda())
    other, prepared = (sampler.prepare(slide(n)) for n in (20, 30))
    x_0 = torch.rand(30, sampler.model.config.n_genes, generator=torch.Generator().manual_seed(0))
    draws = []
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            draws.append(prepared.draw(x_0).expression)
            other.draw()
        torch.cuda.empty_cache()
    torch.testing.assert_close(draws[2], draws[1], rtol=0, atol=0)
    torch.testing.assert_close(draws[1], draws[0], rtol=2**-6, atol=2**-6)  # the first is no replay
    exact = Sampler(sampler.model, cuda_graph=False).prepare(slide(30)).draw(x_0).expression
    for _ in range(3):
        torch.testing.assert_close(prepared.draw(x_0).expression, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_graph_outlives_those_of_other_slides() -> None:
    """All are captured on one stream, whose cuBLAS memory torch frees with any of them; here that is then filled."""
    sampler = Sampler(model().cuda())
    one, kept, another = (sampler.prepare(slide(n)) for n in (20, 30, 40))
    x_0 = torch.rand(30, sampler.model.config.n_genes, generator=torch.Generator().manual_seed(0))
    for each in (one, kept, another) * 2:
        each.draw()
    expected = kept.draw(x_0).expression
    del one, another, each
    torch.cuda.empty_cache()
    torch.full((2**28,), torch.nan, device="cuda")
    assert torch.equal(kept.draw(x_0).expression, expected)


def test_a_trajectory_ends_in_the_sample_smoothed_or_not() -> None:
    sampler = Sampler(model(), smooth=0.4)
    prepared, x_0 = sampler.prepare(slide(30)), torch.rand(30, sampler.model.config.n_genes)
    whole, drawn = prepared.draw(x_0, trajectory=True), prepared.draw(x_0)
    torch.testing.assert_close(whole.expression, drawn.expression, rtol=1e-5, atol=1e-6)
    plain = Sampler(sampler.model).prepare(slide(30)).draw(x_0).expression
    torch.testing.assert_close(whole.trajectory[-1], plain, rtol=1e-5, atol=1e-6)
    assert (whole.expression - plain).abs().max() > 1e-3


def test_a_source_is_judged_as_the_model_reads_it() -> None:
    prepared = Sampler(model()).prepare(slide(30))
    x_0 = torch.zeros(30, prepared.sampler.model.config.n_genes, dtype=torch.float64)
    x_0[2, 1] = 1e200
    with pytest.raises(InputError, match="x_0: has values that are NaN or infinite"):
        prepared.draw(x_0)
