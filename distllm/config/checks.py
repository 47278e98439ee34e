"""What must hold before anything starts: each value by itself, values against each other, the machine.

Pure functions that return problems; whoever calls `check` gets all of them in one error. Unknown keys and wrong types
are refused earlier, by `compose.py`; what only the data can tell (lengths, formats) is checked where it is read.
"""

import functools
import importlib.util
import math
import os
import shutil
from pathlib import Path
from typing import Any

from distllm import registry
from distllm.arch.io import read_options
from distllm.config.abilities import ability_problems, records_of
from distllm.config.adapter_checks import adapter_machine_problems, adapter_problems, adapter_rules
from distllm.config.files import GROUPS
from distllm.config.overrides import raise_all
from distllm.config.parallel import parallel_problems
from distllm.config.preference_checks import preference_problems, preference_rules
from distllm.config.rl_checks import rl_problems, rl_rules
from distllm.config.rules import (
    ABOVE_0_TO_1,
    AT_LEAST_1,
    BELOW_1,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Rule,
    by_key,
    multiples,
    one_of,
)
from distllm.config.schema import Config, leaves, options_of, supervised_stages
from distllm.engines.attention import choose_attention
from distllm.engines.hardware import PRECISIONS, resolve_device, resolve_precision
from distllm.engines.memory import CHECKPOINTING
from distllm.engines.mesh import dp_size, shape_of
from distllm.engines.options import BatchSizes
from distllm.errors import UserError
from distllm.layers.attention_kernels import AUTO, KERNELS
from distllm.layers.liger_loss import check_loss_kernel
from distllm.objectives.options import PRETRAINING


def check(config: Config, dp_size: int = 1) -> None:
    """Check values by themselves and against each other.

    Raises:
        ConfigError: something does not hold; the message lists all problems.
    """
    raise_all(field_problems(config) or cross_problems(config, dp_size))


def check_training(config: Config, dp_size: int | None = None) -> None:
    """Check everything that training needs: `check`, the stage against its data, and the machine.

    Args:
        config: everything that is set.
        dp_size: processes that see different data; None asks the launcher's variables.

    Raises:
        ConfigError: something does not hold; the message lists all problems.
    """
    problems = field_problems(config)
    if not problems:
        problems = cross_problems(
            config, data_parallel_size(config) if dp_size is None else dp_size
        )
        problems += data_problems(config)
    problems += machine_problems(config)
    raise_all(problems)
    raise_all(model_problems(config))


def data_parallel_size(config: Config) -> int:
    """Return how many of the processes that the launcher started see different data; 1 without one."""
    return dp_size(config.engine)


def batch_sizes(config: Config) -> BatchSizes:
    """Return how many sequences a step takes, for the engine."""
    return BatchSizes(config.train.global_batch_size, config.train.micro_batch_size)


_RULES: dict[Rule, str] = {
    AT_LEAST_1: """
        hardware.num_gpus hardware.gpus_per_node
        stage.mean_span_length stage.ngram_order
        arch.vocab_size arch.d_model arch.n_layers arch.n_heads arch.n_kv_heads arch.d_head arch.d_ff arch.max_seq_len
        arch.d_hidden arch.n_decoder_layers arch.window arch.relative_buckets arch.relative_max_distance arch.num_labels
        arch.experts_per_token arch.d_expert
        train.max_steps train.global_batch_size train.micro_batch_size train.seq_len train.log_every_steps
        train.save_every_steps train.keep_last train.num_eval_samples
        generation.max_new_tokens pipeline.rounds
        data.num_train data.num_prompts data.num_heldout
        engine.start_timeout_s engine.timeout_s engine.long_timeout_s engine.bucket_mib
        engine.mesh.dp_replicate engine.mesh.tp_size""",
    NOT_NEGATIVE: """
        hardware.reserve_gib hardware.node_latency_us hardware.network_latency_us
        run.seed arch.decoder_start_id arch.blank_id arch.start_id arch.init_std arch.position_offset arch.token_types arch.norm_gain_offset
        arch.num_experts arch.balance_coef arch.router_z_coef train.eval_every_steps train.max_skipped_steps train.max_rollbacks
        hardware.threads
        optim.weight_decay optim.max_grad_norm schedule.warmup_steps generation.temperature generation.top_k
        stage.z_loss stage.sampled_words stage.neftune_alpha data.limit engine.mesh.dp_shard""",
    POSITIVE: """
        generation.repetition_penalty
        hardware.memory_gib hardware.memory_gb_per_s hardware.node_gb_per_s hardware.network_gb_per_s
        hardware.peak_bf16_tflops hardware.peak_fp8_tflops hardware.peak_fp32_tflops
        arch.rope_theta arch.rope_local_theta arch.norm_eps arch.embedding_scale arch.attention_scale
        arch.attention_softcap arch.logit_softcap arch.logit_scale arch.expert_clamp arch.expert_alpha optim.lr optim.eps""",
    BELOW_1: "generation.min_p arch.dropout arch.dropout_embedding arch.dropout_weights optim.beta1 optim.beta2 data.heldout_fraction",
    Rule(lambda v: v in (1, -1), "must be 1 or -1"): "arch.rope_sign",
    ABOVE_0_TO_1: "stage.mask_rate stage.eval_mask_rate arch.rope_fraction schedule.decay_fraction generation.top_p",
    SHARE: """
        stage.mask_token_share stage.random_token_share stage.sentence_share stage.document_share stage.min_document_span
        stage.fim_rate stage.fim_spm_rate stage.label_smoothing schedule.min_lr_ratio""",
    one_of(*PRECISIONS): "train.precision",
    one_of("auto", "cpu", "cuda"): "hardware.device",
    one_of(AUTO, *KERNELS): "hardware.attention",
    Rule(lambda v: v in (0, 1, 2, 3), "must be 0, 1, 2 or 3"): "engine.zero_stage",
    one_of(*CHECKPOINTING): "engine.activation_checkpointing",
    one_of("last", "likelihood"): "stage.head",
    one_of("auto", *PRETRAINING): "stage.objective",
}  # fmt: skip


