"""Files: what can be read, and what each kind of damage is called. Messages are checked for their
values."""

import gzip
import json
import warnings
from hashlib import sha256

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distllm.data.options import DataOptions
from distllm.data.source import open_source
from distllm.errors import ConfigError, DataError
from distllm.types import Dialogue, Document, Pair, Prompt

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def source(path, **options):
    return open_source(DataOptions(name="file", path=str(path), **options), 0)


def both(kind, path, **options):
    """All records of one kind, train and held-out."""
    opened = source(path, **options)
    return [*getattr(opened, kind)("train"), *getattr(opened, kind)("heldout")]


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def write_lines(path, *rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def texts(*values):
    return [{"text": v} for v in values]


# --- what can be read ---


def test_every_format_gives_the_same_documents(tmp_path):
    values = [f"text {i} ü" for i in range(40)]
    held = [t for t in values if int(sha256(t.encode()).hexdigest()[:16], 16) < 0.05 * 16**16]
    rows = texts(*values)
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "d.txt").write_text("\n\n".join(values), encoding="utf-8")
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress("\n\n\n\n".join(values).encode()))
    (tmp_path / "f.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n\r\n").encode())
    (tmp_path / "g.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(values).encode())
    (tmp_path / "h.JSONL").write_text(lines.rstrip("\n"))
    pq.write_table(pa.table({"text": values, "other": range(40)}), tmp_path / "i.parquet")
    (tmp_path / "j.jsonl.zst").write_bytes(zstd(lines.encode()))
    table = pa.table({"text": values})
    with pa.ipc.new_stream(tmp_path / "k.arrow", table.schema) as stream:
        stream.write_table(table)
    with pa.ipc.new_file(tmp_path / "l.arrow", table.schema) as file:
        file.write_table(table)
    cells = [f'{i},"{t}"' for i, t in enumerate(values)]
    (tmp_path / "m.csv").write_text("\n".join(["id,text", *cells]), encoding="utf-8")
    (tmp_path / "n.tsv.gz").write_bytes(gzip.compress("\n".join(["text", *values]).encode()))
    (tmp_path / "o.ndjson").write_text(lines)
    for file in sorted(tmp_path.iterdir()):
        splits = [[d.text for d in source(file).documents(s)] for s in ("train", "heldout")]
        # The split depends on the content alone, so it is the same in every format.
        assert splits == [[t for t in values if t not in held], held], file
    assert len(held) == 2


def test_folders_and_patterns(tmp_path):
    (tmp_path / "sub").mkdir()
    write_lines(tmp_path / "b.jsonl", *texts("b1", "b2"))
    write_lines(tmp_path / "a.jsonl", *texts("a1", "a2"))
    write_lines(tmp_path / "sub" / "c.jsonl", *texts("c1"))
    write_lines(tmp_path / ".hidden.jsonl", *texts("no"))
    (tmp_path / "README.md").write_text("not data")
    assert sorted(d.text for d in both("documents", tmp_path)) == ["a1", "a2", "b1", "b2", "c1"]
    assert sorted(d.text for d in both("documents", tmp_path / "*.jsonl")) == [
        "a1",
        "a2",
        "b1",
        "b2",
    ]
    assert len(both("documents", tmp_path / "**" / "*.jsonl")) == 5


def test_names_that_look_like_patterns(tmp_path):
    file = write_lines(tmp_path / "odd [1].jsonl", *texts("x", "y"))
    assert len(both("documents", file)) == 2


@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        (r"\n\n", ["one\ntwo", "three"]),
        ("", ["one\ntwo\n\n\nthree"]),
        (r"\n", ["one", "two", "three"]),
    ],
)
def test_text_is_cut_at_the_separator(tmp_path, separator, expected):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    opened = source(tmp_path / "a.txt", document_separator=separator, heldout_fraction=0.0)
    assert [d.text for d in opened.documents("train")] == expected


