"""The rules about what may import what, and what the repository holds."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROCESSES = ("api", "engine", "loader")
PACKAGES = ("ipc", *PROCESSES)
WITH_TORCH_INSIDE = ("torch", "triton", "transformers", "peft", "safetensors.torch")

POLICY = (
    "engine.action_dispatch",
    "engine.adapter_demand",
    "engine.adapter_hits",
    "engine.adapter_layouts",
    "engine.adapter_loads",
    "engine.adapter_slots",
    "engine.admission",
    "engine.block_manager",
    "engine.cohorts",
    "engine.commands",
    "engine.config",
    "engine.decodes",
    "engine.displacement",
    "engine.finish_rules",
    "engine.histogram",
    "engine.layer_jobs",
    "engine.load_forecast",
    "engine.loader_figures",
    "engine.memory_plan",
    "engine.open_requests",
    "engine.overdue",
    "engine.paused_sequences",
    "engine.plan",
    "engine.prefetch_hints",
    "engine.prefills",
    "engine.registry",
    "engine.residency",
    "engine.residency_stats",
    "engine.rotation",
    "engine.running_sequences",
    "engine.scheduler",
    "engine.scheduler_limits",
    "engine.scheduler_stats",
    "engine.sequence",
    "engine.slot_allocator",
    "engine.slot_readers",
    "engine.step_costs",
    "engine.step_meter",
    "engine.step_pacer",
    "engine.step_turns",
    "engine.step_wait",
    "engine.token_counts",
    "engine.validation",
    "engine.waiting_queue",
)

TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "SECURITY.md",
    "api",
    "engine",
    "ipc",
    "loader",
    "pyproject.toml",
    "tests",
    "tools",
}

# Written in two parts, so that this file does not contain them.
FOLDERS_OF_ONE_MACHINE = tuple(f"/{name}/" for name in ("work", "root", "home", "opt"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of(package: str) -> dict[str, Path]:
    return {module_name(path): path for path in sorted((ROOT / package).rglob("*.py"))}


def imports_of(path: Path) -> Iterator[str]:
    """Every name that a file may import, also inside functions and for type checking only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def imports_inside(start: str, modules: dict[str, Path]) -> set[str]:
    """All that ``start`` imports, directly or through other ``modules``."""
    seen: set[str] = set()
    unread = [start]
    while unread:
        for name in imports_of(modules[unread.pop()]):
            if name not in seen:
                seen.add(name)
                if name in modules:
                    unread.append(name)
    return seen


def repository_files() -> list[Path]:
    """Files that are tracked, or would be."""
    command = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=30)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not in a git checkout")
    names = listed.stdout.decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("package", PACKAGES)
def test_processes_import_ipc_and_never_each_other(package: str) -> None:
    others = {name for name in (*PROCESSES, "tools", "tests") if name != package}
    for module, path in modules_of(package).items():
        wrong = [name for name in imports_of(path) if any(is_in(name, other) for other in others)]
        assert not wrong, f"{module} imports {wrong}"


@pytest.mark.parametrize("package", ["api", "ipc", "loader"])
def test_only_the_engine_imports_torch(package: str) -> None:
    for module, path in modules_of(package).items():
        wrong = [
            name for name in imports_of(path) if any(is_in(name, t) for t in WITH_TORCH_INSIDE)
        ]
        assert not wrong, f"{module} imports {wrong}"


@pytest.mark.parametrize("module", POLICY)
def test_policy_needs_no_torch(module: str) -> None:
    reached = imports_inside(module, modules_of("engine"))
    assert not [name for name in reached if any(is_in(name, t) for t in WITH_TORCH_INSIDE)]


@pytest.mark.parametrize("package", [*PACKAGES, "tools", "tests"])
def test_package_files_are_empty(package: str) -> None:
    for path in (ROOT / package).rglob("__init__.py"):
        assert path.read_text() == "", f"{path.relative_to(ROOT)} is not empty"


@pytest.mark.parametrize("package", [*PACKAGES, "tools", "tests"])
def test_every_folder_of_modules_is_a_package(package: str) -> None:
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_top_level_holds_only_what_it_should() -> None:
    top = {path.relative_to(ROOT).parts[0] for path in repository_files()}
    assert top <= TOP_LEVEL


def test_no_file_names_a_folder_of_one_machine() -> None:
    for path in repository_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found = [folder for folder in FOLDERS_OF_ONE_MACHINE if folder in text]
        assert not found, f"{path.relative_to(ROOT)} contains {found}"
