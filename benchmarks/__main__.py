"""``python -m benchmarks`` lists what can be run, ``python -m benchmarks NAME ARGUMENTS`` runs it."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOMS = ("studies", "counts")


def runnable() -> dict[str, Path]:
    """Files by the names that are typed: those of :data:`ROOMS` that have a ``main``, and the GPU's plan."""
    files = [path for room in ROOMS for path in sorted((HERE / room).glob("*.py"))]
    return {path.stem: path for path in files if has_main(path)} | {"gpu": HERE / "gpu" / "__main__.py"}


def has_main(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in parsed(path).body)


def first_sentence(path: Path) -> str:
    """Of the file's docstring. It is read, not imported: torch alone would take seconds."""
    said = " ".join((ast.get_docstring(parsed(path)) or "").split())
    return re.split(r"(?<=[.?!]) ", said, maxsplit=1)[0]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def listed(found: dict[str, Path]) -> str:
    width = max(map(len, found))
    return "\n".join(f"{name:{width}}  {first_sentence(path)}" for name, path in found.items())


def main() -> int | None:
    """The exit code of what was run, which ``sys.argv`` names; 2 where there is nothing of that name."""
    found = runnable()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(f"python -m benchmarks NAME ARGUMENTS runs one of these; NAME --help explains it\n\n{listed(found)}")
        return 0
    if name not in found:
        print(f"benchmarks: there is no {name!r}; choose from {', '.join(found)}", file=sys.stderr)
        return 2
    sys.argv = [f"python -m benchmarks {name}", *arguments]
    module = ".".join(found[name].relative_to(HERE).with_suffix("").parts)
    code: int | None = importlib.import_module(f".{module}", __package__).main()
    return code


if __name__ == "__main__":
    sys.exit(main())
