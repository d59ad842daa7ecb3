"""Imports go one way: what a module may import from this package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# from the top down: a module imports from its own line or from lines below it
ORDER = [
    "jobs",
    "label_task generate_task ray_training",
    "farm",
    "pool",
    "capacity progress",
    "worker",
    "lease",
    "static_search generation labeling training scoring report results page figures benchmarks prompts quantize",
    "model",
    "engine oracle",
    "lean graph_steps",
    "slots lean_cuda graphs",
    "schedulers weights",
    "classifier kernels cuda rouge demo",
    "tables",
]
ON_RAY = ("farm", "pool", "capacity", "progress", "worker", "ray_training")
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names.split()}


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a file names in imports, at any depth of the code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" if node.module == "pmpd" else node.module for alias in node.names]
        found |= {name for name in names if name.split(".")[0] in ("pmpd", "jobs", "ray")}
    return found


def files() -> list[Path]:
    return [path for folder in ("pmpd", "jobs") for path in sorted((ROOT / folder).rglob("*.py")) if path.name != "__init__.py"]


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "jobs" if parts[0] == "jobs" else parts[1]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    for name in imports_of(path):
        if name.split(".")[0] == "ray":
            assert room(path) in ON_RAY, f"{path.name} imports ray: only the farm may"
            continue
        assert not name.startswith("jobs"), f"{path.name} imports {name}: nothing imports jobs"
        target = name.split(".")[1] if "." in name else "model"
        if room(path) == "demo" or target in ("PMPDForCausalLM", "Scheduler", "__version__"):
            continue
        assert RANK[target] >= RANK[room(path)], f"{path.relative_to(ROOT)} imports {name}: that is above it"
    if room(path) == "oracle":
        assert "pmpd.engine" not in imports_of(path)


@pytest.mark.parametrize("module", ["pmpd.report", "pmpd.tables"])
def test_report_and_tables_need_neither_torch_nor_ray(module):
    code = f"import sys; sys.modules['torch'] = sys.modules['ray'] = None; import importlib.util, types\n" \
           f"sys.modules['pmpd'] = package = types.ModuleType('pmpd'); package.__path__ = ['pmpd']; import {module}"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_importing_the_library_starts_neither_ray_nor_a_gpu():
    code = "import sys, pmpd, torch; assert 'ray' not in sys.modules and not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
