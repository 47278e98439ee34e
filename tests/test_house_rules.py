"""Rules of the house that a machine can check: who may import whom, one door per heavy dependency, sizes, names."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distllm import registry
from distllm.config.files import conf_dir, options_in

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "distllm"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    {"errors"},
    {"types"},
    {"registry"},
    {"layers"},
    {"arch", "data", "optim", "tracking"},
    {"objectives", "engines"},
    {"generation"},
    {"train"},
    {"rl"},
    {"config"},
    {"pipeline"},
    {"cli", "testing"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Imports that point upwards on purpose, each explained where it stands.
UPWARD = {
    ("distllm/train/__init__.py", "distllm.pipeline.stage"),  # makes distllm.train(config) callable
    # Options live with their component, and the config assembles them.
    ("distllm/config/schema.py", "distllm.pipeline.options"),
}

DOORS = {
    "torch.distributed": ("distllm/engines/", "distllm/testing/", "distllm/train/checkpoint.py"),
    "deepspeed": ("distllm/engines/deepspeed.py",),
    "accelerate": ("distllm/engines/accelerate.py",),
    "wandb": ("distllm/tracking/wandb.py",),
    "tensorboard": ("distllm/tracking/tensorboard.py",),
    "torch.utils.tensorboard": ("distllm/tracking/tensorboard.py",),
    "flash_attn": ("distllm/layers/attention.py",),
    "hydra": ("distllm/config/", "distllm/cli/"),
    "omegaconf": ("distllm/config/", "distllm/cli/"),
    "transformers": ("distllm/data/", "distllm/arch/hf/", "distllm/arch/io.py"),
    "tokenizers": ("distllm/data/",),
    "datasets": ("distllm/data/",),
    "matplotlib": ("distllm/tracking/report_plots.py",),
}
"""Package -> where it may be imported."""

INSIDE_FUNCTIONS = {"deepspeed", "accelerate", "wandb", "tensorboard", "torch.utils.tensorboard", "flash_attn",
                    "transformers", "tokenizers", "datasets", "pyarrow", "rich", "jinja2", "matplotlib"}  # fmt: skip
"""Never at the top of a file, so that everything imports on a laptop and `--help` is fast."""

LIBRARIES = {
    "torch": "torch",
    "numpy": "numpy",
    "hydra": "hydra-core",
    "omegaconf": "omegaconf",
    "yaml": "pyyaml",
    "safetensors": "safetensors",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "datasets": "datasets",
    "pyarrow": "pyarrow",
    "rich": "rich",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
}
"""Everything outside the standard library that distllm imports -> its name in setup.py."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Yield (module, line, whether it is imported when the file is) for each import, in functions too."""

    def visit(node: ast.AST, at_top: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, at_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name_of(path)}:{child.lineno}: imports are absolute"
                module = child.module or ""
                # `from distllm.engines import base` imports a module, `from distllm.types import Batch` a name.
                for alias in child.names:
                    inner = ROOT / f"{module}.{alias.name}".replace(".", "/")
                    is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                    full = f"{module}.{alias.name}"
                    yield (
                        (full if is_module or module in ("torch", "torch.utils") else module),
                        child.lineno,
                        at_top,
                    )
            else:
                lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                type_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from visit(child, at_top and not lazy and not type_only)

    yield from visit(ast.parse(path.read_text()), True)


