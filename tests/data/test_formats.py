"""Rows as other projects write them, unedited: which record each becomes, and what is refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shared_data import shared

from distllm.data.options import DataOptions
from distllm.data.readers import ReadOptions, read_rows
from distllm.data.source import open_source
from distllm.errors import ConfigError, DataError
from distllm.types import Dialogue, Labelled, Pair, Parallel, Prompt, Tagged, Unpaired


def say(role, content):
    return {"role": role, "content": content}


USER, ANSWER = say("user", "q"), say("assistant", "a")
SYSTEM = say("system", "s")
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
OPENAI = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
HH = "\n\nHuman: q\n\nAssistant: a\n\nHuman: q2\n\nAssistant: "
THREE = [USER, ANSWER, say("user", "q2")]

ROWS = {
    # TRL's types: name, row, kind, record
    "trl standard prompt-completion": (
        {"prompt": "q", "completion": "a"},
        Dialogue(messages=[USER, ANSWER]),
    ),
    "trl conversational prompt-completion": (
        {"prompt": [USER], "completion": [ANSWER]},
        Dialogue(messages=[USER, ANSWER]),
    ),
    "trl explicit preference": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [say("assistant", "b")], "margin": 2},
        Pair(prompt=[USER], chosen="a", rejected="b", margin=2.0),
    ),
    "trl implicit preference": (
        {"chosen": OPENAI, "rejected": [USER, say("assistant", "b")]},
        Pair(prompt=[USER], chosen="a", rejected="b"),
    ),
    "trl implicit preference of texts": (
        {"chosen": "The sky is blue.", "rejected": "The sky is bluish."},
        Pair(prompt=[say("user", "The sky is")], chosen="blue.", rejected="bluish."),
    ),
    "trl unpaired preference": (
        {"prompt": [USER], "completion": [ANSWER], "label": False},
        Unpaired(prompt=[USER], completion="a", good=False),
    ),
    "trl prompt-only with columns": (
        {"prompt": [USER], "solution": "4", "level": 3},
        Prompt(messages=[USER], extra={"solution": "4", "level": 3}),
    ),
    "completion-only: the prompt's own turns are context": (
        {"prompt": THREE, "completion": [ANSWER]},
        Dialogue(messages=[*THREE, ANSWER], learned=[3]),
    ),
    "implicit preference of transcripts": (
        {"chosen": HH + "good", "rejected": HH + "bad "},
        Pair(prompt=THREE, chosen="good", rejected="bad"),
    ),
    "a prompt that is a transcript": (
        {"prompt": HH, "chosen": " good", "rejected": "bad"},
        Pair(prompt=THREE, chosen=" good", rejected="bad"),
    ),
    # LLaMA-Factory
    "alpaca": (
        {"instruction": "q", "input": "", "output": "a", "text": "### Instruction: q"},
        Dialogue(messages=[USER, ANSWER]),
    ),
    "alpaca in full": (
        {
            "instruction": "q",
            "input": "i",
            "output": "a",
            "system": "s",
            "history": [["h", "r"]],
        },
        Dialogue(
            messages=[SYSTEM, say("user", "h"), say("assistant", "r"), say("user", "q\ni"), ANSWER]
        ),
    ),
    "alpaca preference": (
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        Pair(prompt=[USER], chosen="a", rejected="b"),
    ),
    "alpaca kto": (
        {"instruction": "q", "input": "", "output": "a", "kto_tag": True},
        Unpaired(prompt=[USER], completion="a", good=True),
    ),
    "sharegpt": (
        {"conversations": SHAREGPT, "system": "s", "tools": "[]"},
        Dialogue(messages=[SYSTEM, USER, ANSWER]),
    ),
    "sharegpt with tools": (
        {
            "conversations": [
                SHAREGPT[0],
                {"from": "function_call", "value": "f()"},
                {"from": "observation", "value": "1"},
                SHAREGPT[1],
            ]
        },
        Dialogue(messages=[USER, say("assistant", "f()"), say("tool", "1"), ANSWER]),
    ),
    "sharegpt preference": (
        {
            "conversations": SHAREGPT[:1],
            "chosen": SHAREGPT[1],
            "rejected": {"from": "gpt", "value": "b"},
        },
        Pair(prompt=[USER], chosen="a", rejected="b"),
    ),
    "sharegpt kto": (
        {"conversations": SHAREGPT, "kto_tag": False},
        Unpaired(prompt=[USER], completion="a", good=False),
    ),
    "conversations with role and content": (
        {"conversations": OPENAI},
        Dialogue(messages=[USER, ANSWER]),
    ),
    # axolotl, OpenAI
    "messages with a say in what is learned": (
        {"messages": [USER, ANSWER | {"train": False}, USER, ANSWER | {"train": True}]},
        Dialogue(messages=[USER, ANSWER, USER, ANSWER], learned=[3]),
    ),
    "messages with weights": (
        {"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER], "system": "s"},
        Dialogue(messages=[SYSTEM, USER, ANSWER, USER, ANSWER], learned=[4]),
    ),
    "contents in parts": (
        {"messages": [say("user", [{"type": "text", "text": "q"}]), ANSWER | {"tool_calls": None}]},
        Dialogue(messages=[USER, ANSWER]),
    ),
    "preference with messages": (
        {"messages": [USER], "chosen": ANSWER, "rejected": say("assistant", "b")},
        Pair(prompt=[USER], chosen="a", rejected="b"),
    ),
    "soft labels": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "confidence": 0.75},
        Pair(prompt=[USER], chosen="a", rejected="b", confidence=0.75),
    ),
    # encoders, encoder-decoders
    "class of a text": ({"text": "t", "label": 1}, Labelled(texts=["t"], label=1)),
    "GLUE, one text": ({"idx": 0, "sentence": "t", "label": "x"}, Labelled(texts=["t"], label="x")),
    "GLUE, two texts": (
        {"sentence1": "t", "sentence2": "u", "label": 0.5},
        Labelled(texts=["t", "u"], label=0.5),
    ),
    "NLI": (
        {"premise": "t", "hypothesis": "u", "label": 2},
        Labelled(texts=["t", "u"], label=2),
    ),
    "text pair": (
        {"text": "t", "text_pair": "u", "label": 2},
        Labelled(texts=["t", "u"], label=2),
    ),
    "CoNLL": (
        {"tokens": ["A", "b"], "ner_tags": ["B-X", "O"]},
        Tagged(tokens=["A", "b"], tags=["B-X", "O"]),
    ),
    "source and target": ({"source": "s", "target": "t"}, Parallel(source="s", target="t")),
}
KIND = {
    Dialogue: "dialogues",
    Pair: "pairs",
    Prompt: "prompts",
    Unpaired: "unpaired",
    Labelled: "labelled",
    Tagged: "tagged",
    Parallel: "parallel",
}


def source(path, **options):
    options = {"heldout_fraction": 0.0} | options
    return open_source(DataOptions(name="file", path=str(path), **options), 0)


def write(folder, row, suffix="jsonl"):
    file = folder / f"a.{suffix}"
    if suffix == "jsonl":
        file.write_text(json.dumps(row) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row]), file)
    return file


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_other_projects(tmp_path, name):
    row, record = ROWS[name]
    kind = KIND[type(record)]
    for suffix in ("jsonl", "parquet") if "in parts" not in name else ("jsonl",):
        opened = source(write(tmp_path, row, suffix))
        [found] = getattr(opened, kind)("train")
        assert found == record
        assert opened.serves[0] == kind
        assert found.place.endswith("line 1" if suffix == "jsonl" else "row 1")


BAD = [
    ({"prompt": "q", "completion": ""}, "completion is empty"),
    (
        {"prompt": [USER], "completion": [USER]},
        "completion ends with user, must end with the assis",
    ),
    ({"prompt": "q", "completion": "a", "label": "yes"}, "label is str 'yes', must be true .good."),
    ({"prompt": "q", "completion": "a", "label": 2}, "label is int 2"),
    ({"conversations": SHAREGPT[:1]}, "conversations ends with user"),
    ({"conversations": [{"from": "human"}]}, r"conversations\[1\].value is null"),
    ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [1]}]}, "tool_calls"),
    ({"messages": [say("user", [{"type": "image_url"}]), ANSWER]}, r"\[1\] is image_url, and only"),
    ({"messages": [USER, ANSWER | {"weight": 0}]}, "no message of the assistant has a weight"),
    ({"instruction": "q", "output": ""}, "output is empty"),
    ({"instruction": "q", "output": "a", "history": [["x"]]}, r"history\[1\] is list"),
    (
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "x"},
        "margin is str 'x', must be a n",
    ),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "confidence": 0.2}, "confidence is 0.2, must"),
    (
        {"prompt": [USER], "chosen": [*THREE, ANSWER], "rejected": "b"},
        "chosen holds 3 messages after",
    ),
    ({"chosen": HH, "rejected": HH + "b"}, r"chosen, turn 4 \(Assistant\) is empty"),
    ({"chosen": HH + "a", "rejected": "\n\nHuman: x\n\nAssistant: b"}, "differ before their last"),
    ({"tokens": ["a"], "tags": ["x", "y"]}, "1 tokens have 2 tags"),
    ({"tokens": [], "tags": []}, "tokens is list"),
    ({"tokens": ["a"], "tags": [None]}, r"tags\[1\] is null"),
    ({"text": "t", "label": True}, "label is bool True"),
    ({"source": "s", "target": " "}, "target is empty"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=lambda x: None if isinstance(x, dict) else x)
def test_bad_rows_say_why(tmp_path, row, reason):
    with pytest.raises(DataError, match=reason) as said:
        source(write(tmp_path, row)).serves  # noqa: B018
    assert "a.jsonl line 1: " in str(said.value)


def test_a_missing_label_is_said(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [{"text": "t", "label": 1}, {"text": "t", "label": None}]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match="line 2: label is null"):
        source(file).labelled("train")


def test_a_pair_gives_two_judged_answers(tmp_path):
    opened = source(write(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"}))
    assert opened.unpaired("train") == [
        Unpaired(prompt=[USER], completion="a", good=True),
        Unpaired(prompt=[USER], completion="b", good=False),
    ]


def test_parallel_texts_are_dialogues_that_can_be_checked(tmp_path):
    opened = source(write(tmp_path, {"source": "q", "target": "a"}))
    assert opened.dialogues("train") == [Dialogue(messages=[USER, ANSWER])]
    assert opened.prompts("train") == [Prompt(messages=[USER], answer="a")]
    assert opened.checkable


# --- columns named by the user ---


def test_columns_can_be_named(tmp_path):
    file = write(tmp_path, {"question": "q", "answer": "first ... #### 1,000 #### 7", "n": 1})
    as_dialogue = source(file, columns={"prompt": "question", "completion": "answer"})
    [dialogue] = as_dialogue.dialogues("train")
    assert dialogue.messages[1]["content"] == "first ... #### 1,000 #### 7"
    as_prompt = source(file, columns={"prompt": "question"}, answer_after="####")
    assert as_prompt.prompts("train") == [Prompt(messages=[USER], answer="7", extra={"n": 1})]
    with pytest.raises(
        DataError, match=r"column ask .data.columns.prompt. is missing; there are q"
    ):
        source(file, columns={"prompt": "ask"}).prompts("train")
    with pytest.raises(DataError, match=r"answer holds nothing behind '%%' .data.answer_after"):
        source(file, columns={"prompt": "question"}, answer_after="%%").prompts("train")


def test_a_transcript_can_be_imitated(tmp_path):
    file = write(tmp_path, {"chosen": HH + "good", "rejected": HH + "bad"})
    [dialogue] = source(file, columns={"messages": "chosen"}).dialogues("train")
    assert dialogue.messages == [*THREE, say("assistant", "good")]


# --- files whose rows need a word of explanation ---


def test_lines_with_a_pattern(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("1 good film .\n\n0 bad\n")
    [one, two] = source(file, line_pattern=r"(?P<label>\S+) (?P<text>.+)").labelled("train")
    assert (one, two.label) == (Labelled(texts=["good film ."], label="1"), "0")
    file.write_text("IN: jump OUT: JUMP\nIN jump\n")
    pattern = r"IN: (?P<source>.*) OUT: (?P<target>.*)"
    with pytest.raises(DataError, match=r"line 2: 'IN jump\\n' does not match data.line_pattern"):
        source(file, line_pattern=pattern).parallel("train")
    for broken, reason in (("(", "not a regular expression"), ("a(b)", "names no column")):
        with pytest.raises(ConfigError, match=reason):
            source(file, line_pattern=broken).parallel("train")


def test_conll_sentences(tmp_path):
    file = tmp_path / "a.conll"
    file.write_text(
        "-DOCSTART- -X- O O\n\nEU NNP B-ORG\n# SYM O\n\n\n# text = two\nPeter NNP B-PER\n"
    )
    [one, two] = source(file).tagged("train")
    assert one == Tagged(tokens=["EU", "#"], tags=["B-ORG", "O"])
    assert two.tokens == ["Peter"]
    assert two.place.endswith("line 8")
    file.write_text("EU B-ORG\nonly\n")
    with pytest.raises(DataError, match=r"line 1: line 2 holds a word and no tag"):
        source(file).tagged("train")


def test_tables_of_text(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('prompt,completion,label\n"q, and\nmore","say ""a""",TRUE\nq,a,0\n')
    [one, two] = source(file).unpaired("train")
    assert one.prompt[0]["content"] == "q, and\nmore"
    assert (one.completion, one.good, two.good) == ('say "a"', True, False)
    assert two.place.endswith("line 4")
    file.write_text("prompt,completion\nq,a\nq\nq,a,b\n")
    with pytest.raises(DataError, match=r"2 of 3 .*line 3: 1 values for 2 columns .prompt, compl"):
        source(file).dialogues("train")
    quoted = tmp_path / "b.tsv"
    quoted.write_text('text\tlabel\n"open\t1\nclosed"\t0\n')
    assert len(source(quoted, csv_quotes=False).labelled("train")) == 2
    assert len(source(quoted).labelled("train")) == 1


