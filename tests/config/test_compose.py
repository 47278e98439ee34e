"""Composition: real dataclasses out, and for every kind of mistake a message with what was set and what to type."""

import functools
import os
import re
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from distllm.arch.decoder import DecoderOptions
from distllm.config import compose as compose_module
from distllm.config.compose import compose
from distllm.config.files import CHOOSABLE, conf_dir, options_in
from distllm.config.schema import Config, leaves, options_of, to_dict
from distllm.errors import ConfigError
from distllm.optim.options import AdamWOptions


def message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return str(caught.value)


def test_the_result_is_made_of_dataclasses_with_their_defaults():
    config = compose(["run.dir=x"])
    assert type(config) is Config and type(config.arch) is DecoderOptions
    assert config.arch == DecoderOptions()
    assert config.optim == AdamWOptions()
    assert isinstance(config.train.max_steps, int) and isinstance(config.optim.lr, float)


def test_overrides_win_over_experiments_and_experiments_over_defaults():
    config = compose(["train.seq_len=64", "experiment=skills_sft"])
    assert config.stage.name == "sft" and config.data.name == "skills"
    assert config.train.global_batch_size == 64
    assert config.train.seq_len == 64
    assert config.optim == AdamWOptions()
    assert compose(["experiment=skills_sft", "stage=pretrain"]).stage.name == "pretrain"
    modern = compose(["experiment=modernbert_mlm", "arch.n_layers=3"])
    assert (modern.arch.family, modern.arch.n_layers, modern.stage.mask_rate) == (
        "modernbert",
        3,
        0.3,
    )


@functools.cache
def composed(group: str, option: str) -> Config:
    return compose([f"{group}={option}"])


@pytest.mark.parametrize("group, option", [(g, o) for g in CHOOSABLE for o in options_in(g)])
def test_every_yaml_composes(group, option):
    config = composed(group, option)
    if group in ("schedule", "tracking", "stage", "data", "engine", "optim"):
        assert getattr(config, group).name == option
    if group == "pipeline":
        assert config.pipeline.name == option


@pytest.mark.parametrize("group", [g for g in CHOOSABLE if g != "experiment"])
def test_every_component_has_a_yaml(group):
    choosable = {getattr(composed(group, o), group).name for o in options_in(group)}
    assert set(options_of(group)) <= choosable


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["lrr=3"], ["lrr", "optim.lr"]),
        (["train.max_step=3"], ["train.max_step ", "train.max_steps"]),
        (["trian.max_steps=3"], ["trian.max_steps", "train.max_steps"]),
        (["optim.learning_rate=3"], ["optim.learning_rate", "optim.lr"]),
        (["batch_size=8"], ["batch_size", "train.global_batch_size"]),
        (["max_seq_length=8"], ["max_seq_length", "arch.max_seq_len"]),
        (["arhc=llama_tiny"], ["arhc", "arch"]),
        (["arch=llama_tyni"], ["arch=llama_tyni", "Did you mean llama_tiny", "Known: "]),
        (["stage=dpoo"], ["stage=dpoo", "ppo", "Did you mean", "Known: "]),
        (["experiment=skill_sft"], ["experiment=skill_sft", "skills_sft"]),
        (["xyzzy=1"], ["xyzzy", "Known: adapter, arch, ", "distllm explain"]),
        (["train=3"], ["train is a group", "train.max_steps"]),
        (["stage.kl_coef=1"], ["stage.kl_coef", "a setting of stage=cispo, ", " and stage=rloo, which"]),
        (["schedule.name=cosine"], ["schedule.name=cosine", "schedule=cosine"]),
        (["train.max_steps=abc"], ["train.max_steps=abc", "an integer", "train.max_steps=100"]),
        (["train.max_steps=1e3"], ["train.max_steps=1e3", "an integer", "Type train.max_steps=1000"]),
        (["train.max_steps=2.5"], ["train.max_steps=2.5", "an integer"]),
        (["train.max_steps=true"], ["train.max_steps=true", "an integer"]),
        (["train.max_steps="], ["train.max_steps=", "an integer"]),
        (["optim.lr=fast"], ["optim.lr=fast", "a number", "optim.lr=0.001"]),
        (["optim.lr=[1]"], ["optim.lr=[1]", "a number"]),
        (["train.shuffle=maybe"], ["train.shuffle=maybe", "true or false", "train.shuffle=true"]),
        (["data.on_bad_line=ignore"], ["data.on_bad_line=ignore", "one of error, skip"]),
        (["generation.stop=x"], ["generation.stop=x", "a list"]),
        (["arch.d_model=null"], ["arch.d_model=null", "an integer"]),
        (["run.dir=null"], ["run.dir=null", "a text"]),
        (["train.max_steps=1,2"], ["train.max_steps=1,2", "several values"]),
        (["train.max_steps=range(1,3)"], ["range(1,3)", "several values"]),
        (["train.max_steps=(1"], ["train.max_steps=(1", "an integer"]),
        (["data.path=${nowhere}"], ["data.path", "nowhere"]),
        (["pipeline.stages=[{nme: a}]"], ["pipeline.stages=", "name, kind, parent"]),
        (["foo"], ["`foo`", "key=value"]),
        (["+new.key=1"], ["`+new.key`", "Type new.key=VALUE"]),
        (["~train.max_steps"], ["`~train.max_steps`", "Type train.max_steps=VALUE"]),
        (["arch@other=llama_tiny"], ["`arch@other`", "is not a key"]),
        (["=3"], ["``", "is not a key"]),
    ],
)  # fmt: skip
def test_mistakes_are_named(overrides, words):
    text = message(*overrides)
    for word in words:
        assert word in text
    assert not re.search(r"omegaconf|hydra|struct|full_key|ListConfig", text, re.IGNORECASE)
    assert "ype +" not in text and "append" not in text  # Hydra would advise +key=value


