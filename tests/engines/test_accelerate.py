"""What is made of a file of `accelerate config`. That it trains the same is in the matrix (`accelerate x2` and others)."""

import gc
import json
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from distllm.config.layout import layout_of
from distllm.engines import accelerate
from distllm.engines.accelerate import Accelerate, AccelerateOptions
from distllm.engines.base import build_engine, resolve
from distllm.engines.ddp import DDP
from distllm.engines.options import BatchSizes, HardwareOptions
from distllm.optim.options import AdamWOptions
from distllm.testing.tiny import tiny_decoder

HERE = Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch"
CPU = HardwareOptions(device="cpu", threads=1)
FILES = {
    "MULTI_CPU": HERE / "accelerate_cpu.yaml",
    "FSDP": HERE / "accelerate_fsdp.yaml",
    "DEEPSPEED": HERE / "accelerate_zero.yaml",
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """Two processes; no default file of this machine, and no launcher that this test may run under."""
    from accelerate.commands.config import config_args

    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("ACCELERATE_MIXED_PRECISION", *accelerate._FLAGS):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def options(tmp_path):
    """Return a function that changes entries of a file, and gives options that name it."""

    def write(kind="MULTI_CPU", engine=None, **changes):
        content = yaml.safe_load(FILES[kind].read_text())
        for key, value in changes.items():
            section = content.setdefault(key, {}) if isinstance(value, dict) else content
            section.update(value if isinstance(value, dict) else {key: value})
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(content))
        return AccelerateOptions(config=str(path), **engine or {})

    return write


def problems(options, hardware=CPU, precision="fp32", optim=None, batch=BatchSizes(16, 2)):  # noqa: B008
    known = {"hardware": hardware, "precision": precision, "batch": batch}
    return Accelerate.problems(options, optim=optim or AdamWOptions(), **known)


@pytest.mark.parametrize("kind", FILES)
def test_files_as_the_wizard_writes_them_are_accepted(options, kind):
    assert problems(options(kind)) == []


def test_without_a_file_every_process_has_a_copy():
    assert problems(AccelerateOptions()) == []
    assert resolve(AccelerateOptions())[0] is Accelerate


def test_the_default_file_is_found(monkeypatch, options):
    from accelerate.commands.config import config_args

    monkeypatch.setattr(config_args, "default_config_file", options("FSDP").config)
    assert resolve(AccelerateOptions())[1].name == "fsdp"


def test_fsdp_settings_arrive(options):
    engine = {"timeout_s": 7, "compile": True}
    found = resolve(
        options(
            "FSDP",
            engine=engine,
            fsdp_config={"fsdp_reshard_after_forward": "false", "fsdp_offload_params": True},
            parallelism_config={"parallelism_config_dp_replicate_size": 2},
        )
    )[1]
    assert (found.name, found.reshard_after_forward, found.cpu_offload) == ("fsdp", False, True)
    assert (found.activation_checkpointing, found.timeout_s, found.compile) == ("full", 7, True)
    assert found.mesh.dp_replicate == 2
    plain = resolve(options("FSDP"))[1]
    assert (plain.reshard_after_forward, plain.cpu_offload, plain.mesh.dp_replicate) == (True, False, 1)  # fmt: skip


def test_deepspeed_settings_arrive(options, tmp_path):
    found = resolve(options("DEEPSPEED", deepspeed_config={"offload_optimizer_device": "cpu"}))[1]
    assert (found.name, found.zero_stage) == ("deepspeed", 3)
    assert (found.offload_optimizer, found.offload_param) == (True, False)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": 7.0}))
    theirs = options("DEEPSPEED", deepspeed_config={"deepspeed_config_file": str(path)})
    assert resolve(theirs)[1].zero_stage == 1
    (problem,) = problems(theirs)
    assert f"deepspeed_config_file: {path} (in {theirs.config}) says gradient_clipping=7.0" in problem  # fmt: skip
    assert "optim.max_grad_norm=1.0" in problem


def test_inductor_compiles_the_blocks(options):
    assert resolve(options(dynamo_config={"dynamo_backend": "INDUCTOR"}))[1].compile
    assert not resolve(options(dynamo_config={"dynamo_backend": "NO"}))[1].compile


def test_the_plan_knows_what_runs(options):
    assert layout_of(options("FSDP"), 8).zero_stage == 3
    assert layout_of(options("DEEPSPEED"), 8).zero_stage == 3
    plain = layout_of(options(), 8)
    assert (plain.engine, plain.zero_stage, plain.dp) == ("ddp", 0, 8)


