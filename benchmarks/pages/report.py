"""The section of figures in benchmarks/README.md, from the suite's results. No figure in it is typed by hand."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from stflow_fast.errors import InputError, first_line
from stflow_fast.files import atomic_path
from stflow_fast.markdown import table

from ..suite.busy import beside
from ..suite.providers import PROVIDERS, Ours, class_of
from .lines import (
    MACHINE,
    MEASURED,
    NEEDED,
    PUBLISHED,
    REPEAT,
    REPEAT_ON_GPU,
    SERIES,
    SETTING,
    STEADY,
    STUDIED,
    WORKLOADS,
    Line,
    chosen,
    exponents_of,
    first_out_of_memory,
    grouped,
    history,
    idle_times,
    in_order,
    newest,
    out_of_memory,
    published_times,
    times_as_fast,
    times_idle,
    told_exponent,
    why_not_timed,
)
from .looks import OTHER_FUNCTION, computes_another_function, counted, digits, named, seconds, size
from .pictures import picture_path, write_pictures

OURS = tuple(name for name in PROVIDERS if class_of(name) is Ours)
SHOWN_SIZES = (10_000, 100_000, 605_471)  # the last is the largest public slide
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def redraw(results_dir: str | os.PathLike[str], readme_path: str | os.PathLike[str]) -> list[Path]:
    """Write the README's section between its two marks, and its pictures beside the results, from the results alone.

    Returns: the pictures.

    Raises:
        InputError: there is no result, a line is broken, or the README has not both marks once and in order.
    """
    readme = Path(readme_path)
    try:
        text = readme.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{readme}: cannot be read ({first_line(error)})") from error
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or END not in rest:
        raise InputError(f"{readme}: needs one line {BEGIN} and below it one line {END}")
    lines = history(results_dir)
    pictures = write_pictures(newest(lines), results_dir)
    # A device that was never idle has nothing to stand beside.
    parts = [section(mine, pictures, readme) for mine in grouped(lines, ("device",)).values() if chosen(mine)]
    with atomic_path(readme) as temporary:
        temporary.write_bytes("\n\n".join([before + BEGIN, *parts, END + after]).encode())
    return pictures


def section(every: list[Line], pictures: list[Path], readme: Path) -> str:
    """Of one device, from every line that was measured: its table, the picture of time, links to the others, ours by
    size and setting, with other threads and beside other processes, what comes before the times, and what all was
    measured with."""
    lines = newest(every)
    device, shown, studies, machines = lines[0]["device"], chosen(lines), studies_of(lines), machines_of(every)

    def link(content: str) -> str:
        name = picture_path("", device, content).name
        found = [os.path.relpath(path, readme.parent) for path in pictures if path.name == name]
        return f"[{content}]({Path(found[0]).as_posix()})" if found else ""

    more = ", ".join(filter(None, map(link, ("memory", "floor"))))
    picture = link("time").replace("[time]", f"![Time against spots on {device}]")
    studied = [line for members in (*studies.values(), *machines) for line in members]
    told = _told(shown, studied) + (f" More pictures: {more}." if more else "")
    bullets = "\n".join(
        [
            *(_told_study(field, members) for field, members in studies.items()),
            *map(_told_machine, machines),
            *_told_beside(shown),
            *_told_before(shown),
        ]
    )
    parts = (f"**{device}**", table(*_table_of(shown)), picture, _by_size(shown), bullets, told)
    return "\n\n".join(filter(None, parts))


def largest_of_ours(lines: list[Line]) -> Line | None:
    """Of :func:`chosen` lines, the largest slide of the first workload that ours did; of several, that of the provider
    with most sizes, and the fastest."""
    mine = [line for line in lines if line["provider"] in OURS and line["median_ms"]]
    main = [line for line in mine if line["workload"] == mine[0]["workload"]]
    sizes = {provider: len(members) for (provider,), members in grouped(main, ("provider",)).items()}
    return max(main, key=lambda line: (line["spots"], sizes[line["provider"]], -line["median_ms"]), default=None)


def _by_size(lines: list[Line]) -> str:
    """A table of what ours costs at every size; empty where it was not measured at three."""
    best = largest_of_ours(lines)
    if best is None:
        return ""
    same = [line for line in lines if line["median_ms"] and all(line[field] == best[field] for field in SERIES)]
    if len(same) < NEEDED:
        return ""
    exponents = {quantity: exponents_of(same, quantity).values() for quantity in MEASURED}
    time, memory = (", ".join(map(told_exponent, exponents[quantity])) for quantity in ("time", "memory"))
    peaks = ["" if line["peak_bytes"] is None else size(line["peak_bytes"]) for line in same]
    rows = [
        ["time", *map(_time, same), time],
        ["per spot", *(seconds(line["median_ms"] / line["spots"]) for line in same), ""],
        ["peak memory", *peaks, memory],
    ]
    head = f"{named(best['provider'])}: {best['workload'].replace('_', ' ')}, spots"
    return table([head, *(f"{line['spots']:,}" for line in same), "exponent of N"], rows)


def studies_of(lines: list[Line]) -> dict[str, list[Line]]:
    """Of one device: per setting that was varied alone, by ours where it did the largest slide, the lines of the
    workload and size at which it had most values; and those of the published code."""
    best, found = largest_of_ours(chosen(lines)), {}
    if best is None:
        return {}
    for field in STUDIED:
        fixed = [name for name in (*SETTING, *MACHINE) if name != field]
        alike = [line for line in in_order(lines) if all(line[name] == best[name] for name in fixed)]
        places = grouped(
            (line for line in alike if line["provider"] == best["provider"] and line["median_ms"]),
            ("workload", "spots"),
        )
        if not places:
            continue
        (workload, spots), members = max(places.items(), key=lambda place: (len(place[1]), -_far(place[0][1])))
        if len(members) > 1:
            published = [
                line
                for line in alike
                if (line["workload"], line["spots"], line["provider"]) == (workload, spots, PUBLISHED[workload])
            ]
            found[field] = members + [line for line in published if _tells(line)]
    return found


def _told_study(field: str, lines: list[Line]) -> str:
    """One bullet."""
    lines = lines if field == "layout" else sorted(lines, key=lambda line: line[field])
    first = next(line for line in lines if line["provider"] in OURS)
    ours = first["provider"]

    def told(line: Line) -> str:
        value = line[field] if field == "layout" else f"{line[field]:,}"
        return f"{value}: " + ("" if line["provider"] == ours else f"{named(line['provider'])} ") + _cell(line)

    what = f"{first['workload'].replace('_', ' ')}, {first['spots']:,} spots, {named(ours)}"
    return f"* {STUDIED[field]} ({what}): " + "; ".join(map(told, lines)) + "."


def machines_of(every: list[Line]) -> list[list[Line]]:
    """Of one device: per workload the last run in which ours was timed with several numbers of threads or beside other
    processes, of that the slide at which it had most of them, of ours and of the published code."""
    runs: dict[str, list[Line]] = {}
    for (_, workload), members in grouped(every, ("date", "workload")).items():
        found = _most_machines(members)
        if found and (workload not in runs or found[0]["date"] >= runs[workload][0]["date"]):
            runs[workload] = found
    return [runs[workload] for workload in WORKLOADS if workload in runs]


def _most_machines(run: list[Line]) -> list[Line]:
    """Of one workload in one run; empty where ours was timed in one way alone."""
    timed = [line for line in in_order(newest(run)) if line["median_ms"]]
    mine = grouped((line for line in timed if line["provider"] in OURS), ("provider", *SETTING, "spots"))
    (provider, *place), most = max(mine.items(), key=lambda found: len(found[1]), default=((None,), []))
    kept = (provider, PUBLISHED[run[0]["workload"]])
    return [line for line in timed if line["provider"] in kept and _place(line) == place] if len(most) > 1 else []


def _place(line: Line) -> list[Any]:
    return [line[field] for field in (*SETTING, "spots")]


def _told_machine(lines: list[Line]) -> str:
    """One bullet: threads beside nothing, then with most threads what was beside them."""
    mine, idle = [line for line in lines if line["provider"] in OURS], idle_times(lines)
    published = {_machine(line): line for line in lines if line["provider"] not in OURS}
    alone, most = [line for line in mine if not line["busy"]], max(line["threads"] for line in mine)

    def told(line: Line) -> str:
        of_idle = times_idle(line, idle)
        return seconds(line["median_ms"]) + (f" ({of_idle} its idle time)" if of_idle else "")

    parts = []
    for line in alone:
        gain = f" ({digits(alone[0]['median_ms'] / line['median_ms'])}x)" if line is not alone[0] else ""
        parts.append(f"{counted(line['threads'], 'thread')} {seconds(line['median_ms'])}{gain}")
    for line in mine:
        if line["busy"] and line["threads"] == most:
            theirs = published.get(_machine(line))
            against = f", {named(theirs['provider'])} {told(theirs)}" if theirs else ""
            parts.append(f"{beside(line['busy'], line['busy_nice'])} {told(line)}{against}")
    what = f"{mine[0]['workload'].replace('_', ' ')}, {mine[0]['spots']:,} spots, {named(mine[0]['provider'])}"
    return f"* Threads and a busy machine ({what}): {'; '.join(parts)}."


def _machine(line: Line) -> tuple[Any, ...]:
    return tuple(line[field] for field in MACHINE)


def _told_beside(lines: list[Line]) -> list[str]:
    """A bullet per workload that has no column in the table: of every provider its sizes, to the first that memory did
    not hold."""
    published, bullets = published_times(lines), []
    for (workload,), members in grouped(lines, ("workload",)).items():
        if workload in (_main_workload(lines), "train_step"):
            continue
        told = []
        for (provider,), series in grouped(members, ("provider",)).items():
            lacking = first_out_of_memory(series)
            shown = [line for line in series if line["median_ms"] or line is lacking]
            cells = [f"{line['spots']:,}: {_compared(line, published)}" for line in shown]
            told += [f"{named(provider)} {', '.join(cells)}"] if cells else []
        bullets.append(f"* {WORKLOADS[workload]}, by spots: {'; '.join(told)}.")
    return bullets


def _told_before(lines: list[Line]) -> list[str]:
    """A bullet of what is made once per slide, at the size nearest to 10,000 spots, and one of compilation, each at its
    provider's least size."""
    workload = _main_workload(lines)
    main = [line for line in lines if line["workload"] == workload]
    sizes = {line["spots"] for line in main if line["prepare_ms"] is not None}
    prepared = [line for line in main if sizes and line["spots"] == _nearest(sizes, SHOWN_SIZES[0])]
    compiled = [line for line in main if line["compile_s"]]
    first = [min(members, key=lambda line: line["spots"]) for members in grouped(compiled, ("provider",)).values()]
    published = published_times(lines)

    def told(what: str, field: str, factor: float, found: list[Line]) -> list[str]:
        timed = [line for line in found if line[field] is not None]
        least = min((line["spots"] for line in timed), default=0)
        times = []
        for line in timed:
            where = "" if line["spots"] == least else f" ({line['spots']:,} spots)"
            ratio = times_as_fast(line, published, line[field]) if field == "prepare_ms" else ""
            with_it = f", with it {ratio}" if ratio and line["provider"] in OURS else ""
            times.append(f"{named(line['provider'])}{where}: {seconds(factor * line[field])}{with_it}")
        told_of = f"* {what} ({workload.replace('_', ' ')}, {least:,} spots): "
        return [told_of + "; ".join(times) + "."] if timed else []

    compilation = "Compilation, by how much longer the first call takes than a second"
    return told("Made once per slide", "prepare_ms", 1, prepared) + told(compilation, "compile_s", 1e3, first)


