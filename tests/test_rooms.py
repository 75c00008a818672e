"""The plan of the library: rooms in order, imports from later ones to earlier ones only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["", "model", "data", "engine", "evals", "training", "serve", "report"]  # "": the files at the top of nanochat/
MAX_LINES = 450
MIN_LINES = 60
SHORT_FILES = {  # with the reason
    "load.py": "joins model and checkpoint, neither of which may know the other",
    "transfer.py": "serves the engine and scoring",
}
LIBRARY = sorted((ROOT / "nanochat").rglob("*.py"))


def room_of(path: Path) -> str:
    parent = path.relative_to(ROOT / "nanochat").parent.as_posix()
    return "" if parent == "." else parent


def imports_of(path: Path, package: str) -> list[str]:
    """Dotted names below `package` that a file imports, also inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name.removeprefix(f"{package}.") for name in names if name.startswith(f"{package}.")]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_room_imports_only_from_itself_and_earlier_ones(path):
    own = room_of(path)
    assert own in ROOMS
    for name in imports_of(path, "nanochat"):
        first = name.split(".")[0]
        imported = first if first in ROOMS else ""
        assert ROOMS.index(imported) <= ROOMS.index(own), f"{path.name} imports nanochat.{name}"
    assert not imports_of(path, "tasks")
    assert not imports_of(path, "scripts")


def test_no_two_files_of_the_library_import_each_other():
    modules = {".".join(path.relative_to(ROOT / "nanochat").with_suffix("").parts): path for path in LIBRARY}
    edges = {
        name: {m for i in imports_of(path, "nanochat") for m in modules if i == m or i.startswith(f"{m}.")} - {name}
        for name, path in modules.items()
    }
    while free := {name for name, used in edges.items() if not used & edges.keys()}:
        edges = {name: used for name, used in edges.items() if name not in free}
    assert not edges, f"these import each other: {sorted(edges)}"


def test_tasks_and_scripts_import_no_script():
    for path in [*(ROOT / "tasks").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        assert not imports_of(path, "scripts"), path.name


@pytest.mark.parametrize("room", ROOMS[1:])
def test_a_room_has_a_few_files_and_says_what_is_in_it(room):
    files = list((ROOT / "nanochat" / room).glob("[!_]*.py"))
    assert len(files) >= 3
    docstring = ast.get_docstring(ast.parse((ROOT / "nanochat" / room / "__init__.py").read_text()))
    assert "Begin with" in docstring
    assert "Not here:" in docstring
    for file in files:
        assert f"`{file.name}`" in docstring, f"nanochat/{room}/__init__.py does not say what {file.name} is"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_is_neither_long_nor_a_splinter(path):
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_LINES
    if path.name != "__init__.py" and path.name not in SHORT_FILES:
        assert num_lines >= MIN_LINES
