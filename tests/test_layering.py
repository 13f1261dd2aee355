"""Packages and their rooms import each other along the allowed arrows only, never in a circle."""

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

# Which rooms of its own package a room may import. A file beside the rooms is a room of its own.
ROOMS = {
    "protocol.errors": set(),
    "protocol.hosts": set(),
    "protocol.messages": {"errors"},
    "protocol.transport": {"errors", "hosts", "messages"},
    "protocol.config": {"errors", "hosts"},
    "protocol.model": {"errors", "config", "messages"},
    "protocol.run_record": {"errors"},
    "actors.engine": set(),
    "actors.capacity": {"engine"},
    "actors.rewards": set(),
    "actors.bridge_messages": set(),
    "actors.policy_store": set(),
    "actors.actions": {"engine"},
    "actors.session": {"actions", "bridge_messages", "engine"},
    "actors.io": {"bridge_messages"},
    "actors.worker": {"actions", "bridge_messages", "engine", "policy_store", "session"},
    "learner.interfaces": {"losses"},
    "learner.full_disk": set(),
    "learner.records": {"full_disk"},
    "learner.checkpoint": set(),
    "learner.losses": set(),
    "learner.data": set(),
    "learner.model": set(),
    "learner.optim": {"model"},
    "learner.ledger": set(),
    "learner.online": {"data", "full_disk", "ledger"},
    "learner.objectives": {"interfaces", "losses", "data", "model", "online"},
    "learner.offline": {"interfaces", "losses", "data", "model", "objectives"},
    "learner.trainer": {"interfaces", "losses", "optim", "checkpoint", "records"},
    "learner.build": {
        "data", "model", "optim", "ledger", "online", "objectives", "offline", "trainer",
        "checkpoint", "records", "interfaces",
    },
    "launch.run_folder": set(),
    "launch.processes": {"run_folder"},
    "launch.pages": {"run_folder"},
    "launch.exporting": set(),
    "launch.cli": {"run_folder", "processes", "pages"},
    "launch.grpo": {"cli", "processes"},
    "launch.preference": {"cli"},
    "launch.sft": {"cli"},
    "launch.pairs": {"cli", "processes"},
    "launch.actor": {"processes"},
    "launch.reward_server": {"processes"},
    "launch.compare": {"processes", "pages", "run_folder"},
    "launch.export": {"processes", "exporting"},
    "launch.report": {"pages"},
    "launch.replay": {"processes"},
    "launch.staleness": set(),
    "launch.keys": set(),
    "launch.recipes": {"processes", "compare"},
}  # fmt: skip
LIGHT = (
    "protocol.messages.arrays",
    "protocol.messages.messages",
    "protocol.messages.wire",
    "protocol.transport.channel",
    "protocol.config.load",
    "protocol.config.settings",
    "protocol.run_record",
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


def room(name):
    """Name the room of a module: the folder or the file beside the folders."""
    return ".".join(name.split(".")[:2])


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


def arrows_between(group):
    """Map (importer's group, imported group) to the imports that make the arrow."""
    found = {}
    for name in MODULES:
        for other in imports(name):
            if group(name) != group(other):
                found.setdefault((group(name), group(other)), []).append(f"{name} -> {other}")
    return found


def layers(graph):
    """Return the nodes in layers, each of which imports earlier ones only; fail on a circle."""
    left, found = dict(graph), []
    while left:
        free = sorted(name for name, targets in left.items() if not targets & left.keys())
        assert free, f"circle among {sorted(left)}"
        found.append(free)
        for name in free:
            del left[name]
    return found


def test_packages_import_along_the_arrows_only(capsys):
    arrows = arrows_between(lambda name: name.split(".")[0])
    with capsys.disabled():
        drawn = ", ".join(f"{source} -> {target}" for source, target in sorted(arrows))
        print(f"\nlayering: {len(MODULES)} modules; {drawn}")
    wrong = {arrow: found for arrow, found in arrows.items() if arrow[1] not in ALLOWED[arrow[0]]}
    assert not wrong


def test_rooms_import_along_the_arrows_only():
    wrong = {}
    for (source, target), found in arrows_between(room).items():
        package, _, name = target.partition(".")
        if source.split(".")[0] != package or not name or source == package:
            continue
        if source not in ROOMS or name not in ROOMS[source]:
            wrong[source, target] = found
    assert not wrong


def test_the_table_of_rooms_is_that_of_the_tree():
    rooms = {room(name) for name in MODULES} - set(PACKAGES)
    assert rooms == ROOMS.keys()
    graph = {
        name: {f"{name.split('.')[0]}.{target}" for target in targets}
        for name, targets in ROOMS.items()
    }
    assert not {name: targets - ROOMS.keys() for name, targets in graph.items()
                if targets - ROOMS.keys()}  # fmt: skip
    layers(graph)


def test_every_room_says_what_it_is_for():
    folders = {path.parent for path in MODULES.values()}
    silent = [
        str(folder.relative_to(ROOT))
        for folder in folders
        if (folder / "__init__.py").exists()
        and not ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    ]
    assert not silent


def test_every_local_import_names_a_module():
    wrong = {name: sorted(imports(name) - MODULES.keys()) for name in MODULES}
    assert not {name: missing for name, missing in wrong.items() if missing}


def test_no_imports_go_in_circles():
    graph = {name: imports(name) & MODULES.keys() for name in MODULES}
    # Naming a module of a package runs the package's __init__ first.
    for name, targets in graph.items():
        parents = {target.rpartition(".")[0] for target in targets} & MODULES.keys()
        graph[name] = (targets | parents) - {name, name.rpartition(".")[0]}
    layers(graph)


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
