"""convert.py reads from top to bottom: the story first, then its rooms, and calls go down the file only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from helpers import CONVERT

TEXT = CONVERT.read_text(encoding="utf-8")
TREE = ast.parse(TEXT)
BANNER = re.compile(r"^# -{100,}\n# (?P<title>[^\n]+)\n(?:#[^\n]*\n)*?# -{100,}$", re.MULTILINE)
# Rooms that every other may use: types and messages.
GROUND = ("types, errors and the log",)


def rooms() -> list[tuple[int, str]]:
    """The line and the title of every room's banner, in the order of the file."""
    return [(TEXT[: match.start()].count("\n") + 1, match["title"]) for match in BANNER.finditer(TEXT)]


def room_of(line: int) -> int:
    """The index of the room that a line lies in; -1 above the first."""
    return max((index for index, (start, _) in enumerate(rooms()) if start <= line), default=-1)


Definition = ast.FunctionDef | ast.ClassDef
DEFINITIONS = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def bound_in(node: ast.AST) -> set[str]:
    """The names that something binds for itself: arguments, variables, imports and inner functions."""
    names = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.arg):
            names.add(inner.arg)
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            names.add(inner.id)
        elif isinstance(inner, ast.FunctionDef | ast.ClassDef) and inner is not node:
            names.add(inner.name)
        elif isinstance(inner, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in inner.names}
    return names


def uses(node: Definition) -> Iterator[Definition]:
    """The functions and classes of the file that a definition refers to; a base class is not called."""
    bases = {base.id for base in node.bases if isinstance(base, ast.Name)} if isinstance(node, ast.ClassDef) else set()
    names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load)}
    yield from (DEFINITIONS[name] for name in sorted(names - bound_in(node) - bases) if name in DEFINITIONS)


def test_the_rooms() -> None:
    """The file has rooms, the story is the first after the ground, and each has a title of its own."""
    titles = [title for _, title in rooms()]
    assert len(titles) == len(set(titles)) > 15
    assert titles[0].startswith(GROUND)
    assert titles[1].startswith("the story")
    story = [name for name, node in DEFINITIONS.items() if room_of(node.lineno) == 1]
    assert story[:3] == ["main", "work", "convert"]
    assert {"convert_pytorch_model", "convert_huggingface_model", "convert_state_dict_model", "produce"} <= {*story}


def test_calls_go_down() -> None:
    """Nothing refers to a definition in a room above its own: so no two rooms depend on each other."""
    where = {name: room_of(node.lineno) for name, node in DEFINITIONS.items()}
    ground = [-1, *(index for index, (_, title) in enumerate(rooms()) if title.startswith(GROUND))]
    up = [
        f"{name} -> {other.name}"
        for name, node in DEFINITIONS.items()
        for other in uses(node)
        if where[other.name] < where[name] and where[other.name] not in ground
    ]
    assert not up
    assert [name for name, room in where.items() if room < 0] == ["Lazy"]


def test_docstring_lists_the_rooms() -> None:
    """The map at the top names every room below the story, in their order."""
    block = re.findall(r"^    (\S.+)$", ast.get_docstring(TREE) or "", re.MULTILINE)
    listed = re.split(r" - | -$", " ".join(block))
    assert listed == [re.split(r"[:,] ", title)[0] for _, title in rooms()[2:]]


def test_each_name_is_given_once() -> None:
    """In one file a second constant of a name would silently replace the first for every room."""
    names = []
    for node in TREE.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    assert sorted(names) == sorted(set(names))
