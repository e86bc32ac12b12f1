"""The pages of the configuration: one for each group of conf/ and one for all verbs, with the comments of the files.

The comment at the top of an option's file is its description. The rest of the file is shown with its comments.
"""

import re
from pathlib import Path

import yaml

GROUPS = {  # what an option of each group determines
    "data": "Datasets, their splits, and the transform from data to model space",
    "data/transform": "Transforms from data to model space",
    "experiment": "Complete trainings: data, network, path, loss, optimiser and trainer at once",
    "features": "Feature spaces in which `evaluate` and `compare` measure the quality of samples",
    "guidance": "Guided models",
    "likelihood": "How log p(x) is computed: trace, solver, dequantised samples, start",
    "loss": "Objectives of a training",
    "network": "Networks",
    "operator": "Measurements that `restore` inverts",
    "optimizer": "Optimisers",
    "posterior": "Methods that `restore` samples the posterior with",
    "prediction": "What a network predicts, and how its input is scaled",
    "sampler": "Samplers",
    "sde": "Paths from data to noise",
    "text": "How captions become conditions",
    "trainer": "Arguments of the trainer",
    "verbs/distill/method": "What `distill` learns from a run",
}
NOT_SHOWN = re.compile(r"^# @package _global_\n|^  - override hydra/.*\n", re.MULTILINE)
PUBLIC = (
    "bounds convert data editing flowmaps guidance inverse losses networks pipelines predictions samplers solvers text"
)
OF_PACKAGE = ("sdes", "training", "dequantization", "divergence")  # modules whose classes are names of `scoresde`


def config_pages(conf: Path) -> dict[str, str]:
    """Return a page for each group, by its path in the site, and the page that lists them."""
    folders = sorted({path.parent for path in conf.rglob("*.yaml")} - {conf})
    groups = {str(folder.relative_to(conf)): sorted(folder.glob("*.yaml")) for folder in folders}
    pages = {f"configuration/{page_name(group)}.md": group_page(group, options) for group, options in groups.items()}
    rows = [
        f"| [`{group.removeprefix('verbs/distill/')}`]({page_name(group)}.md) | {GROUPS[group]} | {len(options)} |"
        for group, options in groups.items()
    ]
    text = (
        "# Configuration\n\nA command chooses one option of a group, `sampler=dpmpp2`, and sets its keys, "
        "`sampler.steps=10`. These pages show the files of `conf/` with their comments. "
        "[Verbs](verbs.md) lists the settings of each command; `scoresde VERB --help` prints the same.\n\n"
        "| group | what it sets | options |\n| --- | --- | --- |\n"
    )
    return {"configuration/index.md": text + "\n".join(rows) + "\n", **pages}


def page_name(group: str) -> str:
    """Return the name of the page of a group: data/transform is data_transform."""
    return group.removeprefix("verbs/").replace("/", "_")


def group_page(group: str, options: list[Path]) -> str:
    """Return the page of a group: a section for each option."""
    title = {"verbs/distill/method": "method of distill"}.get(group, group)
    sections = [option_section(path) for path in options]
    return "\n\n".join([f"# {title}", f"{GROUPS[group]}.", *sections]) + "\n"


def option_section(path: Path) -> str:
    """Return the section of an option: the comment at the top of its file, the class it builds, and the file."""
    lines = NOT_SHOWN.sub("", path.read_text()).splitlines()
    start = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    comment = " ".join(line.removeprefix("#").strip() for line in lines[:start])
    target = re.search(r"^_target_: (\S+)", "\n".join(lines), re.MULTILINE)
    built = [f"Builds {link(target[1])}."] if target else []
    return "\n\n".join([f"## {path.stem}", escaped(comment), *built, "```yaml\n" + "\n".join(lines[start:]) + "\n```"])


def escaped(comment: str) -> str:
    """Return a comment as text of Markdown: `<run>/figures` and key=[a,b] are code."""
    return re.sub(r"(?<!`)(\S*(?:<\w+>|\w=\S)\S*?)(?=[.,;:)]*(?:\s|$))", r"`\1`", comment)


def link(target: str) -> str:
    """Return the name of a class, as a link to its documentation if it is public."""
    module, _, name = target.removeprefix("scoresde.").rpartition(".")
    if module in PUBLIC.split():
        return f"[`ss.{module}.{name}`][{target}]"
    if module in OF_PACKAGE:
        return f"[`ss.{name}`][scoresde.{name}]"
    return f"`{target}`"


def verb_page(conf: Path) -> str:
    """Return the page of the verbs: help, examples and settings of each."""
    sections = ["# Verbs", "Settings of every verb:", block(conf / "base.yaml")]
    for path in sorted(conf.glob("*.yaml")):
        if path.stem != "base":
            text, _, examples = yaml.safe_load(path.read_text())["hydra"]["help"]["header"].partition("\n\n")
            description = text.replace("\n", " ").removeprefix(f"scoresde {path.stem}: ").replace("<", "\\<")
            examples = re.sub(r"^  ", "", examples, flags=re.MULTILINE)
            sections += [
                f"## {path.stem}",
                description[0].upper() + description[1:],
                f"```sh\n{examples}\n```",
                block(path),
            ]
    return "\n\n".join(sections) + "\n"


def block(path: Path) -> str:
    """Return a configuration of a verb without its help and the settings of Hydra's logging."""
    shown = re.sub(r"^hydra:\n(?:[ \t].*\n|\n)*", "", NOT_SHOWN.sub("", path.read_text()), flags=re.MULTILINE)
    return f"```yaml\n{shown.strip()}\n```"
