"""What stands beside the weights: tokenizers of each kind and generation settings go through us unchanged."""

import json

import pytest
from patched import with_bug
from tokenizers import Tokenizer, models, pre_tokenizers

from distllm.arch import io
from distllm.arch.hf.family import families
from distllm.arch.io import load_model, save_model
from distllm.testing import parity
from distllm.testing.pairs import CASES

transformers = pytest.importorskip("transformers")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = "some words, and <extra_id_0> more of them"
GENERATION = {
    "do_sample": True, "temperature": 0.7, "top_k": 11, "repetition_penalty": 1.3, "max_length": 55,
}  # fmt: skip


def word_pieces():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
    return transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)})


def unigrams():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return transformers.T5Tokenizer(vocab=pieces + [(c, -3.0) for c in LETTERS], extra_ids=10)


def byte_pairs():
    words = ["<unk>", "<s>", "</s>", "\u2581", *LETTERS]
    return transformers.LlamaTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])


def of_no_class():
    words = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", *LETTERS]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", mask_token="<mask>", padding_side="left", model_max_length=48,
    )  # fmt: skip


def bytes_of_qwen():
    words = ["<|endoftext|>", "\u0120", *LETTERS]
    return transformers.Qwen2Tokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])


OWN = {"bert": word_pieces, "t5": unigrams, "llama": byte_pairs, "qwen2": bytes_of_qwen}


def goes_through(name, tmp_path, saver=save_model):
    """Let transformers write a model with all that stands beside it, read and write it, and compare what is read back."""
    model_type, changes = CASES[name]
    model = parity.reference(families()[model_type], **changes)
    tokenizer = OWN.get(name, of_no_class)()
    can_generate = model.can_generate() and hasattr(model, "generation_config")
    if can_generate:
        special = {f"{x}_token_id": getattr(tokenizer, f"{x}_token_id") for x in ("bos", "pad")}
        ends = [tokenizer.eos_token_id, 7]  # a turn may end otherwise than a text
        model.generation_config.update(**GENERATION, **special, eos_token_id=ends)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    parity.save(model, theirs)
    tokenizer.save_pretrained(theirs)
    saver(*load_model(theirs), ours)
    again, read = (transformers.AutoTokenizer.from_pretrained(f) for f in (ours, theirs))
    assert type(again) is type(read)
    assert again(TEXT).input_ids == read(TEXT).input_ids
    assert again.special_tokens_map == read.special_tokens_map == tokenizer.special_tokens_map
    assert json.loads(again.backend_tokenizer.to_str()) == json.loads(
        read.backend_tokenizer.to_str()
    )
    before, after = (json.loads((f / "tokenizer_config.json").read_text()) for f in (theirs, ours))
    assert before == after
    if can_generate:
        before, after = (
            transformers.GenerationConfig.from_pretrained(f).to_dict() for f in (theirs, ours)
        )
        assert before == after
        transformers.GenerationConfig.from_pretrained(ours).validate(strict=True)
    config, own = (transformers.AutoConfig.from_pretrained(f) for f in (ours, theirs))
    assert config.eos_token_id == tokenizer.eos_token_id
    # RoBERTa's positions begin behind the padding id of the config, whatever the tokenizer says.
    assert config.pad_token_id in (tokenizer.pad_token_id, own.pad_token_id)


@pytest.mark.parametrize("name", CASES)
def test_tokenizer_and_generation_settings_are_those_that_were_read(name, tmp_path):
    goes_through(name, tmp_path)


def test_a_lost_end_is_noticed(tmp_path):
    own = ', *_listed(defaults.get("eos_token_id")), '
    with pytest.raises(AssertionError):
        goes_through("llama", tmp_path, with_bug(io, own, ", ").save_model)
