"""The whole config: one field per group, each an options dataclass that lives with its component.

A file dropped into a component's folder enrols here by its registry key; what an option means is said in its class.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from distllm import registry
from distllm.arch.adapter import AdapterOptions
from distllm.engines.cluster import ClusterOptions
from distllm.engines.options import HardwareOptions
from distllm.generation.options import GenerationOptions
from distllm.objectives.options import PretrainOptions
from distllm.optim.options import ScheduleOptions
from distllm.pipeline.options import PipelineOptions
from distllm.tracking.options import TrackingOptions
from distllm.train.options import RunOptions, TrainOptions
from distllm.types import free


@dataclass(kw_only=True, slots=True)
class Config:
    """Everything a command is told. Composed once, then never written to."""

    run: RunOptions = field(default_factory=RunOptions)
    """Where the run lives and its seed."""
    arch: Any = None
    """Shape of the model, unless `model` brings its own."""
    stage: Any = None
    """What is learned: pretrain, sft, reward, or a reinforcement-learning algorithm."""
    engine: Any = free(None)
    """How the model is laid out on the hardware."""
    data: Any = None
    """Where samples come from."""
    optim: Any = None
    """The optimizer."""
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    """What is trained: every weight, or low-rank adapters beside frozen ones."""
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    """The learning rate over the run."""
    train: TrainOptions = field(default_factory=TrainOptions)
    """Length, batch sizes and cadences."""
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    """How responses are sampled."""
    tracking: TrackingOptions = free(default_factory=TrackingOptions)
    """Where metrics go."""
    hardware: HardwareOptions = free(default_factory=HardwareOptions)
    """What a process may use of the machine."""
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)
    """Stages chained into rounds; read by `distllm pipeline` only."""
    model: str | None = None
    """Directory of the weights to start from: one of ours or Hugging Face's. None draws new ones."""
    tokenizer: str | None = None
    """Directory of the tokenizer. None takes the model's, or trains one on the data."""


_SHARED_OPTIONS = {"schedule": ScheduleOptions, "tracking": TrackingOptions}


def options_of(group: str) -> dict[str, Any]:
    """Return schema name -> options with their defaults, for every option that `group` has."""
    if group == "stage":
        found = stages()
    elif group == "hardware":
        found = {"auto": HardwareOptions, "cluster": ClusterOptions}
    elif group == "adapter":
        found = {"none": AdapterOptions, "lora": AdapterOptions}
    elif group == "pipeline":
        found = {"none": PipelineOptions}
    else:
        shared = _SHARED_OPTIONS.get(group)
        found = {n: shared or registry.get(group, n).Options for n in registry.names(group)}
    return {name: cls(name=name) for name, cls in found.items()}


def supervised_stages() -> dict[str, str]:
    """Return stage -> kind of record it learns from: pretraining, and each objective that names its `records`."""
    found = {"pretrain": "documents"}
    for name in registry.names("objective"):
        records = getattr(registry.get("objective", name), "records", "")
        found |= {name: records} if records else {}
    return found


def stages() -> dict[str, type]:
    """Return stage name -> options class: the supervised ones and every algorithm of `rl/algorithms/`."""
    supervised = {
        n: registry.get("objective", n).Options for n in supervised_stages() if n != "pretrain"
    }
    supervised = {"pretrain": PretrainOptions} | supervised
    algorithms = {n: registry.get("algorithm", n).Options for n in registry.names("algorithm")}
    return supervised | algorithms


def to_dict(config: Any) -> dict[str, Any]:
    """Return `config` as plain nested dicts and lists, ready for JSON or YAML."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


@dataclass(frozen=True, slots=True)
class Leaf:
    """One setting of a config."""

    key: str
    """Dotted, as typed."""
    value: Any
    owner: type
    """Options class that declares it."""
    free: bool
    """May differ when a run is resumed."""

    @property
    def default(self) -> Any:
        """What the options class gives it where nothing else does."""
        return getattr(self.owner(), self.key.rpartition(".")[2])


def leaves(config: Any, prefix: str = "", is_free: bool = False) -> list[Leaf]:
    """List every setting of `config`, in order; lists and dicts are one setting each."""
    found = []
    for f in fields(config):
        key, value = f"{prefix}{f.name}", getattr(config, f.name)
        freed = is_free or f.metadata.get("resume") == "free"
        if is_dataclass(value):
            found += leaves(value, f"{key}.", freed)
        else:
            found.append(Leaf(key, value, type(config), freed))
    return found


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, str) else value  # StrEnum members become plain text
