"""Model directories: what is written is read back, and damage is named."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from distllm.arch.hf.llama import FAMILY
from distllm.arch.io import load_model, read_config, save_model
from distllm.errors import CheckpointError

HEADS = ["lm", "last", "value", "likelihood", "classify", "tag", "none"]


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key) if value is None else config.update({key: value})
    (folder / "config.json").write_text(json.dumps(config))


def retensor(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def saved(build, tmp_path):
    def save(head="lm", **changes):
        model = build(head, **changes)
        save_model(model, None, tmp_path / "m")
        return model, tmp_path / "m"

    return save


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_everything_comes_back(saved, head, tied):
    model, folder = saved(head, tie_embeddings=tied, dropout=0.1)
    if head in ("last", "likelihood"):
        model.head.reward_mean.fill_(1.5)
        model.head.reward_std.fill_(2.5)
        save_model(model, None, folder)
    loaded, _ = load_model(folder)
    assert loaded.options == model.options or loaded.options.d_head == model.d_head
    assert loaded.options.dropout == 0.1
    assert loaded.head_name == head
    assert not loaded.training
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_no_file_but_the_expected_ones(saved):
    _, folder = saved()
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["m"]


def test_tied_copies_are_not_on_disk(saved):
    _, folder = saved(tie_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_a_tied_copy_that_is_on_disk_is_ignored(saved):
    model, folder = saved(tie_embeddings=True)
    copy = model.embed.weight.detach().clone()
    retensor(folder, lambda t: t.update({"lm_head.weight": copy}))
    loaded, _ = load_model(folder)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_a_failed_save_leaves_the_old_directory(saved, build):
    _, folder = saved()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    class Broken:
        bos_token_id = eos_token_id = pad_token_id = 0

        def save_pretrained(self, path):
            raise OSError("disk full")

    with pytest.raises(CheckpointError, match="disk full"):
        save_model(build(), Broken(), folder)
    assert [p.name for p in folder.parent.iterdir()] == ["m"]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_debris_of_killed_saves_is_removed(saved):
    model, folder = saved()
    for kind in ("tmp", "old"):
        (folder.parent / f".m.1.{kind}").mkdir()
    (folder.parent / ".model.1.tmp").mkdir()
    save_model(model, None, folder)
    assert sorted(p.name for p in folder.parent.iterdir()) == [".model.1.tmp", "m"]


def test_end_ids_reach_generation_config(saved):
    model, folder = saved()
    save_model(model, None, folder, end_ids=[7, 5])
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [5, 7]
    assert read_config(folder)["eos_token_id"] is None


def test_state_can_come_from_elsewhere(saved):
    model, folder = saved()
    state = {k: torch.full_like(v, 0.5) for k, v in model.state_dict().items()}
    save_model(model, None, folder, state=state)
    assert (load_model(folder)[0].embed.weight == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_can_be_loaded_in_another_dtype(saved, dtype):
    model, folder = saved()
    loaded, _ = load_model(folder, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(loaded.embed.weight, model.embed.weight.to(dtype))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["last", "value", "likelihood"])
def test_a_language_model_can_be_given_another_head(saved, ids, head, tied):
    model, folder = saved(tie_embeddings=tied)
    one, two, other = (load_model(folder, head=head, seed=s)[0] for s in (3, 3, 4))
    hidden = model(ids).last_hidden_state
    assert torch.equal(one(ids).last_hidden_state, hidden)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    if head == "last":
        assert not torch.equal(one.head.weight, other.head.weight)
    if head == "value":
        assert (one(ids).values == 0).all()
    if head == "likelihood":
        assert torch.equal(one(ids).logits, model(ids).logits)


def test_a_scored_model_cannot_become_a_language_model(saved):
    _, folder = saved("last")
    with pytest.raises(CheckpointError, match=r"head last.*lm was asked for"):
        load_model(folder, head="lm")


def test_a_missing_tensor_is_named(saved):
    _, folder = saved()
    retensor(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder)


def test_a_foreign_tensor_is_named(saved):
    _, folder = saved()
    retensor(folder, lambda t: t.update({"model.extra": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"1 not part of the model: model\.extra"):
        load_model(folder)


def test_a_wrong_shape_is_named_with_both_shapes(saved):
    _, folder = saved()
    retensor(folder, lambda t: t.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \[31\], .* \[32\]"):
        load_model(folder)


def test_a_sharded_directory_is_read(saved):
    model, folder = saved()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for part, keys in (("a.safetensors", names[:5]), ("b.safetensors", names[5:])):
        save_file({k: tensors[k] for k in keys}, folder / part)
        weight_map |= dict.fromkeys(keys, part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(load_model(folder)[0].embed.weight, model.embed.weight)
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors is missing"):
        load_model(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        load_model(folder)


def test_computed_tensors_of_old_files_are_ignored(saved):
    model, folder = saved()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    retensor(folder, lambda t: t.update({name: torch.zeros(4)}))
    assert torch.equal(load_model(folder)[0].embed.weight, model.embed.weight)


def test_a_torn_file_is_named(saved):
    _, folder = saved()
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_model(folder)


def test_not_a_model_directory(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{half")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lama"}, ["model_type=lama", "nearest is llama", "arch=auto"]),
        ({"hidden_act": "mish"}, ["hidden_act=mish", "silu"]),
        ({"attention_bias": True}, ["missing: model.layers.0.self_attn.k_proj.bias"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["rope_type=longrope"]),
        (
            {"architectures": ["LlamaForQuestionAnswering"], "distllm_head": None},
            ["LlamaForQuestionAnswering"],
        ),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"distllm_head": "tail"}, ["distllm_head=tail", "likelihood"]),
    ],
)
def test_what_the_decoder_lacks_is_refused(saved, changes, words):
    _, folder = saved()
    edit(folder, **changes)
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert all(word in str(error.value) for word in words)


def test_old_rope_settings_are_read(saved):
    _, folder = saved(rope_theta=123.0)
    edit(folder, rope_parameters=None)
    assert load_model(folder)[0].options.rope_theta == 123.0


@pytest.mark.parametrize("head", HEADS)
def test_translation_there_and_back(build, head):
    model = build(head, tie_embeddings=False)
    options, state, found = FAMILY.from_hf(*FAMILY.to_hf(model.options, model.state_dict(), head))
    assert found == head
    assert options.d_head == model.d_head
    assert state.keys() == model.state_dict().keys()
