"""Who may import whom. The rules are those of CONTRIBUTING.md; each is one test over the files' import statements."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACK = ("nodes", "ovi_model", "server")
FAMILIES = ("ovi",)
SHARED = ("files", "text", "media", "sampling")  # whatever family a model is of
STANDARD_LIBRARY_ONLY = ("ovi_model/geometry.py", "ovi_model/files/names.py", "ovi_model/files/disk.py",
                         "ovi_model/files/catalogue.py", "ovi_model/files/strict_json.py",
                         "ovi_model/files/safetensors_header.py", "ovi_model/ovi/variants.py",
                         "ovi_model/ovi/catalogue.py")


def files(*folders: str) -> list[Path]:
    found = sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert found, f"there is nothing in {folders}"
    return found


def imports(file: Path) -> Iterator[tuple[str, ...]]:
    """What a file imports, anywhere in it: a path from the pack's root for its own modules, else the module's parts."""
    package = file.parts[:-1]
    for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (tuple(name.name.split(".")) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            start = ("ovi_native", *package[:len(package) - node.level + 1], *module) if node.level else module
            yield from ((*start, name.name) for name in node.names)


def own(file: Path) -> set[tuple[str, ...]]:
    """The pack's own modules that a file imports, as paths from its root."""
    return {parts[1:] for parts in imports(file) if parts[0] == "ovi_native"}


def test_the_reader_of_imports_sees_them():
    assert ("ovi_model", "geometry", "GEOMETRY") not in own(Path("ovi_model/geometry.py"))
    assert any(parts[:2] == ("ovi_model", "ovi") for parts in own(Path("nodes/sampling.py")))
    assert any(parts[0] == "comfy" for parts in imports(Path("ovi_model/ovi/model.py")))


def test_the_model_knows_neither_nodes_nor_server():
    assert not [(file, parts) for file in files("ovi_model") for parts in own(file) if parts[0] in ("nodes", "server")]


def test_the_model_knows_no_training():
    """Training imports the model, never the reverse."""
    others = [f"ovi_model/{folder}" for folder in (*SHARED, *FAMILIES)]
    assert not [(file, parts) for file in files(*others) for parts in own(file)
                if parts[:2] == ("ovi_model", "training")]


def test_the_product_knows_no_toy_world():
    assert not [(file, parts) for file in files(*PACK) for parts in own(file) if parts[0] == "tiny_world"]


def test_the_server_knows_no_nodes():
    assert not [(file, parts) for file in files("server") for parts in own(file) if parts[0] == "nodes"]


def test_what_every_family_shares_names_none():
    shared = [f"ovi_model/{folder}" for folder in SHARED]
    assert not [(file, parts) for file in files(*shared) for parts in own(file)
                if parts[0] == "ovi_model" and parts[1] in FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_do_not_know_each_other(family):
    others = set(FAMILIES) - {family}
    assert not [(file, parts) for file in files(f"ovi_model/{family}") for parts in own(file) if parts[1] in others]


@pytest.mark.parametrize("file", STANDARD_LIBRARY_ONLY)
def test_tables_and_arithmetic_need_the_standard_library_only(file):
    foreign = {parts for parts in imports(Path(file)) if parts[0] != "ovi_native"
               and parts[0] not in sys.stdlib_module_names}
    assert not foreign
    stays = {f"ovi_model/{'/'.join(parts[1:-1])}.py" for parts in own(Path(file))}
    assert stays <= set(STANDARD_LIBRARY_ONLY), f"{file} imports {stays}"


def test_the_small_world_needs_numpy_only():
    """Its detectors judge what the model makes, so they share nothing with it."""
    allowed = {"numpy", "ovi_native", *sys.stdlib_module_names}
    assert not [(file, parts) for file in files("tiny_world") for parts in imports(file) if parts[0] not in allowed]
    assert not [(file, parts) for file in files("tiny_world") for parts in own(file) if parts[0] != "tiny_world"]


def test_inside_the_pack_imports_are_relative():
    """The folder may be called anything."""
    absolute = [(file, parts) for file in files(*PACK) for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8")))
                if isinstance(node, ast.ImportFrom) and not node.level and node.module
                for parts in [node.module.split(".")] if parts[0] in ("ovi_native", "ovi_model", "devlib", "helpers")]
    assert not absolute


def test_no_module_imports_itself_in_a_circle():
    graph = {file: {Path(*parts[:n]).with_suffix(".py") for parts in own(file) for n in (len(parts) - 1, len(parts))}
             for file in files("ovi_model", "nodes", "server")}
    done: set[Path] = set()

    def visit(file: Path, above: tuple[Path, ...]) -> None:
        assert file not in above, f"a circle: {' -> '.join(map(str, (*above, file)))}"
        if file in done or file not in graph:
            return
        for other in graph[file]:
            visit(other, (*above, file))
        done.add(file)

    for file in graph:
        visit(file, ())


def test_benchmarks_import_no_tests():
    tests = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"support"}
    assert not [(file, parts) for file in files("benchmarks") for parts in imports(file) if parts[0] in tests]


def test_tests_import_no_other_test():
    """What they share is in support."""
    assert not [(file, parts) for file in files("tests") for parts in imports(file) if parts[0].startswith("test_")]


def test_lines_are_short_where_they_have_been_brought_to_it():
    """At most 100 columns; elsewhere ruff's 120 holds."""
    short = files("ovi_model/sampling", "ovi_model/training")
    long = [(file, number) for file in short
            for number, line in enumerate((ROOT / file).read_text("utf-8").splitlines(), 1) if len(line) > 100]
    assert not long


def test_the_network_makes_no_connection_at_import():
    """Only a download the user asked for does; the library for it is imported there."""
    network = {"huggingface_hub", "requests", "httpx", "urllib3"}
    top = [(file, name) for file in files(*PACK) for node in ast.parse((ROOT / file).read_text("utf-8")).body
           if isinstance(node, ast.Import | ast.ImportFrom)
           for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
           if name and name.split(".")[0] in network]
    assert not top
