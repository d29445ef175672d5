"""The path and its solver."""

from __future__ import annotations

import pytest
import torch

from stflow_fast.errors import InputError
from stflow_fast.flow import CondOTPath, EulerSolver, time_grid


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
