"""Pages of the site that are made at build time from files outside of docs/ (hooks of mkdocs).

    CONTRIBUTING.md, CHANGELOG.md, benchmarks/RESULTS.md, examples/README.md    as they are
    notebooks/*.ipynb, examples/*.py                                            as Markdown (`notebook_pages`)
    conf/                                                a page for each group and verb (`config_pages`)
    the public modules of the package                    a page for each, with the directive of mkdocstrings

A page has the path of its file in the repository, without docs/. Links to files and folders of the repository become
links to their pages (`on_page_markdown`): ../conf/sampler leads to the configuration of samplers, ../scoresde/samplers
to their reference.
"""

import ast
import posixpath
import re
from pathlib import Path, PurePosixPath

from config_pages import config_pages, page_name, verb_page
from mathml import MathML
from mkdocs.structure.files import File
from notebook_pages import notebook_page

ROOT = Path(__file__).parent.parent.parent
COPIED = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md", "examples/README.md")
OTHER = {  # files and folders whose pages have other paths
    "README.md": "index.md",
    "conf": "configuration/index.md",
    "examples/README.md": "examples/results.md",  # README.md would be the first page of its section
}
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")


def page_of(path: str) -> str:
    """Return the path in the site of a file or folder of the repository: that of its page, or of the file itself."""
    if path in OTHER:
        return OTHER[path]
    for folder, page in (("conf", "configuration"), ("scoresde", "api")):
        if path.startswith(f"{folder}/"):
            return f"{page}/{page_name(path.removeprefix(f'{folder}/')).removesuffix('.py')}.md"
    return re.sub(r"\.(ipynb|py)$", ".md", path.removeprefix("docs/"))


def file_of(page: str) -> str:
    """Return the path in the repository of the file that a page of the site is made of."""
    stem = page.removesuffix(".md")
    other = [path for path, name in OTHER.items() if name == page]
    names = (f"docs/{page}", page, f"{stem}.ipynb", f"{stem}.py", *other)
    return next((name for name in names if (ROOT / name).is_file()), f"docs/{page}")


def public_modules() -> list[str]:
    """Return the names of the modules that `scoresde/__init__.py` imports from the package."""
    tree = ast.parse((ROOT / "scoresde" / "__init__.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "scoresde"]
    return [alias.name for node in imports for alias in node.names]


def hidden_functions(name: str) -> str:
    """Return the entries of public functions of a package that are named as their module, which hides them."""
    folder = ROOT / "scoresde" / name
    public = (folder / "__init__.py").read_text() if folder.is_dir() else ""
    hidden = [path.stem for path in folder.glob("*.py") if f'"{path.stem}",' in public]
    return "".join(f"\n[](){{#scoresde.{name}.{x}}}\n\n::: scoresde.{name}.{x}.{x}\n" for x in sorted(hidden))


def generated() -> dict[str, str | bytes | Path]:
    """Return the pages and pictures that are not in docs/, by their path in the site: content, or the file itself."""
    pages: dict[str, str | bytes | Path] = {page_of(path): ROOT / path for path in COPIED}
    for path in sorted(ROOT.glob("examples/figures/*.*")):
        pages[f"examples/figures/{path.name}"] = path
    for path in sorted(ROOT.glob("examples/*.py")):
        pages[f"examples/{path.stem}.md"] = f"# {path.stem}\n\n```python\n{path.read_text()}```\n"
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        pages |= notebook_page(path)
    for name in public_modules():
        options = "    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
        pages[f"api/{name}.md"] = f"# ss.{name}\n\n::: scoresde.{name}\n{options}{hidden_functions(name)}"
    pages["configuration/verbs.md"] = verb_page(ROOT / "conf")
    return pages | config_pages(ROOT / "conf")


def on_config(config):
    """Add the pages to the navigation, and the formulas to the extensions of Markdown."""
    config.markdown_extensions.append(MathML())
    names = sorted(name for name in generated() if name.endswith(".md"))
    first = {
        "configuration": ["configuration/index.md", "configuration/verbs.md"],
        "api": [{"ss": "api.md"}],
        "examples": ["gallery.md", "examples/results.md"],
        "notebooks": ["studies.md"],
    }
    entries = {
        f"${folder}": [*pages, *(name for name in names if name.startswith(f"{folder}/") and name not in pages)]
        for folder, pages in first.items()
    }
    for section in config.nav:
        for title, items in section.items():
            if isinstance(items, str):
                section[title] = entries.get(items, items)
            else:
                for item in items:
                    if isinstance(item, dict):
                        item.update({key: entries.get(value, value) for key, value in item.items()})
    return config


def on_files(files, config):
    """Add the pages that are not in docs/."""
    for name, content in generated().items():
        source = {"abs_src_path": str(content)} if isinstance(content, Path) else {"content": content}
        files.append(File.generated(config, name, **source))
    return files


def on_page_markdown(markdown, page, config, files):
    """Replace links to files of the repository by links to their pages."""
    here = page.file.src_uri
    folder = posixpath.dirname(file_of(here))

    def linked(match):
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        if not (ROOT / path).exists():
            return match[1]
        return posixpath.relpath(page_of(path), str(PurePosixPath(here).parent))

    return LINK.sub(linked, markdown)
