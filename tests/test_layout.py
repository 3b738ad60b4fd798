"""Imports go one way, and the heavy ones stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mcrise_ray"

ORDER = [
    "errors",
    "memory",
    "timing",
    "threads",
    "spec",
    "masks",
    "plan",
    "blend",
    "regression",
    "variates",
    "kernel_regression",
    "kernels",
    "guide",
    "learning",
    "saliency",
    "estimators",
    "explanations",
    "scores",
    "reid",
    "identity",
    "matching",
    "reidspec",
    "preprocess",
    "layout",
    "servers",
    "loading",
    "zoo",
    "sessions",
    "normalisation",
    "programs",
    "models",
    "baselines",
    "embedders",
    "files",
    "decode",
    "shards",
    "seen",
    "images",
    "pipeline",
    "reduction",
    "explainer",
    "batching",
    "precision",
    "tuning",
    "rows",
    "store",
    "results",
    "faults",
    "embed",
    "gallery",
    "tasks",
    "bookkeeping",
    "dispatch",
    "embedding",
    "engine",
    "targets",
    "explained",
    "worker",
    "jobspec",
    "access",
    "cluster",
    "checkpoints",
    "lease",
    "progress",
    "progressfile",
    "recorder",
    "render",
    "reidjob",
    "jobs",
    "contenders",
    "bench",
    "arguments",
    "cli_options",
    "benchcli",
    "jobfiles",
    "forecast",
    "telemetry",
    "jobserver",
    "submission",
    "driver",
    "demo",
    "cli_jobs",
    "cli",
]

ALLOWED = {
    "ray": {"cluster", "driver", "jobserver", "telemetry"},
    "pyarrow": {"rows", "store", "results", "files", "shards", "gallery"},
}


def imports(path: Path) -> set[str]:
    """Full names of everything that a module imports, wherever in the module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_files() -> dict[str, Path]:
    files = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    files |= {path.parent.name: path for path in PACKAGE.glob("*/__init__.py")}
    return files


def test_every_module_has_its_place() -> None:
    assert set(module_files()) == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_modules_import_only_from_modules_above_them(module: str) -> None:
    above = ORDER[: ORDER.index(module)]
    for name in imports(module_files()[module]):
        package, _, rest = name.partition(".")
        if package == "mcrise_ray":
            assert rest.split(".")[0] in above, f"{module} imports {name}"


@pytest.mark.parametrize("library", ALLOWED)
def test_heavy_libraries_stay_in_their_modules(library: str) -> None:
    users = {
        m for m, path in module_files().items() if any(n.split(".")[0] == library for n in imports(path))
    }
    assert users == ALLOWED[library]


@pytest.mark.parametrize("statement", ["import mcrise_ray", "import mcrise_ray; mcrise_ray.explain"])
def test_importing_the_package_loads_neither_ray_nor_pyarrow(statement: str) -> None:
    check = f"{statement}; import sys; print([m for m in ('ray', 'pyarrow') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_are_completed_and_helped_with_before_they_are_loaded() -> None:
    check = "import mcrise_ray as mr; print(sorted({*mr.__all__} - {*dir(mr)}))"
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_help_loads_nothing_heavy() -> None:
    heavy = ("torch", "ray", "numpy", "pydantic")
    check = f"import mcrise_ray.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_module_outgrows_its_job(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
