"""One name, one thing: no two public classes of the package share a name, and no two of its modules do."""

import ast
from collections import defaultdict
from pathlib import Path

import scoresde
from scoresde import build

PACKAGE = Path(scoresde.__file__).parent
MODULES = [path for path in PACKAGE.rglob("*.py") if path.stem not in ("__init__", "__main__")]


def repeated(names):
    """The names that stand for more than one place."""
    places = defaultdict(set)
    for name, place in names:
        places[name].add(place)
    return {name: sorted(map(str, found)) for name, found in places.items() if len(found) > 1}


def test_public_classes_have_names_of_their_own():
    classes = (
        (node.name, path.relative_to(PACKAGE))
        for path in MODULES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not repeated(classes)


def test_modules_have_names_of_their_own():
    """Within the library; a verb of the command line may be named as the package that it calls."""
    library = [path for path in MODULES if path.parent.name != "cli"]
    assert not repeated((path.stem, path.relative_to(PACKAGE)) for path in library)


def test_targets_of_older_versions_are_those_of_classes_that_exist():
    for new in build.RENAMED.values():
        assert isinstance(build.pkgutil.resolve_name(new), type)
