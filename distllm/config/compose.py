"""Turns overrides into a Config: YAML of `conf/` over the dataclasses' defaults, then what the user typed.

Hydra composes the files; single settings are then applied one by one, so that every wrong one is reported, together.
Only Hydra's compose API is used: no working directory is changed and nothing is written.
"""

import copy
import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distllm.config import checks, overrides
from distllm.config.fields import field_type, is_mapping
from distllm.config.files import CHOOSABLE, GROUPS, conf_dir, options_in
from distllm.config.overrides import Override, raise_all
from distllm.config.schema import Config, Leaf, leaves, options_of
from distllm.errors import ConfigError
from distllm.registry import unknown_name


def compose(
    arguments: Iterable[str] = (), *, check: bool = True, also_known: Iterable[str] = ()
) -> Config:
    """Build the config from `key=value` overrides.

    Args:
        arguments: as on the command line.
        check: also check each value and their combinations.
        also_known: the verb's own keys, for suggestions.

    Raises:
        ConfigError: a key, an option, a type or a value is wrong; one error holds all problems.
    """
    typed = overrides.parse(arguments)
    choices = {o.key: o.text for o in typed if o.key in CHOOSABLE}
    settings = [o for o in typed if o.key not in CHOOSABLE]
    unknown = {g: o for g, o in choices.items() if o not in options_in(g)}
    problems = [unknown_name(g, o, options_in(g)) for g, o in unknown.items()]
    # Settings of a group whose option is unknown cannot be judged; the others can.
    composed = _compose_files(
        conf_dir(), tuple((g, o) for g, o in choices.items() if g not in unknown)
    )
    composed = copy.deepcopy(composed)
    judged = [o for o in settings if o.key.partition(".")[0] not in unknown]
    problems += _apply(composed, judged, also_known)
    raise_all(problems)
    config = _to_dataclass(composed)
    if not config.run.dir:
        config = replace(config, run=replace(config.run, dir=default_run_dir(config)))
    if check:
        checks.check(config)
    return config


def default_run_dir(config: Config) -> str:
    """Name a new run directory after the pipeline or the stage, and the time."""
    chained = config.pipeline.name != "none"
    what = config.pipeline.name if chained else config.stage.name
    return f"runs/{what}-{time.strftime('%Y%m%d-%H%M%S')}"


def known_keys(config: Config) -> list[str]:
    """List everything that can stand before `=`: settings and groups."""
    return [leaf.key for leaf in leaves(config)] + list(CHOOSABLE)


def read_files(choices: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return (file below conf/, package) in the order in which their values are laid over each other."""
    with _hydra():
        loader = GlobalHydra.instance().config_loader()
        chosen = [f"{group}={option}" for group, option in choices.items()]
        plan = loader.compute_defaults_list("config", chosen, RunMode.RUN)
    return [
        (d.config_path, d.package or "")
        for d in plan.defaults
        if d.config_path and not d.config_path.startswith("hydra/")
    ]


@functools.cache
def _compose_files(folder: Path, choices: tuple[tuple[str, str], ...]) -> DictConfig:
    """Lay the files of the chosen options over each other; a pipeline asks for the same ones again and again."""
    chosen = [f"{group}={option}" for group, option in choices]
    try:
        with _hydra():
            composed = hydra.compose("config", chosen)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(
            f"The files in {folder} do not compose ({' '.join(chosen)}): {error}"
        ) from None
    OmegaConf.set_struct(
        composed, False
    )  # dataclass nodes stay strict; maps of names to values open up
    return composed


def _apply(
    composed: DictConfig, settings: Sequence[Override], also_known: Iterable[str]
) -> list[str]:
    """Write `settings` into `composed`; return what is wrong with them."""
    before = _to_dataclass(composed)
    by_key = {leaf.key: leaf for leaf in leaves(before)}
    known = [*known_keys(before), *also_known]
    problems = []
    for override in settings:
        group, _, name = override.key.partition(".")
        if name == "name" and group in GROUPS:
            problems.append(
                f"{override.key}={override.text}: the option of a group is chosen by {group}={override.text}."
            )
            continue
        leaf = _leaf_for(override.key, by_key)
        if leaf is None:
            problems.append(overrides.unknown_key(override.key, known, _elsewhere(override.key)))
            continue
        hint = field_type(leaf.owner, leaf.key.rpartition(".")[2])
        try:
            inside_mapping = leaf.key != override.key
            value = overrides.value_of(override, None if inside_mapping else hint, leaf.value)
            OmegaConf.update(composed, override.key, value)
        except ConfigError as error:
            problems.append(str(error))
        except OmegaConfBaseException:
            problems.append(overrides.wrong_type(override, hint, leaf.value))
    return problems


def _leaf_for(key: str, by_key: Mapping[str, Leaf]) -> Leaf | None:
    if key in by_key:
        return by_key[key]
    parent = by_key.get(key.rpartition(".")[0])
    if parent and is_mapping(field_type(parent.owner, parent.key.rpartition(".")[2])):
        return parent
    return None


def _elsewhere(key: str) -> list[str]:
    """List the `group=option` whose options class does have `key`."""
    group, _, name = key.partition(".")
    if group not in GROUPS:
        return []
    return [f"{group}={o}" for o, options in options_of(group).items() if hasattr(options, name)]


def _to_dataclass(composed: DictConfig) -> Config:
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    assert isinstance(config, Config)
    return config


@contextmanager
def _hydra() -> Iterator[None]:
    """Lend Hydra's one global state for a composition; a program around us that uses Hydra gets its own back."""
    _store_schemas()
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer  # Hydra has put another instance there meanwhile


@functools.cache
def _store_schemas() -> None:
    """Offer every options class to the YAML files as `/schema/<group>/<name>`."""
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config)
    for group in GROUPS:
        for name, options in options_of(group).items():
            store.store(group=f"schema/{group}", name=name, node=options)
