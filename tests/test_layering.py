"""The four packages import each other along the allowed arrows only, and nothing in a circle."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("protocol", "actors", "learner", "launch")
ALLOWED = {
    "protocol": set(),
    "actors": {"protocol"},
    "learner": {"protocol"},
    "launch": {"protocol", "actors", "learner"},
}
LIGHT = (
    "protocol.messages.arrays",
    "protocol.messages.messages",
    "protocol.messages.wire",
    "protocol.transport.channel",
    "protocol.config.load",
    "protocol.config.settings",
)
HEAVY = ("mlx", "mlx_lm", "transformers", "torch", "datasets")


def module_name(path):
    """Name the module of a file in this checkout."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(name, *, at_import_time=False):
    """Return the local modules that `name` imports; relative imports are an error."""
    tree = ast.parse(MODULES[name].read_text(), filename=str(MODULES[name]))
    nodes = _outside_functions(tree) if at_import_time else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} has a relative import"
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {module} | {child for child in names if child in MODULES}
    return {other for other in found if other.split(".")[0] in PACKAGES} - {name}


def _outside_functions(node):
    """Walk the nodes that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _outside_functions(child)


def test_packages_import_along_the_arrows_only(capsys):
    arrows = {
        (name.split(".")[0], other.split(".")[0]): (name, other)
        for name in MODULES
        for other in imports(name)
        if name.split(".")[0] != other.split(".")[0]
    }
    with capsys.disabled():
        drawn = ", ".join(f"{source} -> {target}" for source, target in sorted(arrows))
        print(f"\nlayering: {len(MODULES)} modules; {drawn}")
    wrong = {
        arrow: modules for arrow, modules in arrows.items() if arrow[1] not in ALLOWED[arrow[0]]
    }
    assert not wrong


def test_every_local_import_names_a_module():
    wrong = {name: sorted(imports(name) - MODULES.keys()) for name in MODULES}
    assert not {name: missing for name, missing in wrong.items() if missing}


def test_no_imports_go_in_circles():
    graph = {name: imports(name) & MODULES.keys() for name in MODULES}
    # Naming a module of a package runs the package's __init__ first.
    for name, targets in graph.items():
        parents = {target.rpartition(".")[0] for target in targets} & MODULES.keys()
        graph[name] = (targets | parents) - {name, name.rpartition(".")[0]}
    left = dict(graph)
    while left:
        free = [name for name, targets in left.items() if not targets & left.keys()]
        assert free, f"circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_modules_start_nothing_when_imported():
    """No call that starts a process, thread or socket stands outside functions."""
    starters = {"Popen", "Process", "Thread", "Context", "socket", "set_default_device", "eval"}
    found = []
    for name, path in MODULES.items():
        for node in _outside_functions(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).rpartition(".")[2]
                if called in starters:
                    found.append(f"{name}:{node.lineno} {called}")
    assert not found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_resolve_to_this_checkout(package):
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin == str(ROOT / package / "__init__.py")


@pytest.mark.parametrize("name", LIGHT)
def test_the_agreement_loads_without_mlx_and_transformers(name):
    code = f"import sys, {name}; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stderr == ""
    assert result.stdout.strip() == "[]"
