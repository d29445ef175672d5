"""The page of a GPU, from whatever lines there are: what became of each section, the targets, every figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from stflow_fast.markdown import table

from ..command import REHEARSAL
from ..pages.lines import Line, grouped, in_order, published_times, ratio_of, times_as_fast, why_not_timed
from ..pages.looks import digits, named, seconds, size
from .sections import DONE

Part = tuple[str, str]
"""A section's name, and its process's."""


Published = dict[tuple[Any, ...], float]
"""Of :func:`published_times`."""

Reached = Callable[[Line, Published], tuple[str, bool] | None]


class Target(NamedTuple):
    """A goal of one line (an H100's); ``reached`` says what was reached, and whether that is enough."""

    told: str
    figure: tuple[str, str, int]  # workload, provider, spots; in bf16
    reached: Reached


def _within(field: str, most: float, told: Callable[[float], str]) -> Reached:
    return lambda line, _: None if line[field] is None else (told(line[field]), line[field] <= most)


def _times(least: float) -> Reached:
    def reached(line: Line, published: Published) -> tuple[str, bool] | None:
        ratio = ratio_of(line, published)
        return (f"{ratio:.2f}x", ratio >= least) if ratio else None

    return reached


def _of_floor(line: Line, _: Published) -> tuple[str, bool] | None:
    return (f"{digits(1 / line['of_floor'])} times it", line["of_floor"] >= 1 / 1.5) if line["of_floor"] else None


SAMPLE, MILLION, STEP = (
    ("sample", "triton_graph", 10_000),
    ("sample", "triton_graph", 1_000_000),
    ("train_step", "triton", 10_000),
)
TARGETS = (
    Target("sample of 10,000 spots: 2 ms on the device", SAMPLE, _within("device_ms", 2.0, seconds)),
    Target("sample of 10,000 spots: 25 times as fast as the published algorithm", SAMPLE, _times(25)),
    Target("sample of 1,000,000 spots: 200 ms", MILLION, _within("median_ms", 200.0, seconds)),
    Target("sample of 1,000,000 spots: 8 GB, of torch's pool", MILLION, _within("reserved_bytes", 8e9, size)),
    Target(
        "edge attention of kept messages, 1,000,000 spots: within 1.5 times its floor",
        ("edge_forward", "triton_kept_edges", 1_000_000),
        _of_floor,
    ),
    Target("training step of 10,000 spots: 15 times as fast as the published algorithm", STEP, _times(15)),
)

FIGURES = "## Figures"
LEGEND = """Milliseconds between CUDA events, inputs that were read before (cold: the L2 cache flushed): median (20th to
80th percentile). device: what the GPU computed and copied in a call, by its own clock; the rest of the median is the
host's. A sample is `PreparedSlide.draw`, the result on the host; prepared: made once per slide before it. peak, pool:
bytes of tensors, and of torch's pool with its CUDA graphs, above the inputs, of what is made once and two calls. of
floor: the least time by counts over the median, of a single operation over the device's time, 1 at best. x: times as
fast as the published algorithm in turns with it. error: against float64, checked before anything is timed."""


def drawn(common: dict[str, Any], known: dict[Part, dict[str, Any]], parts: list[Part], figures: list[Line]) -> str:
    """Markdown. ``known`` are the newest lines of sections, ``parts`` those of the plan."""
    versions = ", ".join(f"{name} {version}" for name, version in common["versions"].items())
    driver = f", driver {common['driver']}" if common["driver"] else ""
    commits = ", ".join(sorted({line["commit"] for line in (*known.values(), *figures)})) or common["commit"]
    device = common["device"]
    head = "# Rehearsal on the CPU: nothing here is a figure of a GPU" if device == REHEARSAL else f"# {device}"
    pieces = [head, f"{versions}{driver}; commit {commits}.", "## Targets", _targets(figures)]
    worst = [f"* {line['part']}: {told}" for line in known.values() for told in line["worst"]]
    if worst:
        pieces += ["## Worst errors of the GPU tests, over their limits", "\n".join(worst)]
    pieces += [
        "## Sections",
        table(["section", "outcome", "s", "clocks", "said"], [_section(*p, known) for p in parts]),
    ]
    pieces += [FIGURES, LEGEND, *_tables(figures)] if figures else []
    return "\n\n".join(pieces) + "\n"


def lacking(known: dict[Part, dict[str, Any]], parts: Iterable[Part]) -> bool:
    """Whether anything of the plan is not done."""
    return any(part not in known or known[part]["outcome"] != DONE for part in parts)


def _section(name: str, part: str, known: dict[Part, dict[str, Any]]) -> list[str]:
    line = known.get((name, part))
    told = f"{name}: {part}" if part else name
    if line is None:
        return [told, "not begun", "", "", ""]
    return [told, line["outcome"], f"{line['seconds']:.0f}", line["clocks"], line["said"].replace("|", "/")]


def _targets(figures: list[Line]) -> str:
    """A bullet each; below one that was missed, what the GPU spent its time on."""
    published, bullets = published_times(figures), []
    for target in TARGETS:
        workload, provider, spots = target.figure
        found = [
            line
            for line in figures
            if (line["workload"], line["provider"], line["spots"], line["dtype"]) == (workload, provider, spots, "bf16")
        ]
        reached = target.reached(found[-1], published) if found and found[-1]["median_ms"] else None
        if reached is None:
            why = f" ({why_not_timed(found[-1])})" if found and not found[-1]["median_ms"] else ""
            bullets.append(f"* {target.told}: not measured{why}")
            continue
        bullets.append(f"* {target.told}: {'met' if reached[1] else 'missed'}, {reached[0]}")
        if not reached[1]:
            bullets += [f"    * {_profile(found[-1])}"] if found[-1]["device_kernels"] else []
    return "\n".join(bullets)


def _profile(line: Line) -> str:
    kernels = (f"`{name}` {launches} launches {digits(ms)} ms" for name, launches, ms in line["device_kernels"])
    return f"of {digits(line['device_ms'])} ms: {'; '.join(kernels)}"


HEAD = ["", "spots", "arithmetic", "ms", "cold", "device", "of floor", "x", "prepared", "peak", "pool", "error", ""]


def _tables(figures: list[Line]) -> list[str]:
    published = published_times(figures)
    pieces = []
    for (workload,), members in grouped(in_order(figures), ("workload",)).items():
        pieces += [f"### {workload}", table(HEAD, [_row(line, published) for line in members])]
    return pieces


def _row(line: Line, published: Published) -> list[str]:
    def cell(name: str, told: Callable[[float], str]) -> str:
        return "" if line[name] is None else told(line[name])

    spread = " to ".join(digits(line[name]) for name in ("p20_ms", "p80_ms") if line[name] is not None)
    return [
        named(line["provider"]),
        f"{line['spots']:,}",
        line["arithmetic"],
        why_not_timed(line) if line["median_ms"] is None else f"{digits(line['median_ms'])} ({spread})",
        cell("cold_l2_ms", digits),
        cell("device_ms", digits),
        cell("of_floor", "{:.2f}".format),
        times_as_fast(line, published),
        cell("prepare_ms", digits),
        cell("peak_bytes", size),
        cell("reserved_bytes", size),
        cell("relative_error", "{:.1e}".format) + (" RED" if line["check"] == "red" else ""),
        line["note"].replace("|", "/"),
    ]
