"""`distllm import` and `export`: foreign directories in, directories that transformers reads out, tokenizer included."""

import json

import pytest
import torch
from safetensors.torch import load_file

from distllm.arch.hf.family import families
from distllm.cli.main import main
from distllm.data.tokenizer import train_tokenizer
from distllm.testing import parity

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A Gemma 2 with a tokenizer and its own generation settings, in bfloat16, as a user would download it."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = train_tokenizer(["some words to learn from, and some more words"] * 3, 270)
    family = families()["gemma2"]
    model = parity.reference(family, vocab_size=len(tokenizer)).to(torch.bfloat16)
    model.generation_config.update(
        temperature=0.7, do_sample=True, eos_token_id=[1, 7], pad_token_id=0
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("verb", ["import", "export"])
def test_a_model_goes_through_unchanged(foreign, tmp_path, capsys, verb):
    out = tmp_path / "out"
    assert main([verb, f"model={foreign}", f"out={out}"]) == 0
    text = capsys.readouterr().out
    assert (
        "gemma2, lm head" in text and "in bfloat16" in text and "readable by transformers" in text
    )
    before, after = (load_file(f / "model.safetensors") for f in (foreign, out))
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == transformers.AutoTokenizer.from_pretrained(foreign).get_vocab()
    assert tokenizer.chat_template
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert (generation.temperature, generation.do_sample, generation.pad_token_id) == (0.7, True, 0)
    assert set(generation.eos_token_id) >= {1}
    model = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    assert type(model).__name__ == "Gemma2ForCausalLM"
    assert model.config.attn_logit_softcapping == 4.0


def test_a_tokenizer_with_other_ids_is_refused_in_numbers(foreign, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in foreign.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    train_tokenizer(["aa bb cc dd ee ff aabb ccdd eeff"] * 9, 280).save_pretrained(broken)
    assert main(["import", f"model={broken}", f"out={tmp_path / 'out'}"]) == 2
    message = capsys.readouterr().err
    assert "tokens but the model's arch.vocab_size=270" in message.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_an_unknown_family_points_to_the_wrapper(foreign, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "gemma4"}))
    assert main(["import", f"model={broken}", f"out={tmp_path / 'out'}"]) == 2
    message = capsys.readouterr().err
    assert "The nearest is gemma" in message and "arch=auto" in message
