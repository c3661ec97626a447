"""The package's own structure: what imports what, and what an import loads."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import jaxreg

PACKAGE = Path(jaxreg.__file__).parent
# Imports go from a later layer to an earlier one, or stay within a folder.
LAYERS = [
    ["_check", "_tree", "_address", "where", "groups", "_roots", "norms"],
    ["penalties", "noise", "mnist1d"],
    ["losses", "optimality", "data"],
    ["splits"],
    ["transforms"],
    ["optimizers", "diagnostics", "explanation", "compat"],
    ["models", "recipes", "compression"],
    ["training"],
    ["comparison"],
    ["plot"],
    ["_notes"],
    ["report", "_folder", "_progress"],
    ["cli"],
    ["__main__"],
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def top_level_name(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "jaxreg":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {parts[1] for parts in names if parts[0] == "jaxreg" and len(parts) > 1}
    return found


MODULES = [
    p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "__init__.py" or p.parent != PACKAGE
]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    own = top_level_name(path)
    for name in imported_parts(path) - {"__version__"}:
        assert name in LAYER, f"{path.name} imports {name}, which has no layer"
        both_at_the_bottom = LAYER[name] == LAYER[own] == 0
        assert name == own or LAYER[name] < LAYER[own] or both_at_the_bottom, (own, name)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_is_long(path):
    assert len(path.read_text().splitlines()) <= 400


def modules_after(code: str) -> set[str]:
    script = f"import sys; {code}; print(*(name.partition('.')[0] for name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_loads_no_dependency():
    loaded = modules_after("import jaxreg")
    assert "jaxreg" in loaded
    assert not loaded & {"jax", "optax", "numpy", "flax", "matplotlib", "sklearn", "rich"}


def test_using_every_public_name_loads_no_optional_dependency():
    loaded = modules_after("import jaxreg; [getattr(jaxreg, name) for name in jaxreg.__all__]")
    assert {"jax", "optax"} <= loaded
    assert not loaded & {"flax", "matplotlib", "sklearn", "rich", "jinja2"}


def test_public_names_are_all_there_and_seen_by_editors_and_type_checkers():
    assert set(dir(jaxreg)) == set(jaxreg.__all__)
    source = ast.parse((PACKAGE / "__init__.py").read_text())
    guarded = next(node for node in source.body if isinstance(node, ast.If))
    names = {a.asname for n in guarded.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert names == set(jaxreg.__all__) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'jaxreg' has no attribute 'Lasso'"):
        _ = jaxreg.Lasso


def test_public_objects_have_docstrings_with_an_example():
    for name in set(jaxreg.__all__) - {"__version__", "Penalty"}:
        doc = getattr(jaxreg, name).__doc__
        assert doc, name
        if name not in ("groups", "metric", "where"):  # modules, whose functions have their own
            assert ">>>" in doc, name


def test_the_readme_has_the_current_table_of_penalties():
    readme = PACKAGE.parent / "README.md"
    spec = importlib.util.spec_from_file_location("reference", PACKAGE.parent / "docs/reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    text = readme.read_text()
    assert reference.with_table(text) == text, "run python docs/reference.py"
    for name in ("L1", "GroupLasso", "SortedL1", "Affine"):
        assert f"| `{name}(" in text