FORMS = {
    "text": ({"text": "t"}, Document(text="t")),
    "messages": ({"messages": [USER, ANSWER]}, Dialogue(messages=[USER, ANSWER])),
    "completion": ({"prompt": "q", "completion": "a"}, Dialogue(messages=[USER, ANSWER])),
    "completion as messages": (
        {"prompt": [USER], "completion": [ANSWER], "task": "x"},
        Dialogue(messages=[USER, ANSWER], task="x"),
    ),
    "pair": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "kind": "sampled", "task": None},
        Pair(prompt=[USER], chosen="a", rejected="b", kind="sampled"),
    ),
    "pair of messages": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "b"}]},
        Pair(prompt=[USER], chosen="a", rejected="b"),
    ),
    "pair of conversations": (
        {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "b"}]},
        Pair(prompt=[USER], chosen="a", rejected="b"),
    ),
    "answer": ({"prompt": "q", "answer": "a"}, Prompt(messages=[USER], answer="a")),
    "messages and answer": (
        {"messages": [USER], "answer": "a"},
        Prompt(messages=[USER], answer="a"),
    ),
    "prompt": ({"prompt": [USER]}, Prompt(messages=[USER])),
    "system may be empty": (
        {"prompt": [{"role": "system", "content": ""}, USER]},
        Prompt(messages=[{"role": "system", "content": ""}, USER]),
    ),
}
KIND = {Document: "documents", Dialogue: "dialogues", Pair: "pairs", Prompt: "prompts"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_columns_decide_the_record(tmp_path, form, suffix):
    row, record = FORMS[form]
    file = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write_lines(file, row)
    else:
        pq.write_table(pa.Table.from_pylist([row]), file)
    opened = source(file, heldout_fraction=0.0)
    kind = KIND[type(record)]
    assert getattr(opened, kind)("train") == [record]
    assert opened.serves[0] == kind


def test_what_else_can_be_made_of_records(tmp_path):
    pairs = source(write_lines(tmp_path / "p.jsonl", FORMS["pair"][0]), heldout_fraction=0.0)
    assert pairs.prompts("train") == [Prompt(messages=[USER])]
    chats = source(write_lines(tmp_path / "d.jsonl", FORMS["messages"][0]), heldout_fraction=0.0)
    assert chats.prompts("train") == [Prompt(messages=[USER], answer="a")]
    asked = source(write_lines(tmp_path / "a.jsonl", FORMS["answer"][0]), heldout_fraction=0.0)
    assert asked.dialogues("train") == [Dialogue(messages=[USER, ANSWER])]
    assert asked.prompts("train")[0].is_text and not chats.prompts("train")[0].is_text
    assert (pairs.checkable, chats.checkable, asked.checkable) == (False, False, True)
    for opened, wanted, held in (
        (pairs, "documents", "holds pairs, from which documents"),
        (pairs, "dialogues", "holds pairs, from which dialogues"),
        (chats, "pairs", r"holds dialogues, from which pairs \(stage=reward or"),
        (asked, "documents", "holds prompts, from which documents"),
    ):
        assert wanted not in opened.serves
        with pytest.raises(ConfigError, match=held):
            getattr(opened, wanted)("train")
    bare = source(write_lines(tmp_path / "b.jsonl", FORMS["prompt"][0]), heldout_fraction=0.0)
    with pytest.raises(ConfigError, match="holds prompts without answers, from which dialogues"):
        bare.dialogues("train")


def test_text_key(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", {"body": "b", "text": 5}, {"body": "c"})
    assert sorted(d.text for d in both("documents", file, text_key="body")) == ["b", "c"]
    with pytest.raises(
        DataError, match=r"1 of 1 .*columns text; there must be one of body, messages"
    ):
        both("documents", write_lines(tmp_path / "b.jsonl", {"text": "t"}), text_key="body")


# --- splits ---


def test_copies_of_a_prompt_fall_on_one_side(tmp_path):
    rows = [
        {"prompt": f"q{i % 50}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(200)
    ]
    opened = source(write_lines(tmp_path / "a.jsonl", *rows), heldout_fraction=0.2)
    train, heldout = (
        {p.prompt[0]["content"] for p in opened.pairs(s)} for s in ("train", "heldout")
    )
    assert not train & heldout
    assert len(train | heldout) == 50
    assert 4 <= len(heldout) <= 16


def test_few_records_still_leave_something_held_out(tmp_path):
    opened = source(write_lines(tmp_path / "a.jsonl", *texts("a", "b", "c")), heldout_fraction=1e-6)
    assert (len(opened.documents("train")), len(opened.documents("heldout"))) == (2, 1)
    alone = source(write_lines(tmp_path / "b.jsonl", *texts("a")))
    assert len(alone.documents("train")) == 1
    with pytest.raises(DataError, match=r"nothing in split heldout .*0\.05.*data\.heldout_path"):
        alone.documents("heldout")


def test_held_out_file_is_used_whole_and_overlap_is_said(tmp_path):
    train = write_lines(tmp_path / "a.jsonl", *texts("a", "b", "c"))
    held = write_lines(tmp_path / "h.jsonl", *texts("x", "c", "y"))
    opened = source(train, heldout_path=str(held))
    with pytest.warns(
        UserWarning, match=r"1 of 3 records in data\.heldout_path are also in data\.path"
    ):
        assert [d.text for d in opened.documents("train")] == ["a", "b", "c"]
    assert [d.text for d in opened.documents("heldout")] == ["x", "c", "y"]
    with pytest.raises(DataError, match=r"data\.heldout_path=.*gone\.jsonl does not exist"):
        source(train, heldout_path=str(tmp_path / "gone.jsonl")).documents("train")


def test_fingerprint_follows_content(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", *texts("a", "b"))
    before = source(file).fingerprint()
    assert source(file).fingerprint() == before
    write_lines(file, *texts("a", "B"))
    assert source(file).fingerprint() != before


# --- damage ---

GOOD = {"text": "fine"}
GOOD_ROWS = [
    ({"messages": [USER, ANSWER]}, "dialogues"),
    ({"prompt": "q", "completion": "a"}, "dialogues"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "pairs"),
    ({"prompt": "q", "answer": "a"}, "prompts"),
]
BAD_LINES = {
    '{"text": "cut': r"not JSON \(Unterminated string",
    '{"text": 5}': "text is int 5, must be a string",
    '{"text": null}': "text is null, must be a string",
    '{"text": ""}': "text is empty",
    '{"text": " \\n"}': "text is empty",
    '{"text": ["a"]}': r"text is list \['a'\]",
    '{"other": "x", "more": 1}': "columns other, more; there must be one of text, messages, prompt",
    "{}": "columns none",
    "[1]": r"list \[1\], must be an object",
    "7": "int 7, must be an object",
    "null": "null, must be an object",
    '{"text": NaN}': "NaN is not a JSON value",
    '{"text": "a", "score": Infinity}': "Infinity is not a JSON value",
    '{"text": "a", "text": "b"}': "the key 'text' stands there twice",
    '{"text": "\\ud83d"}': "half a surrogate pair at character 0",
    '{"text": "a"} {"text": "b"}': r"not JSON \(Extra data",
    "[" * 100_000: "not JSON",
}
BAD_ROWS = {
    '{"messages": []}': r"messages is list \[\], must be a list of messages",
    '{"messages": "hi"}': "messages is str 'hi', must be a list of messages",
    '{"messages": [5]}': r"messages\[1\] is int 5, must be an object",
    '{"messages": [{"role": "user"}]}': r"messages\[1\]\.content is null",
    '{"messages": [{"role": "user", "content": "q"}]}': (
        "messages ends with user, must end with the assistant"
    ),
    '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}': (
        r"messages\[2\]\.content is empty"
    ),
    '{"prompt": [{"role": "assistant", "content": "a"}], "completion": "b"}': (
        "prompt ends with assistant, must not end"
    ),
    '{"prompt": "q", "chosen": "a", "rejected": "a"}': "chosen and rejected are the same: 'a'",
    '{"prompt": "q", "chosen": "a", "rejected": null}': "rejected is null",
    '{"chosen": "a", "rejected": "b"}': "there is no prompt, and chosen and rejected do not begin",
    '{"chosen": "a c", "rejected": "a c"}': "chosen and rejected are the same: 'a c'",
    '{"chosen": "a", "rejected": [{"role": "user", "content": "q"}]}': "neither two whole conv",
    '{"messages": [{"role": "usr", "content": "q"}]}': (
        r"messages\[1\]\.role is 'usr', must be one of assistant, bot"
    ),
    '{"prompt": "q", "answer": 4}': "answer is int 4, must be a string",
}


@pytest.mark.parametrize("line", [*BAD_LINES, *BAD_ROWS], ids=lambda line: line[:30])
def test_bad_lines_are_counted_named_and_skipped_on_request(tmp_path, line):
    good, kind, reason = GOOD, "documents", BAD_LINES.get(line)
    if reason is None:
        names = set(json.loads(line))
        reason = BAD_ROWS[line]
        good, kind = next((g, k) for g, k in GOOD_ROWS if names <= g.keys())
    file = write_lines(tmp_path / "a.jsonl", good, "", line, good, line)
    with pytest.raises(DataError, match=reason) as said:
        both(kind, file)
    assert f"2 of 4 records in data.path={file}" in str(said.value)
    assert f"{file} line 3: " in str(said.value)
    assert "data.on_bad_line=skip" in str(said.value)
    opened = source(file, on_bad_line="skip", heldout_fraction=0.0)
    with pytest.warns(UserWarning, match=r"2 of 4 records .* line 3: .*left out") as warned:
        assert len(getattr(opened, kind)("train")) == 2
    assert len(warned) == 1


def test_half_written_last_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(GOOD) + '\n{"text": "and th')
    with pytest.raises(DataError, match=r"1 of 2 records .*line 2: not JSON .*half-written"):
        both("documents", file)
    file.write_text(json.dumps(GOOD) + '\n{"text": "and th\n')
    with pytest.raises(DataError) as said:
        both("documents", file)
    assert "half-written" not in str(said.value)


def test_a_line_that_is_not_utf8(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b'\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"line 2: not UTF-8 \(byte 13 of the line\)"):
        both("documents", file)


def test_all_lines_bad_cannot_be_skipped(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", "x", "y")
    with pytest.raises(DataError, match=r"2 of 2 records .*line 1"):
        both("documents", file, on_bad_line="skip")


def test_bad_rows_of_json_and_parquet(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([GOOD, {"text": 5}]))
    with pytest.raises(DataError, match=r"1 of 2 .*a\.json item 2: text is int 5"):
        both("documents", tmp_path / "a.json")
    pq.write_table(pa.table({"text": ["a", None, "c"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"1 of 3 .*a\.parquet row 2: text is null"):
        both("documents", tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"2 of 2 .*b\.parquet row 1: text is int 1"):
        both("documents", tmp_path / "b.parquet")


WHOLE_FILES = {
    "empty.jsonl": (b"", "is empty"),
    "blank.txt": (b" \n\n ", "is empty"),
    "empty.parquet": (b"", "is empty"),
    "empty.json": (b"[]", "holds no record"),
    "binary.jsonl": (
        b'{"text": "a"}\n\x00\x01\x02',
        r"zero byte \(line 2, byte 14\): it is binary",
    ),
    "wide.txt": ("hello".encode("utf-16"), "zero byte .*UTF-16"),
    "latin.txt": (b"fine\ncaf\xe9\n", "not UTF-8 text: line 2, byte 8"),
    "object.json": (b'{"text": "a"}', "holds dict; a .json file must hold a list"),
    "cut.json": (b'[{"text": "a"}, {"te', "is not JSON: Unterminated string"),
    "lines.json": (b'{"text": "a"}\n{"text": "b"}\n', r"Extra data.* name it \.jsonl"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 50)[:-12], "not a whole gzip file"),
    "not.jsonl.gz": (b'{"text": "a"}\n', "not a whole gzip file: Not a gzipped file"),
    "not.parquet": (b"PAR1 or so", "cannot be read as parquet"),
    "header.csv": (b"text,text\na,b\n", r"must begin with a line of column names"),
    "cut.jsonl.zst": (zstd(b'{"text": "a"}\n' * 50)[:-9], "not a whole zstd file"),
    "not.jsonl.zst": (b'{"text": "a"}\n', "not a whole zstd file"),
    "not.arrow": (b"ARROW1 or so", "cannot be read as Arrow"),
    "sheet.xlsx": (b"text", r"sheet\.xlsx does not end in \.txt, \.jsonl"),
    "bare": (b"text", r"bare does not end in \.txt, \.jsonl"),
}


@pytest.mark.parametrize("name", WHOLE_FILES)
@pytest.mark.parametrize("mode", ["error", "skip"])
def test_damaged_files_are_refused_by_name(tmp_path, name, mode):
    """Skipping bad lines never hides a damaged file."""
    data, reason = WHOLE_FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=reason) as said:
        both("documents", tmp_path / name, on_bad_line=mode)
    assert name in str(said.value)


def test_a_flipped_bit_in_parquet_is_noticed_where_checksums_were_written(tmp_path):
    file = tmp_path / "a.parquet"
    values = [f"some text number {i}" for i in range(500)]
    pq.write_table(
        pa.table({"text": values}),
        file,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet"):
        both("documents", file)


def test_paths(tmp_path):
    with pytest.raises(ConfigError, match=r"data=file needs data\.path"):
        open_source(DataOptions(name="file"), 0)
    with pytest.raises(DataError, match=r"data\.path=.*gone\.jsonl does not exist"):
        both("documents", tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"is a folder without any \.txt, \.jsonl, .*\.conll file"):
        both("documents", tmp_path)


def test_mixed_records_are_refused(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", GOOD, FORMS["pair"][0])
    said = r"line 2: column text is missing, which line 1 has .*this is chosen\+rejected"
    with pytest.raises(DataError, match=said):
        both("documents", file)
    write_lines(file, FORMS["pair"][0])
    write_lines(tmp_path / "b.jsonl", GOOD)
    with pytest.raises(
        DataError, match=r"mixes .*text \(.*b.jsonl line 1\); chosen\+rejected \(.*a.jsonl line 1\)"
    ):
        both("documents", tmp_path)


def test_good_files_warn_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(both("documents", write_lines(tmp_path / "a.jsonl", *texts("a", "b")))) == 2
