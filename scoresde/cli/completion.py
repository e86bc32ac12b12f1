"""Completion in a shell: what may stand at the cursor, as Hydra's own completion finds it.

`scoresde completion bash` prints what the shell has to read. At every TAB that runs this file alone, without the
package around it (Hydra is imported in a third of a second, PyTorch in several), with the line up to the cursor in
COMP_LINE; it prints the candidates for the last word, a line each, with a space behind those that are complete.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path, get_args
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.plugins.completion_plugin import DefaultCompletionPlugin

BASH = """
_scoresde_completion() {
    local line="${COMP_LINE:0:COMP_POINT}" candidate word
    COMPREPLY=()
    while IFS= read -r candidate; do
        printf -v word %q "${candidate% }"
        COMPREPLY+=("$word${candidate#"${candidate% }"}")
    done < <(COMP_LINE="$line" QUERY 2> /dev/null)
    word="${line##* }"
    if [[ "$COMP_WORDBREAKS" == *=* && "$word" == *=* ]]; then  # then bash replaces what follows the "="
        word="${word%"${word##*=}"}"
        COMPREPLY=("${COMPREPLY[@]#"$word"}")
    fi
}
complete -o default -o nospace -F _scoresde_completion scoresde
"""

ZSH = """
#compdef scoresde
_scoresde() {
    local -a candidates
    candidates=("${(@f)$(COMP_LINE="$LBUFFER" QUERY 2> /dev/null)}")
    candidates=(${candidates:#})
    (( $#candidates )) || { _default; return }
    compadd -S ' ' -- ${${(M)candidates:#* }% }
    compadd -S '' -- ${candidates:#* }
}
if [[ "$funcstack[1]" == _scoresde ]]; then  # from a folder of $fpath
    _scoresde "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
    compdef _scoresde scoresde
fi
"""

FISH = """
function __scoresde_completion
    set -lx COMP_LINE (commandline -cp)
    QUERY 2> /dev/null | string trim --right
end
complete --command scoresde --arguments '(__scoresde_completion)'
"""

HELP = """\
scoresde completion: the lines that make a shell complete verbs, groups, options, keys and runs at TAB.

In the shell that is open:

  eval "$(scoresde completion bash)"
  eval "$(scoresde completion zsh)"
  scoresde completion fish | source

For good, in the folder where the shell looks for such lines when it needs them (in zsh one of $fpath):

  scoresde completion bash > ~/.local/share/bash-completion/completions/scoresde
  scoresde completion zsh > ~/.zfunc/_scoresde
  scoresde completion fish > ~/.config/fish/completions/scoresde.fish"""

SHELLS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
BASE = "base"  # the configuration that is no verb's
RUN = "run="
FLAGS = ("--multirun ", "--json ", "--help ", "--cfg ", "--resolve ", "--config-dir ", "--package ", "--info ")


def script(shell: str, configs: Path) -> str:
    """What that shell has to read, for completion with these configurations."""
    query = shlex.join([sys.executable, "-P", str(Path(__file__).resolve()), str(configs)])
    return SHELLS[shell].strip().replace("QUERY", query)


def config_loader(configs: Path, further: str | None = None) -> ConfigLoader:
    """Hydra's loader of the configurations in a directory, and in a further one before it."""
    setup_globals()
    path = create_config_search_path(str(configs))
    if further is not None:
        path.prepend("command-line", f"file://{Path(further).absolute()}", SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(path)


def candidates(line: str, configs: Path) -> list[str]:
    """What the last word of a command line may become.

    Args:
        line: as typed, from the name of the program up to the cursor.
        configs: the directory of the configurations; each verb has one.
    """
    _, *words = line.split()
    word = "" if not words or line[-1].isspace() else words.pop()
    verbs = sorted(path.stem for path in configs.glob("*.yaml") if path.stem != BASE)
    if not words:
        found = [f"{verb} " for verb in (*verbs, "completion")]
    elif words == ["completion"]:
        found = [f"{shell} " for shell in SHELLS]
    elif words[0] not in verbs:
        found = []
    elif word.startswith("-"):
        found = list(FLAGS)
    elif word.startswith(RUN):
        typed = word.replace("\\", "")
        places = runs(Path(typed.removeprefix(RUN).rpartition("/")[0]))
        return [f"{named(run)} " for run in places if f"{RUN}{run}".startswith(typed)]
    else:
        found = overrides(words[0], words[1:], word, configs)
    return sorted(candidate for candidate in found if candidate.startswith(word))


def runs(folder: Path) -> list[Path]:
    """The runs in a folder, and in the usual one."""
    return sorted({path.parent for place in (folder, Path("runs")) for path in place.glob("*/config.yaml")})


def named(run: str | Path) -> str:
    """The override that names a run, as Hydra reads it; a shell may need quotes around it."""
    return f"{RUN}{literal(str(run))}"


def literal(text: str) -> str:
    """A text as the value of an override that Hydra reads as that text: as it is, or escaped, or in quotes."""
    escaped = re.sub(r"([\\\s,=:()\[\]{}])", r"\\\1", text)
    doubled = re.sub(r'(\\*)("|\Z)', lambda found: 2 * found[1] + ('\\"' if found[2] else ""), text)
    return next((form for form in (text, escaped) if is_read_as(form, text)), f'"{doubled}"')


def is_read_as(form: str, text: str) -> bool:
    """Whether Hydra reads a value as that text, by itself and in a list."""
    try:
        read = [OverridesParser.create().parse_override(f"key={value}").value() for value in (form, f"[{form}]")]
    except HydraException:
        return False
    return read == [text, [text]]


def overrides(verb: str, words: Sequence[str], word: str, configs: Path) -> list[str]:
    """What Hydra has for that word after these: groups, their options, keys, values."""
    before = [other for other in words if other != "--json"]
    loader = config_loader(configs, get_args(before).config_dir)
    found = DefaultCompletionPlugin(loader)._query(verb, " ".join([*before, word]))
    words = [candidate for candidate in found if not any(map(str.isspace, candidate)) and "???" not in candidate]
    whole = [f"{candidate} " for candidate in words if "=" in candidate[:-1]]
    return [*whole, *(candidate for candidate in words if candidate.endswith(("=", ".", "/")))]


def main() -> None:
    """Print the candidates for the line in COMP_LINE; none where the line cannot be read."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        try:
            found = candidates(os.environ["COMP_LINE"], Path(sys.argv[1]))
        except (Exception, SystemExit):  # half a word is no configuration
            found = []
    for candidate in found:
        print(candidate)


if __name__ == "__main__":
    main()
