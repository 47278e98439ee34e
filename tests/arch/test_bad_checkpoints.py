"""Checkpoints that cannot be used: what was found, what was expected, what to do instead."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from distllm.arch.hf.family import families
from distllm.arch.io import load_model, save_model
from distllm.errors import CheckpointError
from distllm.testing import parity

pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    return parity.save(parity.reference(families()["llama"]), tmp_path / "m")


def pickled(folder, found):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(found(tensors), folder / "pytorch_model.bin")
    return tensors


def test_missing_extra_and_misshapen_tensors_are_listed_and_counted(folder):
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.2.mlp.up_proj.weight"):
        del tensors[name]
    tensors["model.vision.weight"] = torch.zeros(3)
    tensors["lm_head.weight"] = torch.zeros(90, 64)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as found:
        load_model(folder)
    for words in (
        "2 missing: model.norm.weight, model.layers.2.mlp.up_proj.weight",
        "1 not part of the model: model.vision.weight",
        "1 of the wrong shape: lm_head.weight is [90, 64], config.json says [97, 64]",
    ):
        assert words in str(found.value)


def test_a_single_missing_expert_is_named_alone(tmp_path):
    folder = parity.save(parity.reference(families()["qwen3_moe"]), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.4.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"1 missing: model\.layers\.2\.mlp\.experts\.4\.up_proj\.weight\."
    ):
        load_model(folder)


def test_a_pickle_of_plain_tensors_is_read(folder):
    expected, _ = load_model(folder)
    pickled(folder, lambda tensors: tensors)
    loaded, _ = load_model(folder)
    state = loaded.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in expected.state_dict().items())


def test_a_sharded_pickle_is_read(folder):
    expected, _ = load_model(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.bin": names[:7], "b.bin": names[7:]}
    for part, held in parts.items():
        torch.save({n: tensors[n] for n in held}, folder / part)
    weight_map = {n: part for part, held in parts.items() for n in held}
    (folder / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": ' + str(weight_map).replace("'", '"') + "}"
    )
    assert torch.equal(load_model(folder)[0].embed.weight, expected.embed.weight)
    (folder / "a.bin").unlink()
    with pytest.raises(CheckpointError, match=r"a\.bin is missing.*index\.json lists it"):
        load_model(folder)


class Harmful:
    """Would write a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_with_code_is_refused_and_not_run(folder):
    trace = folder / "trace"
    pickled(folder, lambda tensors: {**tensors, "x": Harmful(str(trace))})
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle .* run code"):
        load_model(folder)
    assert not trace.exists()


def test_a_pickle_of_something_else_is_refused(folder):
    pickled(folder, lambda tensors: [1, 2, 3])
    with pytest.raises(CheckpointError, match="holds no table of tensors"):
        load_model(folder)


def test_a_torn_pickle_is_named(folder):
    pickled(folder, lambda tensors: tensors)
    path = folder / "pytorch_model.bin"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged or cut short"):
        load_model(folder)


def test_safetensors_come_before_a_pickle(folder):
    torch.save([1], folder / "pytorch_model.bin")
    load_model(folder)


def test_a_directory_without_weights_says_what_it_looked_for(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_model(folder)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("gemma4", "gemma"), ("qwen3_next", "qwen3"), ("mistral4", "mistral"), ("roberta_prelayernorm", "roberta")],
)  # fmt: skip
def test_an_unknown_family_gets_the_nearest_one_and_the_way_out(folder, given, nearest):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"llama"', f'"{given}"'))
    with pytest.raises(CheckpointError) as found:
        load_model(folder)
    for words in (f"model_type={given}", f"The nearest is {nearest}", f"arch=auto model={folder}"):
        assert words in str(found.value)


def test_a_family_that_cannot_hold_the_model_is_not_written(folder, tmp_path):
    model, _ = load_model(folder)
    model.options.family = "gpt2"
    with pytest.raises(CheckpointError, match=r"arch\.family=gpt2 cannot hold"):
        save_model(model, None, tmp_path / "out")
    model.options.family = "lama"
    with pytest.raises(CheckpointError, match="Did you mean llama"):
        save_model(model, None, tmp_path / "out")


def test_a_sequence_past_the_position_table(tmp_path):
    folder = parity.save(parity.reference(families()["bert"]), tmp_path / "m")
    model, _ = load_model(folder)
    with pytest.raises(ValueError, match=r"65 tokens.*max_seq_len=64"):
        model(torch.zeros(1, 65, dtype=torch.long))
