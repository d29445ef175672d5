"""Which slides of a cohort a process predicts, and by what of the machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import InputError
from ..slides.genes import other_spelling, some_of

ENGINES = ("local", "ray")

WHOLE = (1, 1)
"""The only shard of one."""


@dataclass(frozen=True)
class RunConfig:
    """What of a cohort is predicted by this process, and by what of the machine.

    Attributes:
        shard: (i, n): every n-th slide from the i-th on, for n processes that write into one folder; (1, 1) is all.
        limit: predict so many slides at most; None for all.
        nested: look for slides in folders of folders too.
        engine: "local", or "ray" for the actors of a Ray cluster.
        address: of the cluster, as ``ray.init`` takes it ("auto"); one on this machine when None.
        workers: processes beside each other on a CPU. When None as many as cores where there are four slides or more
            for each, else slides are predicted in this process. Of a cluster: actors; as many as it has GPUs, or cores
            where it has none, when None.
        gpus: numbers of GPUs of this machine, each of which gets a process.
        maps: genes that a small picture is drawn of, for every slide.

    Raises:
        InputError: a value out of its range, with the field's name.
    """

    shard: tuple[int, int] = WHOLE
    limit: int | None = None
    nested: bool = False
    engine: str = "local"
    address: str | None = None
    workers: int | None = None
    gpus: Sequence[int] | None = None
    maps: Sequence[str] = ()

    def __post_init__(self) -> None:
        index, count = self.shard
        if not 1 <= index <= count:
            raise InputError(f"shard: must be I/N with I from 1 to N, not {index}/{count}")
        for name in ("limit", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: must be 1 at least, not {value}")
        self._check_engine()
        there = range(torch.cuda.device_count())
        if self.gpus is not None and (not self.gpus or len({*self.gpus} & {*there}) < len(self.gpus)):
            raise InputError(f"gpus: must be different numbers below {len(there)}, the GPUs here, not {self.gpus}")
        if self.gpus is not None and self.workers is not None:
            raise InputError("workers: each of the gpus has one; leave out one of the two")

    def _check_engine(self) -> None:
        if self.engine not in ENGINES:
            raise InputError(f"engine: must be {' or '.join(ENGINES)}, not {self.engine!r}")
        if self.engine == "ray" and importlib.util.find_spec("ray") is None:
            raise InputError("engine: ray is not installed; pip install 'stflow-fast[ray]'")
        for name, engine in (("address", "ray"), ("gpus", "local")):
            if getattr(self, name) is not None and self.engine != engine:
                raise InputError(f"{name}: is of the {engine} engine; leave it out, or choose engine {engine}")

    def check_maps(self, genes: Sequence[str]) -> tuple[str, ...]:
        """``maps``.

        Raises:
            InputError: a gene that is not written.
        """
        if missing := [gene for gene in self.maps if gene not in genes]:
            known = f"{len(genes)} genes that are written: {some_of(genes)}"
            raise InputError(f"maps: {missing[0]} is not among the {known}{other_spelling(missing, genes, None)}")
        return tuple(dict.fromkeys(self.maps))
