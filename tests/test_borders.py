"""The borders of the house: no import runs upward, no circle, no class name twice, no coy names."""

import ast
from collections import defaultdict
from pathlib import Path

SRC = Path(__file__).resolve().parents[1] / "src" / "qzoom"

FLOORS = (
    ("errors",),
    ("settings", "keys"),
    ("types",),
    ("config",),
    ("cluster",),
    ("images",),
    ("store", "llm"),
    ("scoring",),
    ("backbones",),
    ("heads",),
    ("engine",),
    ("checkpoints",),
    ("model",),
    ("plots",),
    ("data",),
    ("labels",),
    ("evaluation",),
    ("training", "distill"),
    ("integrations",),
    ("serving",),
    ("cli",),
    ("__main__",),
)
"""Rooms from the lowest to the highest. A room imports from lower floors and from itself only."""

ALLOWED = {
    ("types", "plots"): "Answer.plot and Answer.save draw; a deferred import",
    ("types", "images"): "pictures of an answer; annotations only",
}
"""Arrows that run upward or sideways, with the reason."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without `qzoom.`."""
    found = {}
    for path in SRC.rglob("*.py"):
        parts = list(path.relative_to(SRC).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if parts:
            found[".".join(parts)] = path
    return found


def imports(path: Path, names: dict[str, Path], *, typing_too: bool = True) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    targets: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set() if typing_too else _only_for_types(tree)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qzoom":
            base = node.module.partition(".")[2]
            for alias in node.names:
                longer = f"{base}.{alias.name}".lstrip(".")
                targets.add(longer if longer in names else base)
        elif isinstance(node, ast.Import):
            targets |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("qzoom.")}
    return {target for target in targets if target}


def _only_for_types(tree: ast.Module) -> set[ast.AST]:
    guards = (n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")
    return {inner for guard in guards for inner in ast.walk(guard)}


def test_no_import_runs_upward():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    names = modules()
    assert {name.split(".")[0] for name in names} <= set(floor)
    wrong = set()
    for name, path in names.items():
        room = name.split(".")[0]
        for target in imports(path, names):
            there = target.split(".")[0]
            if there != room and floor[there] >= floor[room] and (room, there) not in ALLOWED:
                wrong.add(f"{name} imports {target}")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_import_circle():
    names = modules()
    graph = {name: imports(path, names, typing_too=False) & set(names) for name, path in names.items()}
    state: dict[str, int] = {}
    circles = []

    def visit(name: str, trail: list[str]) -> None:
        state[name] = 1
        for target in sorted(graph[name] - {name}):
            if state.get(target) == 1:
                circles.append(" -> ".join([*trail[trail.index(target) :], target]))
            elif target not in state:
                visit(target, [*trail, target])
        state[name] = 2

    for name in sorted(graph):
        if name not in state:
            visit(name, [name])
    allowed = [circle for circle in circles if "types" in circle.split(" -> ") and "plots" in circle]
    assert not set(circles) - set(allowed), "\n".join(circles)


def test_no_class_name_occurs_twice():
    places = defaultdict(list)
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice
