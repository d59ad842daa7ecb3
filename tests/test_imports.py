"""Imports go one way: what a room of `pmpd/` may import from the others."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# from the top down: a room imports from rooms on lines below its own
ORDER = [
    "__main__",
    "cli",
    "farm",
    "report labeling training quantize",
    "evaluation",
    "model benchmarks",
    "decode",
    "schedulers weights",
    "kernels metrics",
    "storage gpu demo threads plugins",
    "errors",
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names.split()}
RAY_ROOM = "farm"
RAY_PRIVATE = "pmpd/farm/ray_private.py"
"""The one file that uses names of Ray that Ray does not promise."""
MOST_ROOMS = 20
FREE_NAMES = ("PMPDForCausalLM", "Scheduler", "__version__")
"""What `pmpd/__init__.py` itself offers."""


def imports_of(path: Path) -> set[str]:
    """Modules of this package, and of Ray, that a file names in imports at any depth of the code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            # `from pmpd.room import module` may name a module as well as a thing
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name for name in names if name.split(".")[0] in ("pmpd", "jobs", "ray")}
    return found


def files() -> list[Path]:
    return sorted((ROOT / "pmpd").rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "pmpd").with_suffix("").parts[0]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in files()}


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    for name in imports_of(path):
        top, _, rest = name.partition(".")
        if top == "ray":
            assert room(path) == RAY_ROOM, f"{path.name} imports ray: only pmpd/{RAY_ROOM}/ may"
            if "._" in name:
                assert str(path.relative_to(ROOT)) == RAY_PRIVATE, (
                    f"{path.name} imports {name}: private names of Ray belong in {RAY_PRIVATE}"
                )
            continue
        assert top != "jobs", f"{path.name} imports {name}: nothing imports jobs"
        target = rest.partition(".")[0]
        if room(path) in ("__init__", "demo") or not target or target in FREE_NAMES or target == room(path):
            continue
        assert RANK[target] > RANK[room(path)], (
            f"{path.relative_to(ROOT)} imports {name}: that room is not below it"
        )
    if path.name == "oracle.py":
        assert not any(name.startswith("pmpd.decode.engine") for name in imports_of(path)), (
            "the oracle must not use what it checks"
        )


def test_modules_import_in_no_circle():
    graph = {
        name: {target for target in imports_of(path) if target in MODULES and target != name}
        for name, path in MODULES.items()
        if path.name != "__init__.py"  # a room's door collects its modules; they don't go through it (below)
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_does_not_go_through_the_door_of_its_own_room(path):
    if path.name == "__init__.py" or path.parent == ROOT / "pmpd":
        return
    door = ".".join(path.relative_to(ROOT).parts[:2])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == door:
            through = [alias.name for alias in node.names if f"{door}.{alias.name}" not in MODULES]
            assert not through, (
                f"{path.relative_to(ROOT)} imports {through} from {door}: name the module that has it"
            )


def test_there_are_few_rooms():
    rooms = {room(path) for path in files()} - {"__init__", "__main__"}
    assert rooms <= set(RANK), f"rooms without a place in ORDER: {sorted(rooms - set(RANK))}"
    assert len(rooms) <= MOST_ROOMS


def run_without(modules: list[str], code: str) -> None:
    block = "; ".join(f"sys.modules[{name!r}] = None" for name in modules)
    subprocess.run([sys.executable, "-c", f"import sys; {block}; {code}"], cwd=ROOT, check=True)


@pytest.mark.parametrize("module", ["pmpd.report.build", "pmpd.storage", "pmpd.metrics.base"])
def test_what_reads_results_needs_neither_torch_nor_ray(module):
    run_without(["torch", "ray"], f"import {module}")


def test_the_library_needs_neither_ray_nor_pyarrow():
    run_without(["ray", "pyarrow"], "from pmpd import PMPDForCausalLM, Scheduler")


def test_importing_the_library_starts_no_gpu():
    code = (
        "import sys, pmpd.model, torch; assert 'ray' not in sys.modules and not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def defined(body: list[ast.stmt]) -> set[str]:
    """Names that statements at the top of a module, also under `if` and `try`, give it."""
    found: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            found |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        else:
            inner = [*getattr(node, "handlers", []), node]
            found |= {name for part in inner for name in defined(getattr(part, "body", []))}
            found |= defined(getattr(node, "orelse", []))
    return found


@pytest.mark.parametrize("folder", ["bench", "jobs", "pmpd", "tests"])
def test_what_is_imported_by_name_is_there(folder: str) -> None:
    """Benchmarks are run by hand: one that names what has moved is found out too late."""
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(node, "module", None) or ""
            if not isinstance(node, ast.ImportFrom) or module.split(".")[0] not in ("pmpd", "bench", "tests"):
                continue
            target = ROOT / module.replace(".", "/")
            file = target.with_suffix(".py") if target.with_suffix(".py").exists() else target / "__init__.py"
            known = defined(ast.parse(file.read_text()).body) if file.exists() else set()
            known |= {child.stem for child in target.glob("*")} if target.is_dir() else set()
            wrong += [f"{path}: {module}.{alias.name}" for alias in node.names if alias.name not in known]
    assert not wrong
