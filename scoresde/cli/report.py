"""`scoresde report`, which writes a report on a run as an HTML page."""

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scoresde import build, run_config
from scoresde.cli.common import check_run, data_of
from scoresde.cli.output import Record, print_rows
from scoresde.cli.overrides import literal
from scoresde.report import FilmSettings, Source, write_report


def report(config: DictConfig) -> Record:
    """Write a report on a run as one HTML page: results, and the commands that reproduce them."""
    path = check_run(config.run)
    trained = run_config.read_config(path)
    refuse_resolvers(trained, path)
    plain = run_config.plain(trained)
    film = FilmSettings(config.film_samples, config.film_steps, config.film_frames, config.seed)
    trust = [f"trust=[{','.join(map(literal, config.trust))}]"] if config.trust else []
    source = Source(
        path=path,
        config=plain,
        config_text=OmegaConf.to_yaml(OmegaConf.create(plain)),
        run=model_of(path, config),
        data=lambda split: data_of(trained, split, config.trust),
        overrides=[f"run={literal(str(path))}", *trust],
        train=run_config.read_command(path),
        film=film if config.film else None,
        device=config.device,
    )
    page = write_report(source, None if config.out is None else Path(config.out))
    print_rows({"report": page, "size": f"{page.stat().st_size / 1e6:.1f} MB"})
    return {"run": path, "rows": [], "paths": {"report": page}}


def model_of(path: Path, config: DictConfig) -> build.Run | str:
    """Return the loaded run, or a message if it has no checkpoint yet."""
    try:
        return build.load(path, config.weights, config.trust, config.device)
    except FileNotFoundError as error:
        return str(error)


def refuse_resolvers(config: DictConfig, path: Path) -> None:
    """Refuse resolvers, such as ${oc.env:...}: the page, which others read, would show an environment variable.

    Raises:
        ValueError: the configuration has a resolver.
    """
    unresolved: Any = OmegaConf.to_container(config, resolve=False)
    for key, value in run_config.flatten(unresolved).items():
        if re.search(r"\$\{[^}]*(:|\$\{)", str(value)):
            raise ValueError(
                f"{path / run_config.CONFIG} must have no resolver; got {key}: {value}. The page would show a value "
                "that depends on this machine: write the value itself in the file"
            )
