"""Two commits held against each other: what noise explains passes, what it does not fails; nothing is left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies import compare

WORKLOADS = {"sample": 900.0, "train step": 700.0, "graph": 300.0}


def git_here(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=compare.ROOT, capture_output=True, text=True, check=False)
    return done.stdout


needs_checkout = pytest.mark.skipif(not git_here("rev-parse", "HEAD"), reason="no git checkout")


def measured(slowdown: float, noise: float, seed: int, rounds: int = compare.ROUNDS):
    """Processes of base and head with noise between processes, head slower by a factor."""
    rng = np.random.default_rng(seed)

    def processes(factor: float) -> list[compare.Milliseconds]:
        return [
            {name: ms * factor * np.exp(noise * rng.normal()) for name, ms in WORKLOADS.items()} for _ in range(rounds)
        ]

    return processes(1.0), processes(slowdown)


def share_of_slower(slowdown: float, noise: float, runs: int = 60) -> float:
    """Of single verdicts."""
    verdicts = [verdict for seed in range(runs) for verdict in compare.judge(*measured(slowdown, noise, seed))]
    return sum(verdict.slower for verdict in verdicts) / len(verdicts)


def test_a_slowdown_of_a_fifth_is_seen_through_noise_of_a_twentieth():
    assert share_of_slower(1.2, 0.05) > 0.95


def test_equal_commits_and_one_percent_pass():
    assert share_of_slower(1.0, 0.05) < 0.05
    assert share_of_slower(1.01, 0.01) < 0.05


def test_one_disturbed_pair_changes_no_verdict():
    base, head = measured(1.0, 0.01, seed=3)
    head[2] = {name: 5 * ms for name, ms in head[2].items()}
    assert not any(verdict.slower for verdict in compare.judge(base, head))
    base, head = measured(1.2, 0.01, seed=3)
    head[2] = {name: ms / 5 for name, ms in head[2].items()}
    assert all(verdict.slower for verdict in compare.judge(base, head))


def test_verdicts_are_of_the_pairs_and_repeat():
    base, head = measured(0.5, 0.01, seed=0)
    first, second = compare.judge(base, head), compare.judge(base, head)
    assert first == second
    assert [verdict.workload for verdict in first] == list(WORKLOADS)
    for verdict in first:
        assert verdict.low <= verdict.ratio <= verdict.high
        assert verdict.ratio == pytest.approx(0.5, rel=0.05)
        assert verdict.word == "faster"


@needs_checkout
@pytest.mark.parametrize(("slowdown", "code"), [(1.0, 0), (1.01, 0), (1.2, 1)])
def test_the_exit_code_is_the_verdict(slowdown, code, capsys):
    rng, turns = np.random.default_rng(1), []

    def time_tree(tree: compare.Tree, sizes: dict[str, int]) -> compare.Milliseconds:
        assert sizes is compare.SIZES
        assert (tree.path / "stflow_fast" / "kernels" / "__init__.py").is_file()
        turns.append(tree.path.name)
        factor = slowdown if tree.path.name == "head" else 1.0
        return {name: ms * factor * np.exp(0.005 * rng.normal()) for name, ms in WORKLOADS.items()}

    assert compare.main(["HEAD"], time_tree) == code
    pairs = [tuple(turns[at : at + 2]) for at in range(0, len(turns), 2)]
    assert len(pairs) == compare.ROUNDS
    assert set(pairs) == {("base", "head"), ("head", "base")}
    shown = capsys.readouterr().out
    assert ("slower" in shown.replace("Slower", "")) == bool(code)
    assert "working tree" in shown


@needs_checkout
@pytest.mark.parametrize("raised", [KeyboardInterrupt, compare.InputError("x: broken"), RuntimeError])
def test_nothing_is_left_behind(raised):
    before, folders = git_here("worktree", "list"), []

    def time_tree(tree: compare.Tree, sizes: dict[str, int]) -> compare.Milliseconds:
        folders.append(tree.path.parent)
        assert str(tree.path) in git_here("worktree", "list") or tree.name == "working tree"
        raise raised

    if raised is RuntimeError:
        with pytest.raises(RuntimeError):
            compare.main(["HEAD", "HEAD"], time_tree)
    else:
        assert compare.main(["HEAD", "HEAD"], time_tree) == (130 if raised is KeyboardInterrupt else 2)
    assert git_here("worktree", "list") == before
    assert not folders[0].exists()


@needs_checkout
def test_the_real_thing_on_equal_commits_tiny(capsys):
    assert compare.main(["HEAD", "HEAD", "--rehearse", "--rounds", "1"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("sample, 40 spots", "train step, 40 spots", "graph, 100 spots"))


def test_a_tree_without_what_is_timed_is_named(tmp_path):
    (tmp_path / "stflow_fast").mkdir()
    (tmp_path / "stflow_fast" / "__init__.py").write_text("")
    with pytest.raises(compare.InputError, match=r"0123: cannot be timed \(ImportError: .*Denoiser") as caught:
        compare.time_in_process(compare.Tree("0123", tmp_path), compare.REHEARSED)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments", [["nonsense"], [""], ["--", "--all"], ["HEAD", "nonsense"], ["HEAD", "--rounds", "4"]]
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, capsys):
    assert compare.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_git_checkout_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert compare.main(["HEAD"]) == 2
    assert "not a git repository" in capsys.readouterr().err


def test_another_code_than_the_trees_is_never_timed(tmp_path):
    with pytest.raises(RuntimeError, match="is not of"):
        compare.time_here(str(tmp_path), compare.REHEARSED)


def test_the_file_runs_by_path_from_anywhere(tmp_path):
    command = [sys.executable, str(Path(compare.__file__)), "--help"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0