def _far(spots: int) -> float:
    """From the size at which settings are compared."""
    return abs(math.log(spots / STEADY))


def _table_of(lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a provider a row; time and memory at a few sizes, the exponent, a training step."""
    workload = _main_workload(lines)
    main = [line for line in lines if line["workload"] == workload]
    columns = [(workload, spots) for spots in _sizes({line["spots"] for line in main})]
    if workload != "train_step":
        columns += _training_column(lines)
    exponents = {series[1]: slope for series, slope in exponents_of(main, "time").items()}
    published, rows = published_times(lines), []
    for (provider,), members in grouped(lines, ("provider",)).items():
        found = {(line["workload"], line["spots"]): line for line in members}
        if any(column in found and _tells(found[column]) for column in columns):
            cells = [_compared(found[column], published) if column in found else "" for column in columns]
            exponent = told_exponent(exponents[provider]) if provider in exponents else ""
            rows.append([named(provider), members[0]["arithmetic"], *cells, exponent])
    names = [f"{name.replace('_', ' ')}, {spots:,} spots" for name, spots in columns]
    return ["", "arithmetic", *names, f"{workload.replace('_', ' ')}: exponent of N"], rows


def _main_workload(lines: list[Line]) -> str:
    return next(name for name in WORKLOADS if any(line["workload"] == name for line in lines))


def _training_column(lines: list[Line]) -> list[tuple[str, int]]:
    """The size nearest to 10,000 spots, if any was trained."""
    steps = {line["spots"] for line in lines if line["workload"] == "train_step" and line["median_ms"]}
    return [("train_step", _nearest(steps, SHOWN_SIZES[0]))] if steps else []


def _nearest(measured: set[int], wanted: int) -> int:
    return min(measured, key=lambda spots: (abs(math.log(spots / wanted)), spots))


def _tells(line: Line) -> bool:
    """Whether it is a figure, or a failure worth a row."""
    return line["median_ms"] is not None or line["check"] == "red" or bool(out_of_memory(line))


def _time(line: Line) -> str:
    return seconds(line["median_ms"]) + (" (one call)" if line["rounds"] == 1 else "")


def _cell(line: Line) -> str:
    """Empty of what was not run."""
    if line["median_ms"] is None:
        return why_not_timed(line) if _tells(line) else ""
    return _time(line) + ("" if line["peak_bytes"] is None else f", {size(line['peak_bytes'])}")


def _compared(line: Line, published: dict[tuple[Any, ...], float]) -> str:
    """A cell, with how many times faster than the published code of the same run it is."""
    ratio = "" if line["provider"] == PUBLISHED[line["workload"]] else times_as_fast(line, published)
    return ", ".join(filter(None, (_cell(line), ratio)))


def _sizes(measured: set[int]) -> list[int]:
    """Those nearest to the sizes shown, within a factor of two; else the three largest."""
    near = [_nearest(measured, wanted) for wanted in SHOWN_SIZES]
    near = [spots for spots, wanted in zip(near, SHOWN_SIZES, strict=True) if 0.5 <= spots / wanted <= 2]
    return sorted(set(near)) or sorted(measured)[-3:]


def _told(lines: list[Line], studied: list[Line]) -> str:
    """The setting of the lines; the load, the code and the date of both; what repeats them."""
    everything = [*lines, *studied]

    def values(field: str) -> str:
        return ", ".join(sorted({str(line[field]) for line in lines}))

    def versions(name: str) -> str:
        return ", ".join(sorted({str(line["versions"][name]) for line in everything if line["versions"].get(name)}))

    names = dict.fromkeys(name for line in everything for name in line["versions"])
    software = ", ".join(f"{name} {versions(name)}" for name in names if versions(name))
    loads = [line["load"] for line in everything if line["load"] is not None and not line["busy"]]
    load = f"; load average {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    dates = sorted({line["date"][:10] for line in everything})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    other = any(computes_another_function(line["provider"]) for line in lines)
    commits = ", ".join(sorted({line["commit"] for line in everything}))
    rounds = ", ".join(map(str, sorted({line["rounds"] for line in everything if line["rounds"]})))
    arithmetic = {line["arithmetic"] for line in lines}
    repeat = REPEAT_ON_GPU if any(line.get("cold_l2_ms") for line in lines) else REPEAT
    fastest = "in the fastest arithmetic of each; " if len(arithmetic) > 1 else ""
    return (
        f"Median time of {rounds} calls, without what is made once per slide (ours: neighbours, embedding of the "
        f"patches, messages); peak memory above the inputs, with it; {fastest}x: times as fast as the published "
        "algorithm, where both took turns in one run. "
        + (f"{OTHER_FUNCTION} computes another function, over all spots or by dot products. " if other else "")
        + f"Layout {values('layout')}; {values('k')} neighbours, {values('genes')} genes; {values('threads')} thread(s)"
        f"{load}. {software}; commit {commits}; {when}. Again: `{repeat}`."
    )
