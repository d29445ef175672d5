"""What calls of an encoder with the same coordinates share, and what makes them share it no longer."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stflow_fast import ops
from stflow_fast.config import DenoiserConfig
from stflow_fast.model import Denoiser, KnownSlides
from stflow_fast.model.calls import MOST_SLIDES

CONFIG = DenoiserConfig(n_genes=6, feature_dim=9, hidden_dim=16, pairwise_hidden_dim=8, n_layers=2, n_neighbors=4)


class Counts:
    """How often what calls share was made."""

    graphs = messages = 0

    def __eq__(self, other: object) -> bool:
        return (self.graphs, self.messages) == other

    def __repr__(self) -> str:
        return f"{self.graphs} graphs, messages of {self.messages} layers"

    __hash__ = None


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    counted, build, make = Counts(), ops.build_graph, ops.make_messages

    def building(*arguments: object) -> object:
        counted.graphs += 1
        return build(*arguments)

    def making(*arguments: object) -> object:
        counted.messages += 1
        return make(*arguments)

    monkeypatch.setattr(ops, "build_graph", building)
    monkeypatch.setattr(ops, "make_messages", making)
    return counted


def model() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(CONFIG).eval()


def arguments(n: int = 30, slides: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    return {
        "noisy_exp": rand(slides, n, 6),
        "img_features": rand(slides, n, 9),
        "coords": 100 * rand(slides, n, 2),
        "t_steps": rand(slides),
    }


@torch.no_grad()
def call(network: Denoiser, **inputs: Tensor) -> Tensor:
    return network.inference(**inputs)


def test_a_loop_makes_graph_and_messages_once(counts: Counts) -> None:
    network, inputs = model(), arguments()
    expected = [call(model(), **{**inputs, "t_steps": t.expand(2)}) for t in torch.linspace(0.01, 0.9, 4)]
    assert counts == (4, 8)
    for t, one in zip(torch.linspace(0.01, 0.9, 4), expected, strict=True):
        # Equal values in another tensor, as a loop that moves its batch to a device has them.
        given = {**inputs, "coords": inputs["coords"].clone(), "t_steps": t.expand(2)}
        torch.testing.assert_close(call(network, **given), one)
    assert counts == (5, 10)


def shifted_in_place(network: Denoiser, inputs: dict[str, Tensor]) -> None:
    inputs["coords"][0, 3] += 40


def another_padding(network: Denoiser, inputs: dict[str, Tensor]) -> None:
    inputs["padding"] = torch.zeros(2, 30, dtype=torch.bool)
    inputs["padding"][1, 20:] = True


def in_double(network: Denoiser, inputs: dict[str, Tensor]) -> None:
    network.double()
    inputs.update({name: value.double() for name, value in inputs.items()})


@pytest.mark.parametrize("change", [shifted_in_place, another_padding, in_double])
def test_another_slide_is_seen(change: Callable[[Denoiser, dict[str, Tensor]], None], counts: Counts) -> None:
    network, inputs = model(), arguments()
    call(network, **inputs)
    change(network, inputs)
    fresh = model().to(inputs["coords"].dtype)
    assert torch.equal(call(network, **inputs), call(fresh, **inputs))
    assert counts.graphs == 3


def behind_the_version_counter(network: Denoiser) -> None:
    for parameter in network.parameters():
        parameter.data.mul_(1.1)


def by_an_optimiser(network: Denoiser) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network.inference(**arguments()).square().sum().backward()
    optimizer.step()


def by_loading(network: Denoiser) -> None:
    torch.manual_seed(5)
    network.load_state_dict(Denoiser(CONFIG).state_dict())


@pytest.mark.parametrize("change", [behind_the_version_counter, by_an_optimiser, by_loading])
def test_other_weights_are_seen(change: Callable[[Denoiser], None], counts: Counts) -> None:
    network, inputs = model(), arguments()
    call(network, **inputs)
    change(network)
    fresh = model()
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(call(network, **inputs), call(fresh, **inputs))
    assert counts == (2, 6)  # the graph is the same


def test_messages_are_of_one_precision(counts: Counts) -> None:
    network, inputs = model(), arguments()
    call(network, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = call(network, **inputs)
        assert torch.equal(under_autocast, call(model(), **inputs))
    assert torch.equal(call(network, **inputs), call(model(), **inputs))


def test_messages_are_for_evaluation_without_gradients_alone(counts: Counts) -> None:
    network, inputs = model(), arguments()
    call(network, **inputs)
    network.train()
    torch.manual_seed(1)
    first = call(network, **inputs)
    assert not torch.equal(first, call(network, **inputs))  # dropout inside the messages too
    network.eval()
    gradient = torch.autograd.grad(
        network.inference(**inputs).sum(), network.backbone.blks[0].attn.edge_trans.fc1.weight
    )
    assert gradient[0].abs().sum() > 0
    assert counts == (1, 2)


def test_training_may_follow_inference_mode() -> None:
    network, inputs = model(), arguments()
    with torch.inference_mode():
        network.inference(**inputs)
    network.train()
    network.inference(**inputs).sum().backward()
    assert network.image_transform.weight.grad.abs().sum() > 0


def test_slides_in_turn_are_all_known_and_no_more_than_some(counts: Counts) -> None:
    network = model()
    few = [arguments(20 + n) for n in range(MOST_SLIDES)]
    for inputs in few * 2:
        call(network, **inputs)
    assert counts.graphs == MOST_SLIDES
    call(network, **arguments(50))
    assert len(network.backbone.known._slides) == MOST_SLIDES
    assert sum(slides.messages is not None for slides in network.backbone.known._slides) == 1


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_messages_are_kept_within_the_budget(layers: int, counts: Counts) -> None:
    network, inputs = model(), arguments()
    whole = call(network, **inputs)
    (known,) = network.backbone.known._slides
    one_layer = known.messages.tensors[0].nbytes
    budget = known.bytes() - (2 - layers) * one_layer
    network.backbone.known = KnownSlides(budget)
    for _ in range(2):
        torch.testing.assert_close(call(network, **inputs), whole)
    (known,) = network.backbone.known._slides
    assert sum(messages is not None for messages in known.messages.tensors) == layers
    assert known.bytes() <= budget


def test_graphs_are_kept_within_the_budget() -> None:
    network, sizes = model(), []
    for n in (20, 30, 40):
        call(network, **arguments(n))
        network.backbone.known._slides[0].messages = None
        sizes.append(network.backbone.known._slides[0].bytes())
    network.backbone.known = KnownSlides(sizes[1] + sizes[2])
    for n in (20, 30, 40):
        call(network, **arguments(n))
    assert [len(slides.graph.order) for slides in network.backbone.known._slides] == [80, 60]


def test_copies_and_files_hold_nothing_of_it() -> None:
    network = model()
    call(network, **arguments())
    assert list(network.state_dict()) == list(model().state_dict())
    assert not copy.deepcopy(network).backbone.known._slides
    file = io.BytesIO()
    torch.save(network, file)
    assert len(file.getvalue()) < 2 * sum(value.nbytes for value in network.state_dict().values())
