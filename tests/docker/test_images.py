"""The images, held right without a Docker engine: none runs where the tests do, so nothing here builds an image.

The fast tests read the files; the slow one runs the very install commands of Dockerfile.cpu in a clean virtual
environment, on what `docker build` would be sent, and then what the image's health check and CMD run.
"""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILES = ("Dockerfile", "Dockerfile.cpu")


def instructions(name):
    """List (word, rest) of each instruction, continued lines joined and comments dropped."""
    lines = (ROOT / "docker" / name).read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    found = re.sub(r"\\\n", " ", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in found if line.strip()]


def ignored():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def is_ignored(path: str) -> bool:
    """Tell whether .dockerignore keeps `path` from the build; for the kinds of pattern that it uses."""
    parts = path.split("/")
    return any(
        fnmatch.fnmatch(parts[0], pattern)
        or (pattern.startswith("**/") and any(fnmatch.fnmatch(p, pattern[3:]) for p in parts))
        for pattern in ignored()
    )


def pinned(package: str) -> str:
    (version,) = re.findall(
        rf"^{package}==(.+)$", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE
    )
    return version


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_exists_and_is_sent(name):
    copied = [rest.split() for word, rest in instructions(name) if word == "COPY"]
    sources = [s for words in copied for s in words[:-1] if not words[0].startswith("--from")]
    assert {"requirements.lock", "setup.py", "pyproject.toml", "conf", "distllm", "launch"} == set(sources)  # fmt: skip
    for source in sources:
        assert (ROOT / source).exists() and not is_ignored(source)
    for path in ("tests/conftest.py", ".git/config", "runs/a", "distllm/cli/__pycache__/main.pyc"):
        assert is_ignored(path)


@pytest.mark.parametrize("name", FILES)
def test_versions_are_pinned(name):
    for word, rest in instructions(name):
        if word == "FROM":
            tag = rest.split()[0].partition(":")[2]
            assert re.search(r"\d+\.\d+\.\d+", tag), rest
        if word == "RUN" and "pip install" in rest:
            assert "requirements.lock" in rest or rest.endswith("--no-deps --no-build-isolation .")
            for package in re.findall(
                r"(?<=\s)[a-z][a-z-]+(?=[=<>~\s])", rest.partition("install")[2]
            ):
                assert f"{package}==" in rest, f"{package} has no version: {rest}"


@pytest.mark.parametrize("name", FILES)
def test_the_image_is_not_root_and_checks_itself(name):
    last = dict(instructions(name))
    assert last["USER"] == "distllm"
    words = [word for word, _ in instructions(name)]
    assert "RUN" not in words[words.index("USER") :]
    assert '"distllm", "doctor"' in last["HEALTHCHECK"] and '"distllm", "doctor"' in last["CMD"]


def test_the_gpu_image_has_cuda_13_and_the_fast_kernels():
    text = (ROOT / "docker/Dockerfile").read_text()
    images = [rest.split()[0] for word, rest in instructions("Dockerfile") if word == "FROM"]
    assert all(image.startswith("nvidia/cuda:13.") for image in images)
    assert "-runtime-" in images[-1]
    assert re.search(r"flash-attn==\d", text) and re.search(r"deepspeed==\d", text)


def test_both_images_and_make_setup_install_alike():
    make = (ROOT / "Makefile").read_text()
    for text in (make, *((ROOT / "docker" / name).read_text() for name in FILES)):
        assert "^torch==' requirements.lock)" in text
        assert "--requirement requirements.lock" in text
        assert "--no-deps --no-build-isolation" in text


def test_compose_starts_two_nodes():
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    nodes = compose["services"]
    assert len(nodes) == 2
    for name, node in nodes.items():
        assert node["hostname"] == name
        build = node["build"]
        assert (ROOT / "docker" / build["context"] / build["dockerfile"]).is_file()
        assert node["command"].split()[0] == "launch/torchrun.sh" and "run.dir=" in node["command"]
        assert node["environment"]["NNODES"] == str(len(nodes))
        assert node["environment"]["RDZV_ENDPOINT"].split(":")[0] in nodes
        assert set(node["networks"]) <= set(compose["networks"])
        assert node["volumes"][0].split(":")[0] in compose["volumes"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_install_commands_of_the_cpu_image_work(tmp_path):
    app, venv = tmp_path / "app", tmp_path / "venv"
    app.mkdir()
    environment = {
        "PATH": f"{venv}/bin:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        **{k: v for k, v in os.environ.items() if k.startswith(("PIP_", "SSL_", "HTTP", "http"))},
    }

    def run(command):
        done = subprocess.run(
            ["sh", "-ec", command], cwd=app, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    commands = 0
    for word, rest in instructions("Dockerfile.cpu"):
        if word == "COPY":
            *sources, _ = rest.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    ignore = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / source, app / source, ignore=ignore)
                else:
                    shutil.copy(ROOT / source, app)
        elif word == "RUN" and ("pip install" in rest or "-m venv" in rest):
            # The image's python is the only one there; here it is this one, for the first command.
            rest = rest.replace("python -m venv /opt/venv", f"{sys.executable} -m venv {venv}")
            run(rest)
            commands += 1
    assert commands == 4
    packages = run("pip list --format=freeze")
    assert f"torch=={pinned('torch')}" in packages
    shutil.rmtree(app / "distllm")  # what runs now is what was installed
    doctor = run("distllm doctor")
    assert "engine=ddp" in doctor and "problems" not in doctor
    assert "--nproc-per-node=2" in run("NPROC_PER_NODE=2 launch/torchrun.sh --dry-run run.dir=a")
    run(
        "NPROC_PER_NODE=2 launch/torchrun.sh run.dir=runs/a engine=ddp train.max_steps=1 arch.d_model=32 arch.n_layers=1 "
        "arch.d_ff=32 arch.vocab_size=512 train.global_batch_size=4 train.micro_batch_size=2 train.num_eval_samples=2"
    )
    assert (app / "runs/a/model/model.safetensors").is_file()
