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


def test_long_records_can_be_left_out_or_cut(tok):
    short, long = dialogue("one"), dialogue("one two three " * 9)
    long.place = "a.jsonl line 7"
    length = len(encode_dialogue(tok, long.messages)[0])
    with pytest.raises(
        DataError, match=rf"a\.jsonl line 7 has {length} tokens, .*data\.on_long=skip"
    ):
        ChatDataset([short, long], tok, 40, DataOptions())
    said = (
        rf"1 of 2 dialogues are longer than 40 .*, of which 1 are left out; .* line 7 has {length}"
    )
    with pytest.warns(UserWarning, match=said):
        kept = ChatDataset([long, short], tok, 40, DataOptions(on_long="skip"))
    assert [kept[i].sample_id for i in range(len(kept))] == [0]
    assert kept.records == [short]
    with pytest.warns(UserWarning, match="of which 0 are left out"):
        cut = ChatDataset([long, short], tok, 40, DataOptions(on_long="cut"))
    ids, mask = encode_dialogue(tok, long.messages)
    assert (cut[0].input_ids, cut[0].mask) == (ids[:40], mask[:40])  # no end of turn is made up
    asks = len(encode_prompt(tok, ASK))
    with (
        pytest.raises(DataError, match=r"Of 1 dialogues none is left: 0 cannot .* 1 are longer"),
        pytest.warns(UserWarning),
    ):
        ChatDataset([long], tok, asks, DataOptions(on_long="cut"))  # nothing learned is left
    pair = Pair(prompt=ASK, chosen="a", rejected="one two three " * 9)
    brief = Pair(prompt=ASK, chosen="a", rejected="b")
    with pytest.warns(UserWarning, match="1 of 2 pairs are longer than 40"):
        pairs = PairDataset([pair, brief], tok, 40, DataOptions(on_long="cut"))
    assert pairs.records == [brief]


def test_records_that_cannot_be_encoded_can_be_left_out(tok):
    strange = Dialogue(messages=[{"role": "tool", "content": "x"}, *dialogue("a").messages])
    with pytest.warns(
        UserWarning, match="1 of 2 dialogues cannot be encoded .*dialogue 0: .*unknown role tool"
    ):
        kept = ChatDataset([strange, dialogue("a")], tok, 50, DataOptions(on_bad_line="skip"))
    assert len(kept) == 1


def test_only_the_messages_that_are_to_be_learned(tok):
    said = [*dialogue("one").messages, *dialogue("two").messages]
    every, last = (
        ChatDataset([Dialogue(messages=said, learned=learned)], tok, 50)[0]
        for learned in (None, [3])
    )
    alone, _ = encode_dialogue(tok, said[:2])
    assert last.input_ids == every.input_ids
    assert last.mask == [m and i >= len(alone) for i, m in enumerate(every.mask)]
    assert sum(last.mask) == len(encode_answer(tok, "two"))