def begins_with(module: str, prefix: str) -> bool:
    return f"{module}.".startswith(f"{prefix}.")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_arrows(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return  # the public surface
    for module, line, _ in imports(path):
        if not begins_with(module, "distllm") or (name_of(path), module) in UPWARD:
            continue
        other = module.split(".")[1] if "." in module else "__init__"
        where = f"{name_of(path)}:{line} imports {module}"
        assert other in RANK, f"{where}: name the module, not the public surface"
        assert other == own or RANK[other] < RANK[own], f"{where}, which is not below {own}"


def test_every_folder_has_its_place_in_the_arrows():
    present = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert present <= set(RANK)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_one_door_per_heavy_dependency(path):
    for module, line, at_top in imports(path):
        for package, doors in DOORS.items():
            if begins_with(module, package):
                assert name_of(path).startswith(doors), (
                    f"{name_of(path)}:{line}: {package} belongs in {doors}"
                )
        for package in INSIDE_FUNCTIONS:
            if begins_with(module, package):
                assert not at_top, (
                    f"{name_of(path)}:{line}: import {package} inside the function that needs it"
                )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_known_libraries(path):
    for module, line, _ in imports(path):
        root = module.split(".")[0]
        known = root in LIBRARIES or root in sys.stdlib_module_names or root == "distllm"
        assert known, f"{name_of(path)}:{line}: {root} is not among the known libraries"


def test_every_library_is_declared_and_pinned():
    declared = (ROOT / "setup.py").read_text()
    pinned = (ROOT / "requirements.lock").read_text().lower()
    for requirement in LIBRARIES.values():
        assert re.search(rf'"{requirement}>=', declared), f"setup.py does not ask for {requirement}"
        assert f"\n{requirement}==" in pinned, f"requirements.lock does not pin {requirement}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short(path):
    lines = path.read_text().splitlines()
    assert len(lines) < 400, f"{name_of(path)} has {len(lines)} lines"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_modules_say_what_lives_in_them(path):
    text = path.read_text()
    if text.strip():
        docstring = ast.get_docstring(ast.parse(text))
        assert docstring, f"{name_of(path)} has no docstring"
        assert len(docstring.splitlines()) <= 14


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_prints_outside_cli_and_tracking(path):
    if name_of(path).startswith(("distllm/cli/", "distllm/tracking/")):
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    printing = [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
    assert printing == [], f"{name_of(path)}: print in lines {printing}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_pickle_no_code_from_config(path):
    for module, line, _ in imports(path):
        assert module.split(".")[0] not in ("pickle", "dill", "shelve", "marshal"), (
            f"{name_of(path)}:{line}"
        )
    for node in ast.walk(ast.parse(path.read_text())):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        forbidden = ("eval", "exec", "torch.load", "torch.save", "hydra.utils.instantiate")
        assert called not in forbidden, f"{name_of(path)}:{node.lineno}: {called}"


def test_no_yaml_names_code_to_call():
    for path in conf_dir().rglob("*.yaml"):
        assert "_target_" not in path.read_text(), path


@pytest.mark.parametrize("group", registry.FOLDERS)
def test_registry_names_are_file_names(group):
    folder = ROOT / registry.FOLDERS[group].replace(".", "/")
    for name in registry.names(group):
        assert (folder / f"{name}.py").is_file()
        assert registry.get(group, name).__module__ == f"{registry.FOLDERS[group]}.{name}"


@pytest.mark.parametrize(
    "group", sorted(set(registry.FOLDERS) - {"objective", "algorithm", "reward"})
)
def test_every_registered_name_can_be_chosen(group):
    if group == "arch":  # presets have names of their own
        assert options_in("arch")
    else:
        assert set(registry.names(group)) == set(options_in(group))


def test_the_training_heart_is_small():
    heart = [PACKAGE / "train/loop.py", PACKAGE / "train/step.py"]
    assert sum(len(path.read_text().splitlines()) for path in heart) < 200


def test_nothing_of_this_machine_is_written_down():
    suffixes = {".py", ".yaml", ".md", ".toml", ".sh", ".lock", ".j2", ".css", ".js"}
    skipped = {".venv", ".git", "runs", "build", "dist", "wandb"}
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if path.suffix in suffixes and not skipped & set(parts) and path != Path(__file__):
            text = path.read_text(encoding="utf-8")
            for word in ("/work/main", "/tmp/venv", "/root/"):
                assert word not in text, f"{'/'.join(parts)} names {word}"
