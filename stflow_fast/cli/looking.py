"""Commands that show what the program does, how fast it is here, and what it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..demo import run_demo
from ..doctor import diagnose
from .options import Device, Overwrite, PathOption
from .program import app, screen


@app.command()
def demo(
    out: Annotated[Path, PathOption(help="Folder of the demo.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of the synthetic cohort and the training.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train on a synthetic cohort, predict a slide of 10,000 spots, and report: index.html."""
    run_demo(out, seed=seed, overwrite=overwrite, console=screen(120))


@app.command()
def benchmark(
    workload: Annotated[
        str,
        typer.Option(
            help="Of sample, train_step, denoise, graph, and single operations: edge_forward, edge_backward, "
            "edge_messages, gated_mlp, gated_mlp_backward, dropout. With commas between."
        ),
    ] = "sample",
    spots: Annotated[str, typer.Option(help="Sizes of the slides, such as 1e3,1e4,605471.")] = "1e3,3e3,1e4",
    providers: Annotated[str | None, typer.Option(help="What to compare; what suits the device when left out.")] = None,
    genes: Annotated[str, typer.Option(help="Sizes of the gene panel.")] = "50",
    k: Annotated[str, typer.Option("--k", help="Neighbours of a spot.")] = "8",
    layout: Annotated[str, typer.Option(help="Of uniform, visium, visium_jittered and clustered.")] = "visium",
    dtype: Annotated[str, typer.Option(help="Of float32, bf16 and, on a GPU, tf32.")] = "float32",
    threads: Annotated[str | None, typer.Option(help="Threads of torch, such as 1,2; as it has when left out.")] = None,
    busy: Annotated[str, typer.Option(help="Processes that count beside what is timed, such as 0,2.")] = "0",
    busy_nice: Annotated[str, typer.Option(help="Their niceness, such as 0,10.")] = "0",
    device: Device = "auto",
    memory_budget: Annotated[
        str | None, typer.Option(help="What one provider may take; most of what is free when left out.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Timed calls, at most; 2 on a CPU, 20 on a GPU when left out.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Leave out a figure that would take longer; repeat calls within it.")
    ] = 45.0,
    minutes: Annotated[float, typer.Option(help="Leave out what would end later.")] = 2.75,
    resume: Annotated[bool, typer.Option("--resume", help="Go on: leave out what --out holds of this commit.")] = False,
    out: Annotated[
        Path | None, PathOption(help="Folder of the results, which are added to; ./benchmark when left out.")
    ] = None,
    pictures: Annotated[bool, typer.Option(help="Draw pictures of --out when all is measured.")] = True,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="On a GPU, also what it did by its own clock, kernel by kernel. Slows later cases."
        ),
    ] = False,
    complete: Annotated[
        bool, typer.Option("--complete", help="Exit code 1 where a figure failed, or was left out for the time.")
    ] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="On one tiny slide, once: shows that all of it runs, and no figure.")
    ] = False,
    redraw: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Measure nothing: show --out anew. When left out, ./benchmarks/results, for benchmarks/README.md.",
        ),
    ] = False,
) -> None:
    """Measure time and memory against the published code and other ways to write it."""
    # Of the package that is in use; nothing else needs them.
    from ..benchmarks import command

    if redraw:
        command.redraw(out)
        return
    options = command.Options(
        workload=workload,
        spots=spots,
        providers=providers,
        genes=genes,
        k=k,
        layout=layout,
        dtype=dtype,
        threads=threads,
        busy=busy,
        busy_nice=busy_nice,
        device=device,
        memory_budget=memory_budget,
        rounds=rounds,
        seconds=seconds,
        minutes=minutes,
        resume=resume,
        rehearse=rehearse,
        profile=profile,
    )
    if code := command.run(options, out or Path("benchmark"), pictures, complete):
        raise typer.Exit(code)


@app.command()
def doctor() -> None:
    """Say what is installed, what would run and why, and what is missing."""
    screen(120).print(diagnose())