def test_rows_are_read_piece_by_piece(tmp_path):
    """The text of a file is split as if at once, wherever the pieces end."""
    texts = [f"{'x' * (i * 37 % 300)}{i}" for i in range(3000)]
    file = tmp_path / "a.txt"
    for separator in ("\n\n", "<|end|>", "\n"):
        file.write_text(separator.join(texts))
        rows = list(read_rows(file, ReadOptions(separator=separator)))
        assert [r.value["text"] for r in rows] == texts
    first = next(read_rows(file, ReadOptions(separator="\n")))
    assert first.place == "part 1"


def test_class_names_come_with_the_file(tmp_path):
    import datasets

    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": names, "tags": datasets.List(names)}
    )
    rows = {"text": ["t", "u"], "label": [1, 0], "tags": [[0], [1]]}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(tmp_path / "saved")
    assert (tmp_path / "saved" / "state.json").exists()
    hub = tmp_path / "hub"
    hub.mkdir()
    made.to_parquet(hub / "train-00000.parquet")
    made.select([1]).to_parquet(hub / "test-00000.parquet")
    for path in (tmp_path / "saved", hub / "train-00000.parquet", f"hub:{hub}"):
        assert [r.label for r in source(path).labelled("train")] == ["pos", "neg"], path
    [alone] = source(f"hub:{hub}?split=test&streaming=true").labelled("train")
    assert (alone.label, alone.place) == ("neg", f"hub:{hub} test row 1")
    [first] = source(f"hub:{hub}", limit=1).labelled("train")
    assert first.label == "pos"


