"""Completion in bash, zsh and fish, by Hydra's own completion.

`scoresde completion SHELL` prints Hydra's completion script for that shell. At every TAB the script runs this file
alone, without the rest of the package: importing Hydra takes 0.3 s, PyTorch several seconds. COMP_LINE has the command
line up to the cursor. This file completes verbs (subcommands of `scoresde`), options and runs. Hydra completes the
config groups, keys and values of a verb.
"""

import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import hydra

SHELLS = ("bash", "zsh", "fish")
OPTIONS = ("--cfg", "--config-dir", "--help", "--info", "--json", "--multirun", "--package", "--resolve")
BASE = "base"  # the configuration that all verbs include


def own_groups(configs: Path, verb: str) -> list[Path]:
    """Return the directory of the config groups that only this verb has, in a list; [] if there are none."""
    return [path for path in [configs / "verbs" / verb] if path.is_dir()]


def run_hydra(configs: Path, verb: str, arguments: Sequence[str], job: Callable[..., Any]) -> None:
    """Run the Hydra application of a verb with these arguments; raise its errors instead of printing them."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    search = [f'hydra.searchpath=["file://{path}"]' for path in own_groups(configs, verb)]
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["scoresde", *arguments, *search], "1"
    try:
        hydra.main(version_base="1.3", config_path=str(configs), config_name=verb)(job)()
    finally:
        sys.argv = argv
        del os.environ["HYDRA_FULL_ERROR"]
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def ask_hydra(configs: Path, verb: str, *request: str) -> str:
    """Return the text that Hydra prints for `--shell-completion`, followed by `request`."""
    with redirect_stdout(io.StringIO()) as output:
        run_hydra(configs, verb, ["--shell-completion", *request], print)
    return output.getvalue()


def script(shell: str, configs: Path) -> str:
    """Return Hydra's completion script for a shell, changed to run this file instead of `scoresde`."""
    lines = ask_hydra(configs, BASE, f"install={'fish' if shell == 'fish' else 'bash'}")
    query = shlex.join([sys.executable, "-P", str(Path(__file__).resolve()), str(configs)])
    compatible = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n" if shell == "zsh" else ""
    return compatible + re.sub(r"\$(helper|cmd)(?= -sc)", lambda _: query, lines)


def candidates(line: str, configs: Path) -> list[str]:
    """Return the completions of the last word of a command line.

    Args:
        line: the command line from the name of the program to the cursor.
        configs: the directory of the configurations, one file for each verb.
    """
    words = line.split()[1:]
    last = words.pop() if words and not line[-1].isspace() else ""
    verbs = [path.stem for path in configs.glob("*.yaml") if path.stem != BASE]
    if not words:
        matches: Sequence[str] = [*verbs, "completion"]
    elif words == ["completion"]:
        matches = SHELLS
    elif words[0] not in verbs:
        matches = []
    elif last.startswith("-"):
        matches = OPTIONS
    elif last.startswith("run="):
        folder = Path(last.removeprefix("run=").rpartition("/")[0])
        matches = [f"run={run}" for run in runs(folder) if re.fullmatch(r"[\w./=,+-]+", str(run))]
    else:
        os.environ["COMP_LINE"] = " ".join(["scoresde", *(word for word in words[1:] if word != "--json"), last])
        directory = re.findall(r"--config-dir[= ](\S+)", line)[-1:]
        answer = ask_hydra(configs, words[0], "query=fish", *(f"--config-dir={path}" for path in directory))
        matches = [match for match in answer.splitlines() if " " not in match]
    return sorted(match for match in matches if match.startswith(last))


def runs(folder: Path) -> list[Path]:
    """Return the run directories in `folder`, and those in the directory `runs`."""
    return sorted({path.parent for place in (folder, Path("runs")) for path in place.glob("*/config.yaml")})


def main() -> None:
    """Print the completions of COMP_LINE, one per line; none if Hydra cannot compose the words before the cursor."""
    with open(os.devnull, "w") as null, redirect_stderr(null), suppress(Exception, SystemExit):
        print("\n".join(candidates(os.environ["COMP_LINE"], Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
