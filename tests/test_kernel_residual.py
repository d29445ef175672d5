"""The residual addition by the interpreted kernels against its reference, with its gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import stflow_fast.ops as ops
from stflow_fast.errors import InputError
from stflow_fast.ops import reference

from .kernel_cases import DEVICE, assert_same_bits, differentiate, error, leaves, poisoned_memory, spot_keys

kernels = pytest.importorskip("stflow_fast.kernels.residual")
launch = pytest.importorskip("stflow_fast.kernels.launch")

if DEVICE == "cuda":
    pytest.skip("compiled kernels have other precisions: see test_kernel_gpu.py", allow_module_level=True)

nothing_unwritten_is_read = pytest.fixture(autouse=True, scope="module")(poisoned_memory)

STREAM = 5
HALF = 2**-11


def drawn(n: int, d: int, *dtypes: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(n + d)
    return [torch.randn(n, d, generator=draw).to(dtype) for dtype in dtypes]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("n", "d"), [(0, 8), (1, 8), (127, 128), (129, 130), (33, 5), (4, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cuts bfloat16 off
def test_output_and_gradients_are_the_references(n: int, d: int, p: float, dtype: torch.dtype) -> None:
    """The sum has two readers: one in its own type, one in that of the products."""
    tensors, keys = drawn(n, d, torch.float32, dtype), spot_keys(n)
    grads = drawn(n, d, torch.float32, dtype)
    tokens, update = leaves(tensors, torch.float64)
    exact = reference.residual(tokens, update, p, keys, STREAM)
    of_both = differentiate(exact, sum(grad.double() for grad in grads), {"tokens": tokens, "update": update})

    tokens, update = (tensor.clone().requires_grad_() for tensor in tensors)
    total, cast = kernels.residual(tokens, update, keys.keys, dtype, p, STREAM)
    assert (total.dtype, cast.dtype) == (torch.float32, dtype)
    torch.autograd.backward((total, cast), tuple(grads))
    rounding = HALF if dtype == torch.float16 else 1e-6
    assert error(total, of_both.output) < 1e-6
    assert error(cast, of_both.output) < rounding
    assert error(tokens.grad, of_both.gradients["tokens"]) < 1e-6
    assert error(update.grad, of_both.gradients["update"]) < rounding


def test_without_gradients_it_is_written_over_the_tokens() -> None:
    tokens, update = drawn(70, 24, torch.float32, torch.float32)
    expected, memory = tokens + update, tokens.data_ptr()
    with torch.no_grad(), ops.use_backend("triton"):
        total, read = ops.residual(tokens, update, 0.2, None, STREAM)
    assert total is tokens
    assert read is tokens
    assert total.data_ptr() == memory
    assert torch.equal(total, expected)


def test_in_autocast_products_read_its_type() -> None:
    tokens, update = drawn(70, 24, torch.float32, torch.float16)
    expected = tokens + update
    with torch.no_grad(), ops.use_backend("triton"), torch.autocast(DEVICE, torch.float16):
        total, read = ops.residual(tokens, update, 0.0, None, STREAM)
    assert torch.equal(total, expected)
    assert torch.equal(read, expected.half())


@pytest.mark.parametrize("gradients", [False, True])
def test_dropout_leaves_the_tokens_of_the_caller_alone(gradients: bool) -> None:
    tokens, update = drawn(40, 16, torch.float32, torch.float32)
    before, keys = tokens.clone(), spot_keys(40)
    with torch.set_grad_enabled(gradients), ops.use_backend("triton"):
        total, _ = ops.residual(tokens, update, 0.5, keys, STREAM)
    assert torch.equal(tokens, before)
    torch.testing.assert_close(total, reference.residual(tokens, update, 0.5, keys, STREAM))


def test_torch_knows_that_the_tokens_are_others() -> None:
    """What a gradient needs of them must not be read, as after torch's own operations in place."""
    tokens, update = drawn(9, 8, torch.float32, torch.float32)
    read = tokens.requires_grad_().exp()
    later = read.square()
    with torch.no_grad(), ops.use_backend("triton"):
        ops.residual(read, update, 0.0, None, STREAM)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.sum().backward()


@pytest.mark.parametrize("rows", [4, 64])
def test_tiles_change_no_bit(rows: int) -> None:
    keys = spot_keys(150)

    def run() -> object:
        tokens, update = (tensor.requires_grad_() for tensor in drawn(150, 40, torch.float32, torch.float32))
        total, _ = kernels.residual(tokens, update, keys.keys, torch.float32, 0.3, STREAM)
        return differentiate(total, drawn(150, 40, torch.float32)[0], {"tokens": tokens, "update": update})

    whole = run()
    with launch.use_launch("residual", launch.Launch(rows, 4)):
        assert_same_bits(run(), whole)


def test_the_operators_are_registered_as_torch_wants_it() -> None:
    keys = spot_keys(6).keys
    for dtype in (torch.float32, torch.float16):
        tokens, update = (tensor.requires_grad_() for tensor in drawn(6, 4, torch.float32, dtype))
        settings = (dtype, 0.3, STREAM)
        torch.library.opcheck(torch.ops.stflow_fast.residual, (tokens, update, keys, *settings))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tokens": lambda tokens: tokens[0]}, r"tokens: must have shape \[N, d\]"),
        ({"tokens": lambda tokens: tokens.double()}, "tokens: .*float64"),
        ({"tokens": lambda tokens: torch.cat([tokens, tokens], 1)[:, :6]}, "tokens: must be contiguous"),
        ({"update": lambda update: update[1:]}, r"update: must have shape \[5, 6\]"),
        ({"update": lambda update: update.to("meta")}, "update: is on meta"),
        ({"keys": lambda keys: None}, "keys: are needed"),
        ({"keys": lambda keys: keys[1:]}, r"keys: must have shape \[5\]"),
        ({"keys": lambda keys: keys.long()}, "keys: must be torch.int32"),
        ({"p": lambda p: 1.0}, "p: must be a probability"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Callable], complaint: str) -> None:
    tokens, update = drawn(5, 6, torch.float32, torch.float32)
    given = {"tokens": tokens, "update": update, "keys": spot_keys(5).keys, "dtype": torch.float32, "p": 0.2}
    arguments = {name: changes.get(name, lambda value: value)(value) for name, value in given.items()}
    with pytest.raises(InputError, match=f"^{complaint}"):
        torch.ops.stflow_fast.residual(*arguments.values(), STREAM)
