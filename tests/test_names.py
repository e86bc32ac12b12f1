"""No two public classes of the package, and no two modules, have the same name."""

import ast
import pkgutil
from collections import defaultdict
from pathlib import Path

import scoresde
from scoresde import run_config

PACKAGE = Path(scoresde.__file__).parent
MODULES = [path for path in PACKAGE.rglob("*.py") if path.stem not in ("__init__", "__main__")]


def repeated(names):
    """Names with more than one place."""
    places = defaultdict(set)
    for name, place in names:
        places[name].add(place)
    return {name: sorted(map(str, where)) for name, where in places.items() if len(where) > 1}


def test_public_classes_have_unique_names():
    classes = (
        (node.name, path.relative_to(PACKAGE))
        for path in MODULES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not repeated(classes)


def test_modules_have_unique_names():
    """Within the library; a command may have the name of the package that it calls."""
    library = [path for path in MODULES if path.parent.name != "cli"]
    assert not repeated((path.stem, path.relative_to(PACKAGE)) for path in library)


def test_renamed_targets_are_classes_that_exist():
    for new in run_config.RENAMED.values():
        assert isinstance(pkgutil.resolve_name(new), type)