REFUSED = {
    "processes": ({"num_processes": 3}, ["num_processes: 3", "there are 2 processes", "--nproc-per-node=3"]),
    "precision": ({"mixed_precision": "bf16"}, ["mixed_precision: bf16", "train.precision=fp32"]),
    "fp16": ({"mixed_precision": "fp16"}, ["mixed_precision: fp16", "Write bf16"]),
    "dynamo": ({"dynamo_config": {"dynamo_backend": "EAGER"}}, ["dynamo_backend: EAGER", "INDUCTOR"]),
    "megatron": ({"distributed_type": "MEGATRON_LM"}, ["MEGATRON_LM", "MULTI_GPU, FSDP, DEEPSPEED"]),
    "version 1": ({"kind": "FSDP", "fsdp_config": {"fsdp_version": 1}}, ["fsdp_version: 1", "accelerate to-fsdp2 --config_file"]),
    "wrapping": (
        {"kind": "FSDP", "fsdp_config": {"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}},
        ["SIZE_BASED_WRAP", "Write TRANSFORMER_BASED_WRAP"],
    ),
    "offloaded activations": (
        {"kind": "FSDP", "fsdp_config": {"fsdp_activation_checkpointing_offload": True}},
        ["fsdp_activation_checkpointing_offload: True"],
    ),
    "selective": (
        {"kind": "FSDP", "engine": {"activation_checkpointing": "selective"}},
        ["fsdp_activation_checkpointing: true", "engine.activation_checkpointing=selective"],
    ),
    "tensor parallel": (
        {"kind": "FSDP", "parallelism_config": {"parallelism_config_tp_size": 2}},
        ["parallelism_config_tp_size: 2", "engine=fsdp engine.mesh.tp_size"],
    ),
    "mesh": (
        {"kind": "FSDP", "parallelism_config": {"parallelism_config_dp_replicate_size": 4}},
        ["dp_replicate (4)", "there are 2 processes"],
    ),
    "clipping": (
        {"kind": "DEEPSPEED", "deepspeed_config": {"gradient_clipping": 0.5}},
        ["gradient_clipping: 0.5", "optim.max_grad_norm=1.0"],
    ),
    "accumulation": (
        {"kind": "DEEPSPEED", "deepspeed_config": {"gradient_accumulation_steps": 3}},
        ["gradient_accumulation_steps: 3", "train.global_batch_size=16", "make it 4"],
    ),
    "nvme": (
        {"kind": "DEEPSPEED", "deepspeed_config": {"offload_param_device": "nvme"}},
        ["offload_param_device: nvme", "cpu alone"],
    ),
    "unknown key": ({"zero": 3}, ["is no file of `accelerate config`", "zero"]),
    "no cut moments": (
        {"kind": "DEEPSPEED", "deepspeed_config": {"zero_stage": 0, "offload_optimizer_device": "cpu"}},
        ["engine.zero_stage=0 cuts nothing"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_refused_with_both_values(options, case):
    changes, words = REFUSED[case]
    (problem,) = problems(options(**changes))
    for word in words:
        assert word in problem, problem


def test_a_file_for_the_cpu_on_a_gpu(options, monkeypatch):
    monkeypatch.setattr(accelerate, "resolve_device", lambda name: torch.device("cuda"))
    (problem,) = problems(options(), hardware=HardwareOptions(device="cuda"))
    assert "use_cpu: true" in problem and "hardware.device=cuda" in problem


def test_a_file_that_is_not_there(tmp_path):
    (problem,) = problems(AccelerateOptions(config=str(tmp_path / "gone.yaml")))
    assert "gone.yaml cannot be read: there is no such file" in problem
    (tmp_path / "odd.yaml").write_text("a: [")
    (problem,) = problems(AccelerateOptions(config=str(tmp_path / "odd.yaml")))
    assert "odd.yaml is no file of `accelerate config`" in problem


def test_flags_without_a_file(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    (problem,) = problems(AccelerateOptions())
    assert "--use_fsdp" in problem and "accelerate launch --config_file FILE" in problem


@pytest.mark.parametrize(
    "words", [["--config_file", "{}", "--num_processes", "4"], ["--num-processes=4", "--config_file={}"]]
)  # fmt: skip
def test_the_launcher_is_asked_for_its_file(monkeypatch, options, words):
    import psutil

    file = options().config
    line = [sys.executable, "/bin/accelerate", "launch", *(w.format(file) for w in words)]
    parent = type("Parent", (), {"cmdline": lambda self: [*line, "-m", "distllm", "--num_processes=9"]})  # fmt: skip
    shell = type("Shell", (), {"cmdline": lambda self: ["bash"]})
    monkeypatch.setattr(psutil.Process, "parents", lambda self: [shell(), parent()])
    assert problems(AccelerateOptions()) == []  # not started by it: no file
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    (problem,) = problems(AccelerateOptions())
    assert problem.startswith(f"{file} says num_processes: 4, and there are 2 processes")


def test_the_files_of_launch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert problems(AccelerateOptions(config=str(LAUNCH / "accelerate.yaml"))) == []
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert problems(AccelerateOptions(config=str(LAUNCH / "accelerate_8gpu.yaml"))) == []


def test_it_is_accelerate_that_wraps_and_a_closed_engine_lets_go(monkeypatch):
    """In a process group of one that accelerate takes for a launched one."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        engine = build_engine(
            "policy",
            tiny_decoder(),
            options=AccelerateOptions(),
            hardware=CPU,
            precision="fp32",
            optim=AdamWOptions(),
        )
        assert isinstance(engine, DDP)
        assert engine.accelerator._models[0] in (engine.caller, engine.caller.module)
        held = weakref.ref(engine.accelerator)
        engine.close()
        gc.collect()
        assert held() is None
    finally:
        dist.destroy_process_group()
