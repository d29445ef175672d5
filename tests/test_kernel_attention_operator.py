"""The edge kernels as operators of torch: what they promise, autocast, and arguments that are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stflow_fast.errors import InputError
from stflow_fast.graph import transpose_neighbors

from .kernel_cases import (
    DEVICE,
    GRADIENTS,
    Attention,
    AttentionInputs,
    assert_results_agree,
    assert_same_bits,
    attention_inputs,
    attention_reference,
    differentiate,
    kernel_arguments,
    poisoned_memory,
)

pytest.importorskip("triton")
kernels = pytest.importorskip("stflow_fast.kernels.edge_attention")
launch = pytest.importorskip("stflow_fast.kernels.launch")

if DEVICE == "cuda":
    pytest.skip("compiled kernels have other precisions: see test_kernel_gpu.py", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # a sigmoid of -90 is 0

nothing_unwritten_is_read = pytest.fixture(autouse=True, scope="module")(poisoned_memory)


def operator_arguments(inputs: AttentionInputs) -> tuple[object, ...]:
    arguments = kernel_arguments(inputs)
    return (
        *(arguments[name] for name in ("terms", "neighbors", "edges", "edge", "message_to_logit", "logit")),
        arguments["dropout_keys"],
        *transpose_neighbors(inputs.graph.neighbors),
        *arguments["settings"],
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_operator_is_registered_as_torch_wants_it(p: float) -> None:
    inputs = attention_inputs(Attention(sizes=(7,), k=3, e=12, z=5, dh=5, p_mlp=p, p_attention=p))
    torch.library.opcheck(torch.ops.stflow_fast.edge_attention, operator_arguments(inputs), atol=1e-5, rtol=1e-5)


def test_the_messages_operator_is_registered_as_torch_wants_it() -> None:
    arguments = (torch.rand(7, 5, 3), torch.rand(4, 24), torch.rand(12, 32), 2, "swiglu", "swiglu", torch.float32)
    torch.library.opcheck(torch.ops.stflow_fast.edge_messages, arguments)
    with pytest.raises(InputError, match=r"^geometry: must have shape \[N, 1 to 64, 3\]"):
        torch.ops.stflow_fast.edge_messages(torch.rand(7, 3), *arguments[1:])
    with pytest.raises(InputError, match=r"^edge: must have shape \[4, 24\]"):
        torch.ops.stflow_fast.edge_messages(arguments[0], torch.rand(4, 12), *arguments[2:])


def test_the_backward_operator_is_registered_as_torch_wants_it() -> None:
    inputs = attention_inputs(Attention(sizes=(7,), k=3, e=12, z=5, dh=5))
    detached = (value.detach() if isinstance(value, Tensor) else value for value in operator_arguments(inputs))
    arguments = (inputs.grad_context.float(), *detached)
    torch.library.opcheck(torch.ops.stflow_fast.edge_attention_backward, arguments)


def test_one_compilation_serves_every_number_of_spots() -> None:
    compiled_graphs = []

    def count(module: torch.fx.GraphModule, examples: list[Tensor]) -> Callable:
        from torch._dynamo.backends.debugging import aot_eager

        compiled_graphs.append(module)
        return aot_eager(module, examples)

    def function(
        terms: Tensor, neighbors: Tensor, edges: Tensor, edge: Tensor, weight: Tensor, logit: Tensor
    ) -> Tensor:
        context = kernels.edge_attention(2 * terms, neighbors, edges, edge, weight, logit, spec)
        return context.square()

    torch._dynamo.reset()
    spec = kernels.Settings(2, "swiglu", "swiglu")
    compiled = torch.compile(function, fullgraph=True, backend=count, dynamic=True)
    counts = []
    for n in (7, 11, 4):
        inputs = attention_inputs(Attention(sizes=(n,), k=3, e=12, z=5, dh=5))
        results = []
        for run in (function, compiled):
            arguments = kernel_arguments(inputs)
            tensors = {name: arguments[name] for name in GRADIENTS}
            output = run(tensors.pop("terms"), arguments["neighbors"], arguments["edges"], *tensors.values())
            results.append(differentiate(output, inputs.grad_context, {name: arguments[name] for name in GRADIENTS}))
        assert_same_bits(*results)
        counts.append(len(compiled_graphs))
    assert counts[0] == counts[-1] > 0


def test_autocast_computes_in_its_type_and_returns_gradients_in_the_parameters() -> None:
    inputs = attention_inputs(Attention(sizes=(9,)))
    arguments = kernel_arguments(inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        context = kernels.edge_attention(**arguments)
    assert context.dtype == torch.bfloat16
    found = differentiate(context, inputs.grad_context, {name: arguments[name] for name in GRADIENTS})
    assert all(gradient.dtype == torch.float32 for gradient in found.gradients.values())
    assert_results_agree(found, attention_reference(inputs), 0.1)


def gap_between_rows(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]]


def test_the_inputs_of_the_refusals_are_otherwise_taken() -> None:
    kernels.edge_attention(**refused({}))


def refused(changes: dict[str, Callable]) -> dict[str, object]:
    arguments = kernel_arguments(attention_inputs(Attention(sizes=(9,), k=3, p_mlp=0.2)))
    with torch.no_grad():
        arguments["arriving"] = transpose_neighbors(arguments["neighbors"])
        return {**arguments, **{name: change(arguments[name]) for name, change in changes.items()}}


REFUSALS = {
    "terms of too few columns": ("terms", lambda terms: terms[:, :-1].contiguous(), "terms: must have shape"),
    "terms without values": ("terms", lambda terms: terms[:, :128].contiguous(), "terms: must have shape"),
    "terms of too few spots": ("terms", lambda terms: terms[:-1], r"terms: must have shape \[9, 160\]"),
    "terms in one dimension": ("terms", lambda terms: terms[0], "terms: must have shape"),
    "terms in float64": ("terms", lambda terms: terms.double(), "terms: .*float64"),
    "terms that are numbers": ("terms", lambda terms: terms.int(), "terms: .*int32"),
    "terms with gaps": ("terms", gap_between_rows, "terms: must be contiguous"),
    "no neighbours": ("neighbors", lambda table: table[:, :0], "neighbors: must have 1 to 64 columns"),
    "65 neighbours": ("neighbors", lambda table: table[:, :1].repeat(1, 65), "neighbors: must have 1 to 64 columns"),
    "neighbours in one dimension": ("neighbors", lambda table: table[:, 0], "neighbors: must have 1 to 64 columns"),
    "neighbours in int32": ("neighbors", lambda table: table.int(), "neighbors: must be torch.int64"),
    "neighbours with gaps": ("neighbors", gap_between_rows, "neighbors: must be contiguous"),
    "neighbours elsewhere": ("neighbors", lambda table: table.to("meta"), "neighbors: is on meta"),
    "edges of too few neighbours": ("edges", lambda edges: edges[:, :2], r"edges: must have shape \[9, 3, 3\]"),
    "edges of two numbers": ("edges", lambda edges: edges[..., :2], r"edges: must have shape \[9, 3, 3\]"),
    "edges with gaps": ("edges", gap_between_rows, "edges: must be contiguous"),
    "edges elsewhere": ("edges", lambda edges: edges.to("meta"), "edges: is on meta"),
    "edge weights without bias": ("edge", lambda edge: edge[:3], "edge: must have shape"),
    "edge weights of half": ("edge", lambda edge: edge[:, :16].contiguous(), "edge: must have shape"),
    "edge weights with gaps": ("edge", gap_between_rows, "edge: must be contiguous"),
    "weights in one dimension": ("message_to_logit", lambda weight: weight[0], "message_to_logit: must have shape"),
    "weights with gaps": ("message_to_logit", gap_between_rows, "message_to_logit: must be contiguous"),
    "logit without bias": ("logit", lambda logit: logit[:-1], r"logit: must have shape \[17\]"),
    "logit in two dimensions": ("logit", lambda logit: logit[None], r"logit: must have shape \[17\]"),
    "no keys": ("dropout_keys", lambda keys: None, "dropout_keys: are needed"),
    "keys of too few spots": ("dropout_keys", lambda keys: keys[1:], r"dropout_keys: must have shape \[9\]"),
    "keys in int64": ("dropout_keys", lambda keys: keys.long(), "dropout_keys: must be torch.int32"),
    "no heads": ("settings", lambda settings: settings._replace(n_heads=0), "terms: .*H = 0"),
    "heads that do not divide": ("settings", lambda settings: settings._replace(n_heads=3), "terms: .*H = 3"),
    "an unknown edge gate": (
        "settings",
        lambda settings: settings._replace(edge_activation="tanh"),
        "edge_activation: must be swiglu, gelu or relu, not 'tanh'",
    ),
    "an unknown logit gate": (
        "settings",
        lambda settings: settings._replace(logit_activation="silu"),
        "logit_activation: must be swiglu, gelu or relu, not 'silu'",
    ),
    "a short list of edges": ("arriving", lambda pair: (pair[0][1:], pair[1]), r"arriving: must have shape \[27\]"),
    "edges in int32": ("arriving", lambda pair: (pair[0].int(), pair[1]), "arriving: must be torch.int64"),
    "edges with gaps between": (
        "arriving",
        lambda pair: (pair[0].repeat_interleave(2)[::2], pair[1]),
        "arriving: must be contiguous",
    ),
    "a short list of spots": ("arriving", lambda pair: (pair[0], pair[1][1:]), r"arriving_ptr: must have shape \[10\]"),
    "weights of too many columns": (
        "message_to_logit",
        lambda weight: weight.repeat(65, 1),
        r"message_to_logit: must have shape \[E, H \* P\] with E from 1 to 1024",
    ),
    "no columns": ("message_to_logit", lambda weight: weight[:0], r"message_to_logit: .* with E from 1 to 1024"),
    "kept messages with dropout": (
        "settings",
        lambda settings: settings._replace(edges_are_messages=True, p_mlp=0.1),
        "edges: kept messages are without dropout",
    ),
    "half a gate": (
        "message_to_logit",
        lambda weight: weight[:, : 2 * 15].contiguous(),
        "message_to_logit: must have an even number of columns a head for swiglu, not 15",
    ),
    "dropout of everything": ("settings", lambda settings: settings._replace(p_mlp=1.0), "p_mlp: .*not 1.0"),
    "less than no dropout": ("settings", lambda settings: settings._replace(p_attention=-0.1), "p_attention: .*-0.1"),
    "geometry for messages": (
        "settings",
        lambda settings: settings._replace(edges_are_messages=True, p_mlp=0.0),
        r"edges: must have shape \[9, 3, 16\]",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_arguments_are_named(name: str) -> None:
    argument, change, complaint = REFUSALS[name]
    with pytest.raises(InputError, match=f"^{complaint}"):
        kernels.edge_attention(**refused({argument: change}))


def test_neighbours_out_of_range_are_named_when_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STFLOW_DEBUG", "1")
    kernels.edge_attention(**refused({}))
    with pytest.raises(InputError, match=r"^neighbors: 9 is no row of the 9 terms"):
        kernels.edge_attention(**refused({"neighbors": lambda table: table + (table == table.max())}))


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(InputError, match="^terms: is on cpu; Triton kernels need a CUDA device"):
        kernels.edge_attention(**refused({}))


def test_an_old_gpu_is_refused() -> None:
    with pytest.raises(InputError, match=r"^device: .*not 7\.5"):
        launch.launch_of("edge_attention_fwd", 75, "bf16", 64)
