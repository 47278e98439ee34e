"""Datasets for each stage: what an example holds, and refusals that name the sample and the
numbers."""

import pytest

from distllm.data.chat import encode_answer, encode_dialogue, encode_prompt, end_ids
from distllm.data.datasets import ChatDataset, PairDataset, PromptDataset, text_rows
from distllm.data.options import DataOptions
from distllm.data.source import open_source
from distllm.errors import ConfigError, DataError
from distllm.types import Dialogue, Pair, Prompt

ASK = [{"role": "user", "content": "say one two"}]


def dialogue(answer):
    return Dialogue(messages=[*ASK, {"role": "assistant", "content": answer}])


def test_text_rows_hold_the_whole_text(tok, tmp_path):
    (tmp_path / "a.txt").write_text("one two <|end|>\n\nthree\n\nfür vier", encoding="utf-8")
    options = DataOptions(name="file", path=str(tmp_path / "a.txt"), heldout_fraction=0.0)
    rows = text_rows(open_source(options, 0), tok, 8, "train")
    documents = [tok.decode(ids[:-1]) for ids in rows.documents()]
    assert documents == ["one two <|end|>", "three", "für vier"]
    assert {ids[-1] for ids in rows.documents()} == {tok.eos_token_id}
    assert rows.num_bytes == sum(len(d.encode()) for d in documents)
    assert rows[0].input_ids.shape == (8,)
    # The marker in the text is text.
    assert tok.convert_tokens_to_ids("<|end|>") not in rows.documents()[0]
    tok_without = type(tok)(tokenizer_object=tok.backend_tokenizer)
    with pytest.raises(ConfigError, match="no eos_token"):
        text_rows(open_source(options, 0), tok_without, 8, "train")


def test_chat_examples(tok):
    dialogues = [dialogue("one"), dialogue("two")]
    dataset = ChatDataset(dialogues, tok, 50)
    assert len(dataset) == 2
    for index, item in enumerate(dialogues):
        example = dataset[index]
        assert (example.input_ids, example.mask) == encode_dialogue(tok, item.messages)
        assert example.sample_id == index


def test_pair_examples(tok):
    dataset = PairDataset([Pair(prompt=ASK, chosen="one", rejected="two", kind="sampled")], tok, 50)
    example = dataset[0]
    assert example.prompt_ids == encode_prompt(tok, ASK)
    assert example.chosen_ids == encode_answer(tok, "one")
    assert example.rejected_ids == encode_answer(tok, "two")
    assert example.chosen_ids[-1] == example.rejected_ids[-1] == end_ids(tok)[0]
    assert (example.kind, example.sample_id, len(dataset)) == ("sampled", 0, 1)
    with pytest.raises(DataError, match="pair 1: both answers are 'a'"):
        PairDataset([Pair(prompt=ASK, chosen="a", rejected=r) for r in ("b", "a")], tok, 50)


def test_prompt_examples(tok):
    prompt = Prompt(messages=ASK, answer="one two")
    example = PromptDataset([prompt], tok, 50)[0]
    assert example.prompt_ids == encode_prompt(tok, ASK)
    assert example.prompt is prompt


def test_limits_are_inclusive_and_named(tok):
    length = len(encode_dialogue(tok, dialogue("one two three").messages)[0])
    ChatDataset([dialogue("one two three")], tok, length)
    with pytest.raises(
        DataError,
        match=rf"dialogue 1 has {length} tokens, .* {length - 1}\. Set train\.seq_len={length}",
    ):
        ChatDataset([dialogue("one"), dialogue("one two three")], tok, length - 1)
    prompt, answer = len(encode_prompt(tok, ASK)), len(encode_answer(tok, "one two three"))
    pair = Pair(prompt=ASK, chosen="a", rejected="one two three")
    PairDataset([pair], tok, prompt + answer)
    with pytest.raises(DataError, match=rf"pair 0 has {prompt + answer} tokens"):
        PairDataset([pair], tok, prompt + answer - 1)
    PromptDataset([Prompt(messages=ASK)], tok, prompt)
    with pytest.raises(DataError, match=rf"prompt 0 has {prompt} tokens, .*limit of {prompt - 1}"):
        PromptDataset([Prompt(messages=ASK)], tok, prompt - 1)


def test_bad_dialogues_are_named(tok):
    with pytest.raises(DataError, match="dialogue 1: The dialogue does not end with the assistant"):
        ChatDataset([dialogue("a"), Dialogue(messages=ASK)], tok, 50)
    with pytest.raises(DataError, match="prompt 0: A prompt must end"):
        PromptDataset([Prompt(messages=dialogue("a").messages)], tok, 50)
