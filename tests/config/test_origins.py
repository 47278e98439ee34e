"""Where a value comes from."""

import pytest

from distllm.config.files import conf_dir
from distllm.config.origins import explain
from distllm.errors import ConfigError


def one(key: str, *overrides: str):
    (found,) = explain(key, overrides)
    return found


def test_a_dataclass_default():
    found = one("optim.lr")
    assert (found.value, found.default, found.resume) == (0.001, 0.001, "same")
    assert found.origin == "default of AdamWOptions (distllm/optim/options.py)"
    assert "a number" in found.type and "above 0" in found.type
    assert found.meaning.startswith("Peak learning rate")


def test_a_file_then_an_override():
    found = one("train.seq_len", "experiment=skills_sft")
    assert (found.value, found.default) == (96, 256)
    assert found.origin == "conf/experiment/skills_sft.yaml"
    found = one("train.seq_len", "experiment=skills_sft", "train.seq_len=128")
    assert (found.value, found.origin) == (128, "train.seq_len=128 as typed")


def test_the_origin_holds_the_value():
    """The file that is named is read here by another parser and must contain the value."""
    import yaml

    for experiment in ("stdlib_pretrain", "skills_reward"):
        for found in explain("", [f"experiment={experiment}"]):
            if not found.origin.startswith("conf/") or found.key.endswith(".name"):
                continue
            content = yaml.safe_load((conf_dir().parent / found.origin).read_text())
            for word in found.key.split("."):
                content = content[word]
            assert (
                float(content) == found.value
                if isinstance(found.value, float)
                else content == found.value
            )


def test_the_name_of_an_option_comes_from_its_file():
    assert one("schedule.name", "schedule=cosine").origin == "conf/schedule/cosine.yaml"
    assert one("schedule.name").meaning


def test_a_group_and_everything():
    group = explain("stage", ["stage=ppo"])
    assert {f.key for f in group} >= {"stage.kl_coef", "stage.gamma"}
    assert all(f.key.startswith("stage.") for f in group)
    everything = {f.key for f in explain()}
    assert {"run.seed", "arch.d_model", "model", "data.path"} <= everything
    assert len(everything) == len(explain())


def test_free_fields():
    assert one("train.max_steps").resume == "free"
    assert one("engine.compile").resume == "free"


def test_a_typo():
    with pytest.raises(ConfigError, match=r"optim.lrr is not a setting. Did you mean optim.lr\?"):
        explain("optim.lrr")


def test_an_invalid_config_can_still_be_explained():
    assert one("optim.lr", "optim.lr=0").value == 0