@functools.cache
def rules() -> dict[str, Rule]:
    """Return dotted key -> what its value must fulfil. A key that this run's options do not have is skipped."""
    return by_key(_RULES) | rl_rules() | preference_rules() | adapter_rules()


def field_problems(config: Config) -> list[str]:
    """Check each value by itself."""
    problems = []
    defaults = _defaults(config)
    for leaf in leaves(config):
        rule, value = rules().get(leaf.key), leaf.value
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(
                f"{leaf.key}={value} {_advise(leaf.key, defaults, 'must be a finite number')}"
            )
        elif rule and value is not None and not rule.holds(value):
            problems.append(f"{leaf.key}={value} {_advise(leaf.key, defaults, rule.words)}")
    return problems


def cross_problems(config: Config, dp_size: int = 1) -> list[str]:
    """Check values against each other; each must hold by itself already."""
    return [
        *_batch_problems(config, dp_size),
        *_arch_problems(config),
        *_schedule_problems(config),
        *rl_problems(config),
        *preference_problems(config),
        *adapter_problems(config),
    ]


def _batch_problems(config: Config, dp_size: int) -> list[str]:
    train = config.train
    unit = train.micro_batch_size * dp_size
    if train.global_batch_size % unit == 0:
        return []
    message = (
        f"train.global_batch_size={train.global_batch_size} is not a multiple of micro_batch_size "
        f"({train.micro_batch_size}) x dp_size ({dp_size}) = {unit}. "
        f"Set {multiples(train.global_batch_size, unit)}."
    )
    share, rest = divmod(train.global_batch_size, dp_size)
    if not rest:
        fitting = max(n for n in range(1, train.micro_batch_size + 1) if share % n == 0)
        message += f" Or set train.micro_batch_size={fitting}."
    whole, rest = divmod(train.global_batch_size, train.micro_batch_size)
    if dp_size > 1 and not rest:
        sizes = [str(n) for n in range(1, whole + 1) if whole % n == 0]
        listed = f"{', '.join(sizes[:-1])} or {sizes[-1]}" if len(sizes) > 1 else sizes[0]
        message += f" The batch as it is can be divided among {listed} processes."
    return [message]


