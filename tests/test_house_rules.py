"""Rules of the house that a machine can check: who may import whom, one door per heavy dependency, sizes, names."""

import ast
import functools
import itertools
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
    "transformers": (
        "distllm/data/",
        "distllm/arch/hf/",
        "distllm/arch/io.py",
        "distllm/testing/parity.py",
    ),
    "tokenizers": ("distllm/data/",),
    "datasets": ("distllm/data/",),
    "matplotlib": ("distllm/tracking/report_plots.py", "distllm/tracking/reliability.py"),
    "math_verify": ("distllm/rl/rewards/rules.py",),
    "peft": ("distllm/arch/adapter.py",),
}
"""Package -> where it may be imported."""

INSIDE_FUNCTIONS = {"deepspeed", "accelerate", "wandb", "tensorboard", "torch.utils.tensorboard", "flash_attn",
                    "transformers", "tokenizers", "datasets", "pyarrow", "rich", "jinja2", "matplotlib",
                    "math_verify", "peft"}  # fmt: skip
"""Never at the top of a file, so that everything imports on a laptop and `--help` is fast."""

LIBRARIES = {
    "torch": "torch",
    "numpy": "numpy",
    "packaging": "packaging",
    "psutil": "psutil",
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
    "math_verify": "math-verify",
    "peft": "peft",
    "accelerate": "accelerate",
    "deepspeed": "deepspeed",
}
"""Everything outside the standard library that distllm imports -> its name in setup.py."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    source = path.read_text()
    try:
        return ast.parse(source)
    except (
        SystemError
    ):  # CPython before 3.11.8 miscounts depth when the collector runs inside a parse
        return ast.parse(source)


@functools.cache
def imports(path: Path) -> list[tuple[str, int, bool]]:
    """List (module, line, whether it is imported when the file is) of each import, those in functions too."""
    found = []

    def visit(node: ast.AST, at_top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, child.lineno, at_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name_of(path)}:{child.lineno}: imports are absolute"
                # `from distllm.engines import base` names a module, `from distllm.types import Batch` does not.
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    inner = ROOT / full.replace(".", "/")
                    is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                    is_torchs = child.module in ("torch", "torch.utils")
                    found.append(
                        (full if is_module or is_torchs else child.module, child.lineno, at_top)
                    )
            else:
                lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                type_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                visit(child, at_top and not lazy and not type_only)

    visit(tree(path), True)
    return found


def all_imports() -> Iterator[tuple[str, str, str, bool]]:
    """Yield (file, file:line, module, at top) of every import in the package."""
    for path in FILES:
        for module, line, at_top in imports(path):
            yield name_of(path), f"{name_of(path)}:{line}", module, at_top


def begins_with(module: str, prefix: str) -> bool:
    return f"{module}.".startswith(f"{prefix}.")


def test_arrows():
    problems = []
    for file, where, module, _ in all_imports():
        own = Path(file).parts[1].removesuffix(".py")
        if own in ("__init__", "__main__") or not begins_with(module, "distllm"):
            continue  # the public surface may import everything
        other = module.split(".")[1] if "." in module else "the public surface"
        is_below = other == own or RANK.get(other, 99) < RANK[own]
        if not is_below and (file, module) not in UPWARD:
            problems.append(f"{where} imports {module}, which is not below {own}")
    assert problems == []


def test_the_exceptions_to_the_arrows_are_real():
    assert {(file, module) for file, _, module, _ in all_imports()} >= UPWARD


def test_every_folder_has_its_place_in_the_arrows():
    present = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert present <= set(RANK)


def test_one_door_per_heavy_dependency():
    outside = [
        f"{where}: {package} belongs in {doors}"
        for file, where, module, _ in all_imports()
        for package, doors in DOORS.items()
        if begins_with(module, package) and not file.startswith(doors)
    ]
    assert outside == []


def test_heavy_dependencies_are_imported_inside_functions():
    at_top_level = [
        f"{where}: import {package} inside the function that needs it"
        for _, where, module, at_top in all_imports()
        for package in INSIDE_FUNCTIONS
        if at_top and begins_with(module, package)
    ]
    assert at_top_level == []


def test_only_known_libraries():
    known = {*LIBRARIES, *sys.stdlib_module_names, "distllm"}
    assert [f"{w}: {m}" for _, w, m, _ in all_imports() if m.split(".")[0] not in known] == []


def test_every_library_is_declared_and_pinned():
    declared = (ROOT / "setup.py").read_text()
    pinned = (ROOT / "requirements.lock").read_text().lower()
    for requirement in LIBRARIES.values():
        assert re.search(rf'"{requirement}>=', declared), f"setup.py does not ask for {requirement}"
        assert f"\n{requirement}==" in pinned, f"requirements.lock does not pin {requirement}"


def test_files_are_short():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: n for name, n in lengths.items() if n >= 400} == {}


def test_modules_say_what_lives_in_them():
    docstrings = {
        name_of(p): ast.get_docstring(tree(p)) or "" for p in FILES if p.read_text().strip()
    }
    assert [name for name, text in docstrings.items() if not text] == []
    assert [name for name, text in docstrings.items() if len(text.splitlines()) > 14] == []


def test_nothing_prints_outside_cli_and_tracking():
    printing = [
        f"{name_of(path)}:{node.lineno}"
        for path in FILES
        if not name_of(path).startswith(("distllm/cli/", "distllm/tracking/"))
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert printing == []


def test_no_pickle_and_no_code_from_data():
    unsafe = ("pickle", "dill", "shelve", "marshal")
    assert [f"{w}: {m}" for _, w, m, _ in all_imports() if m.split(".")[0] in unsafe] == []
    forbidden = ("eval", "exec", "torch.load", "torch.save", "hydra.utils.instantiate")
    calls = [
        f"{name_of(path)}:{node.lineno}: {ast.unparse(node.func)}"
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in forbidden
        # Foreign checkpoints: torch's restricted reader, which runs no code.
        and not (
            name_of(path) == "distllm/arch/files.py"
            and any(ast.unparse(k) == "weights_only=True" for k in node.keywords)
        )
    ]
    assert calls == []


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
    "group", sorted(set(registry.FOLDERS) - {"objective", "algorithm", "reward", "environment"})
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
            for word in (f"{ROOT}/", f"{Path.home()}/"):
                assert word not in text, f"{'/'.join(parts)} names {word}"


def test_test_files_have_names_of_their_own():
    """Without packages pytest imports test files by their bare names: two of one name cannot both be collected."""
    names = sorted(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [a for a, b in itertools.pairwise(names) if a == b] == []