def test_all_mistakes_are_reported_together():
    text = message("arch=tiny", "arch.foo=1", "lrr=3", "train.max_steps=abc", "optim.eps=x")
    assert text.startswith("4 problems:")
    for word in ("arch=tiny", "optim.lr?", "train.max_steps=abc", "optim.eps=x"):
        assert word in text
    assert "arch.foo" not in text  # cannot be judged while the option is unknown


def test_a_verbs_own_keys_are_suggested():
    with pytest.raises(ConfigError, match=r"promt is not a setting. Did you mean prompt\?"):
        compose(["promt=hello"], also_known=["prompt"])


@pytest.mark.parametrize("key", ["wandb_api_key", "hf_token", "tracking.api_key", "+hf_token"])
def test_secrets_are_refused_and_never_shown(key):
    text = message(f"{key}=hunter2")
    assert "hunter2" not in text
    assert key.lstrip("+") in text
    assert key.startswith("+") or "Set WANDB_API_KEY or HF_TOKEN" in text


def test_text_is_taken_as_typed():
    config = compose(
        ["run.dir=/tmp/my, dir (1)/a=b", "data.path=it's {x}", "model=7", "tokenizer=null"]
    )
    assert config.run.dir == "/tmp/my, dir (1)/a=b"
    assert config.data.path == "it's {x}"
    assert config.model == "7"
    assert config.tokenizer is None
    assert compose(["run.dir='a b'"]).run.dir == "a b"


def test_lists_and_interpolations():
    config = compose(["generation.stop=[a, b]", "arch.max_seq_len=${train.seq_len}"])
    assert config.generation.stop == ["a", "b"]
    assert config.arch.max_seq_len == config.train.seq_len


def test_the_run_directory_is_named_once():
    assert re.fullmatch(r"runs/pretrain-\d{8}-\d{6}", compose([]).run.dir)
    assert re.fullmatch(r"runs/sft-\d{8}-\d{6}", compose(["stage=sft"]).run.dir)
    assert re.fullmatch(r"runs/demo-\d{8}-\d{6}", compose(["pipeline=demo"]).run.dir)
    assert compose(["run.dir=here"]).run.dir == "here"


def test_nothing_is_written_and_the_working_directory_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compose([])
    assert list(tmp_path.iterdir()) == []
    assert Path.cwd() == tmp_path


def test_a_program_around_us_keeps_its_hydra(tmp_path):
    (tmp_path / "theirs.yaml").write_text("a: 1\n")
    compose_module._compose_files.cache_clear()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        compose([])
        assert hydra_compose("theirs").a == 1
    assert not GlobalHydra.instance().is_initialized()


def test_a_yaml_with_an_unknown_key_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "conf"
    for path in conf_dir().rglob("*.yaml"):
        copy = folder / path.relative_to(conf_dir())
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    with (folder / "optim/adamw.yaml").open("a") as file:
        file.write("lrr: 3\n")
    monkeypatch.setattr(compose_module, "conf_dir", lambda: folder)
    text = message("optim=adamw")
    assert "lrr" in text and str(folder) in text and "optim=adamw" in text


def test_the_config_as_plain_data():
    plain = to_dict(compose(["run.dir=x", "data.on_bad_line=skip"]))
    assert plain["train"]["max_steps"] == 100
    assert type(plain["data"]["on_bad_line"]) is str and plain["data"]["on_bad_line"] == "skip"


def test_what_may_change_on_resume():
    free = {leaf.key: leaf.free for leaf in leaves(compose(["stage=ppo", "run.dir=x"]))}
    for key in ("engine.compile", "hardware.threads", "tracking.project", "train.max_steps",
                "train.save_every_steps", "train.micro_batch_size", "run.dir"):  # fmt: skip
        assert free[key], key
    for key in ("optim.lr", "arch.d_model", "run.seed", "train.global_batch_size", "stage.kl_coef",
                "data.path", "train.precision", "model", "schedule.name"):  # fmt: skip
        assert not free[key], key


def test_whole_groups_are_free_whatever_their_options_say():
    config = Config(
        engine=AdamWOptions(),
        tracking=AdamWOptions(),
        hardware=AdamWOptions(),
        optim=AdamWOptions(),
    )
    free = {leaf.key: leaf.free for leaf in leaves(config)}
    assert free["engine.lr"] and free["tracking.lr"] and free["hardware.lr"]
    assert not free["optim.lr"]


def test_the_environment_is_left_alone():
    before = dict(os.environ)
    compose([])
    assert dict(os.environ) == before