def _arch_problems(config: Config) -> list[str]:
    arch, problems = config.arch, []
    heads, kv_heads = getattr(arch, "n_heads", 1), getattr(arch, "n_kv_heads", 1)
    if heads % kv_heads:
        divisors = [d for d in range(1, heads + 1) if heads % d == 0]
        problems.append(
            f"arch.n_heads={heads} is not a multiple of arch.n_kv_heads={kv_heads}. "
            f"Set arch.n_kv_heads to one of {', '.join(map(str, divisors))}."
        )
    if hasattr(arch, "d_head") and arch.d_head is None and arch.d_model % heads:
        problems.append(
            f"arch.d_model={arch.d_model} is not a multiple of arch.n_heads={heads}. "
            f"Set arch.d_model to {multiples(arch.d_model, heads)}, or set arch.d_head."
        )
    elif hasattr(arch, "d_head") and (arch.d_head or arch.d_model // heads) % 2:
        d_head = arch.d_head or arch.d_model // heads
        problems.append(
            f"arch.d_head={d_head} is odd, and rotary positions turn pairs of dims. Set {d_head + 1}."
        )
    if config.model is None and config.train.seq_len > arch.max_seq_len:
        problems.append(
            f"train.seq_len={config.train.seq_len} is longer than arch.max_seq_len={arch.max_seq_len}. "
            f"Set train.seq_len={arch.max_seq_len} or arch.max_seq_len={config.train.seq_len}."
        )
    return problems


def _schedule_problems(config: Config) -> list[str]:
    warmup, steps = config.schedule.warmup_steps, config.train.max_steps
    if warmup == 0 or warmup < steps:
        return []
    return [
        f"schedule.warmup_steps={warmup} is not below train.max_steps={steps}: the peak learning rate would never "
        f"be reached. Set schedule.warmup_steps={steps // 10} or train.max_steps={warmup * 10}."
    ]


def data_problems(config: Config) -> list[str]:
    """Check that the data source has what the stage learns from, as far as its class tells."""
    kind = records_of(config, supervised_stages().get(config.stage.name, "prompts"))
    sources = {name: registry.get("data", name).serves for name in registry.names("data")}
    # Where the records decide (files), the class has a property, which tells nothing yet.
    sources = {name: kinds if isinstance(kinds, tuple) else () for name, kinds in sources.items()}
    serves = sources[config.data.name]
    if not serves or kind in serves:
        return []
    able = [f"data={n}" for n, kinds in sources.items() if kind in kinds or not kinds]
    return [
        f"stage={config.stage.name} learns from {kind}, and data={config.data.name} serves "
        f"{' and '.join(serves)}. Set {' or '.join(able)}."
    ]


def model_options(config: Config) -> Any:
    """Return the shape of the model: that of `config.model`, if set, else `config.arch`.

    Raises:
        CheckpointError: the directory holds no model.
    """
    return (
        config.arch if config.model is None else read_options(Path(config.model), config.arch.name)
    )


def model_problems(config: Config) -> list[str]:
    """Check the model to start from against the settings and the layout of processes."""
    options = model_options(config)
    problems = parallel_problems(config, options, int(os.environ.get("WORLD_SIZE", 1)))
    problems += kernel_problems(config, options)
    if config.train.seq_len > options.max_seq_len:
        problems.append(
            f"train.seq_len={config.train.seq_len} is longer than max_seq_len={options.max_seq_len} of "
            f"model={config.model}. Set train.seq_len={options.max_seq_len}."
        )
    return problems + ability_problems(config)


def kernel_problems(config: Config, options: Any) -> list[str]:
    """Check that the kernels that are asked for can serve the model on this machine."""
    has_more = [getattr(options, name, None) for name in ("head_bias", "logit_softcap")]
    problems = []
    try:
        choose_attention(options, config.hardware, config.train.precision, trains=True)
    except UserError as error:
        problems.append(str(error))
    try:
        check_loss_kernel(
            config.hardware.loss,
            resolve_device(config.hardware.device),
            is_plain=not any(has_more),
            is_split=shape_of(config.engine, int(os.environ.get("WORLD_SIZE", 1))).tp > 1,
        )
    except UserError as error:
        problems.append(str(error))
    return problems


def machine_problems(config: Config) -> list[str]:
    """Check that this machine can run what is asked."""
    problems = []
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and config.engine.name == "single":
        others = [name for name in registry.names("engine") if name != "single"]
        problems.append(
            f"engine=single runs one process, and a launcher has started {processes} (WORLD_SIZE). "
            f"Start it without a launcher, or set engine to one of {', '.join(others)}."
        )
    try:
        device = resolve_device(config.hardware.device)
        resolve_precision(config.train.precision, device)
        if config.engine.compile and device.type == "cpu" and not _c_compiler():
            problems.append(
                "engine.compile=true needs a C compiler on a CPU, and none was found. "
                "Install gcc or set engine.compile=false."
            )
    except UserError as error:
        problems.append(str(error))
    problems += registry.get("engine", config.engine.name).problems(
        config.engine,
        hardware=config.hardware,
        precision=config.train.precision,
        optim=config.optim,
        batch=batch_sizes(config),
    )
    if config.tracking.name in ("wandb", "tensorboard") and not _installed(config.tracking.name):
        problems.append(
            f"tracking={config.tracking.name} needs the package {config.tracking.name}, which is not installed. "
            f'Type pip install "distllm[{config.tracking.name}]", or set tracking=jsonl.'
        )
    for key in ("model", "tokenizer", "stage.reward_model"):
        path = getattr(config.stage, "reward_model", "") if "." in key else getattr(config, key)
        if path and not Path(path).is_dir():
            problems.append(
                f"{key}={path} is not a directory. Give the directory of a model, such as RUN/model."
            )
    return problems + adapter_machine_problems(config)


def _advise(key: str, defaults: dict[str, Any], rule: str) -> str:
    default = defaults.get(key)
    rule_of_key = rules().get(key)
    usable = default is not None and (rule_of_key is None or rule_of_key.holds(default))
    return f"{rule}. Set {default}, the default." if usable else f"{rule}."


def _defaults(config: Config) -> dict[str, Any]:
    """Return dotted key -> the dataclass's default."""
    found = {leaf.key: leaf.value for leaf in leaves(Config())}
    for group in GROUPS:
        options = options_of(group).get(getattr(config, group).name)
        found |= {leaf.key: leaf.value for leaf in leaves(options, f"{group}.")} if options else {}
    return found


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _c_compiler() -> bool:
    return any(shutil.which(name) for name in ("cc", "gcc", "clang"))