def test_hub_names_that_cannot_be_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"does not exist .*write hub:org/name"):
        source("org/name").serves  # noqa: B018
    with pytest.raises(DataError, match=r"data\.path=hub:org/name cannot be loaded"):
        source("hub:org/name").serves  # noqa: B018
    with pytest.raises(ConfigError, match=r"not understood .branch.*hub:ORG/NAME\?config=C"):
        source("hub:org/name?branch=x").serves  # noqa: B018


def test_real_files():
    pairs = source(shared("hh_rlhf", "harmless_test.jsonl.gz"), on_bad_line="skip")
    with pytest.warns(UserWarning, match=r"9 of 2312 records"):
        assert len(pairs.pairs("train")) == 2303
    sst2 = source(shared("sst2", "dev.txt"), line_pattern=r"(?P<label>[01]) (?P<text>.+)")
    assert len(sst2.labelled("train")) == 872
    scan = source(
        shared("scan", "test.txt"), line_pattern=r"IN: (?P<source>.+) OUT: (?P<target>.+)"
    )
    assert len(scan.parallel("train")) == 4182
    columns = {"prompt": "question", "answer": "answer"}
    gsm8k = source(shared("gsm8k", "test.jsonl"), columns=columns, answer_after="####")
    assert [p.answer for p in gsm8k.prompts("train")][:3] == ["18", "3", "70000"]
