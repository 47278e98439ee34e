"""The report's content: everything that runs recorded, escaped, self-contained, whatever is missing."""

import html.parser
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from fake_runs import BASELINES, CHAIN, TASKS, write_lines, write_pipeline

from distllm.errors import DataError
from distllm.tracking.report import write_report
from distllm.tracking.report_data import load_run
from distllm.tracking.report_panels import verdict


class Page(html.parser.HTMLParser):
    """Collects what the tests ask for, with the standard library's parser."""

    def __init__(self, path):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.data: list[str] = []
        self.plots: list[dict] = []
        self.quiet = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.quiet += tag in ("script", "style")
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "srcset", "data"):
                self.links.append(value or "")
            if name == "data-plot":
                self.plots.append(json.loads(value or ""))

    def handle_endtag(self, tag):
        self.quiet -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.quiet:
            self.data.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.data).split())


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_pipeline(folder / "demo")
    write_pipeline(folder / "other", seed=1, skill=0.3)
    return folder


@pytest.fixture(scope="module")
def page(demo):
    return Page(write_report([demo / "demo"], demo / "out" / "report.html"))


def test_page_shows_what_the_pipeline_recorded(demo, page):
    record = json.loads((demo / "demo" / "pipeline.json").read_text())
    for row in record["table"]:
        assert row["metric"] in page.text
        assert row["note"] in page.text
        assert row["bar"] in page.text
    assert "8 of 9" in page.text  # bars met
    assert "PPO · round 2" in page.text
    for prompt, answer in TASKS:
        assert " ".join(prompt.split()) in page.text
        assert answer in page.text
    for fact in ("12ab12ab", "9f8e7d6c", "3c5a3c5a3c5a", "2.13.0", "5.25M", "stdlib"):
        assert fact in page.text
    assert page.tags.count("svg") == len(page.plots) >= 5 * len(CHAIN)


def test_page_refers_to_nothing_outside_itself(demo, page):
    assert {link for link in page.links if not link.startswith("#")} == {"data:,"}
    source = (demo / "out" / "report.html").read_text()
    assert set(re.findall(r"(?:https?:)?//[a-z][\w./-]+", source)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in source
    assert not re.search(r"url\((?!#)", source)
    assert len(source) < 2_000_000


def test_same_input_gives_the_same_page(demo, tmp_path):
    again = write_report([demo / "demo"], tmp_path / "again.html")
    assert again.read_bytes() == (demo / "out" / "report.html").read_bytes()
    assert list(tmp_path.iterdir()) == [again]  # nothing left over from writing


@pytest.mark.parametrize(
    ("title", "key"),
    [("Gradient norm", "train/grad_norm"), ("Bits per byte, held out", "eval/bits_per_byte")],
)
def test_plot_data_and_drawing_agree_with_the_log(demo, page, title, key):
    """The script's mapping from steps to SVG units is checked against the path that was drawn."""
    rows = [json.loads(r) for r in (demo / "demo" / "pretrain" / "metrics.jsonl").open()]
    logged = [(row["step"], row[key]) for row in rows if key in row]
    source = (demo / "out" / "report.html").read_text()
    source = source[source.index(f"<h3>{title}</h3>") :]
    source = source[: source.index("</svg>")]
    plot = json.loads(html.unescape(re.search(r'data-plot="([^"]*)"', source)[1]))
    (series,) = plot["series"]
    assert [step for step, _ in series["points"]] == [step for step, _ in logged]
    values = [value for _, value in series["points"]]
    if key.startswith("eval/"):
        assert values == [float(f"{value:.5g}") for _, value in logged]
    else:  # smoothed
        assert np.std(values) < np.std([value for _, value in logged])
    path = re.findall(r'<path d="([^"]*)"[^>]*stroke-width: 1.5', source)[-1]
    drawn = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), dtype=float)
    (left, top, right, bottom), x, y = plot["box"], plot["x"], plot["y"]
    for step, value in (series["points"][0], series["points"][-1]):
        at = (
            left + (step - x[0]) / (x[1] - x[0]) * (right - left),
            bottom - (value - y[0]) / (y[1] - y[0]) * (bottom - top),
        )
        assert np.abs(drawn - at).sum(1).min() < 0.1


def test_everything_a_user_wrote_is_escaped(tmp_path):
    evil = '<script>alert("x")</script><img src=http://example.org/x onerror=alert(1)>"\'&'
    run = tmp_path / "run"
    write_pipeline(run, chain=[("pretrain", 1), ("reward", 1), ("ppo", 1)])
    record = json.loads((run / "pipeline.json").read_text())
    record["name"] = evil
    record["baselines"] = {evil: 4.0, "$\\frac{x$": 4.2}
    record["stages"][0]["name"] = evil
    for row in record["table"]:
        row.update(dict.fromkeys(("stage", "metric", "bar", "note", "before", "after"), evil))
    (run / "pipeline.json").write_text(json.dumps(record))
    for stage in ("pretrain", "reward", "ppo"):
        folder = run / stage
        sample = {
            "prompt": evil,
            "response": evil,
            "answer": evil,
            "chosen": evil,
            "rejected": evil,
            "kind": evil,
        }
        write_lines(
            folder / "samples.jsonl",
            [{**sample, "when": when} for when in ("before", "after", evil)],
        )
        write_lines(
            folder / "metrics.jsonl",
            [{"step": 1, "stage": "pretrain", "train/loss": 1.0, evil: 2.0}],
        )
        (folder / "config.yaml").write_text(evil)
        lineage = {
            "parents": {evil: {"dir": evil, "sha256": evil}, "b": {}},
            "data": {"name": evil, "fingerprint": evil},
            "seed": evil,
            "versions": {evil: evil},
        }
        (folder / "lineage.json").write_text(json.dumps(lineage))
        (folder / "result.json").write_text(
            json.dumps({"stage": "pretrain", "metrics": {f"after/{evil}": 1.0, "after/loss": 4.1}})
        )
    plain = Page(write_report([run, run], tmp_path / "report.html"))
    # The page's own, and the data of one table of samples for each stage of each run.
    assert plain.tags.count("script") == 1 + 2 * 3
    assert plain.tags.count("img") == 0
    assert plain.text.count('alert("x")') > 20
    assert {link for link in plain.links if not link.startswith("#")} == {"data:,"}


@pytest.mark.parametrize(
    "missing",
    [
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "result.json",
        "lineage.json",
        "pipeline.json",
    ],
)
def test_missing_or_damaged_pieces_leave_the_rest(tmp_path, missing):
    """Each stage has one file damaged in a way of its own."""
    damages = {
        "sft": lambda content: None,
        "reward": lambda content: "",
        "ppo": lambda content: content[: len(content) // 2],
        "grpo": lambda content: '["a"]',
    }
    run = write_pipeline(tmp_path / "run", chain=[(name, 1) for name in damages])
    for path in run.glob("*/metrics.jsonl"):  # few metrics make few plots, which take time
        rows = [json.loads(line) for line in path.open()]
        kept = ("step", "stage", "train/loss", "rl/reward_mean")
        write_lines(path, [{k: v for k, v in row.items() if k in kept} for row in rows])
    for path in [run / missing, *run.glob(f"*/{missing}")]:
        if path.exists():
            content = damages.get(path.parent.name, damages["ppo"])(path.read_text())
            path.unlink()
            if content is not None:
                path.write_text(content)
    plain = Page(write_report([run], tmp_path / "report.html"))
    found = {"SFT", "Reward model", "PPO", "GRPO"}
    assert {name for name in found if name in plain.text} == found
    # PPO keeps half of its lines.
    assert plain.text.count("Reverse the word: lantern") >= (1 if missing == "samples.jsonl" else 4)
    assert len(plain.plots) == (2 if missing == "metrics.jsonl" else 1 + 1 + 2 + 2)


def test_values_of_strange_types_do_not_stop_the_report(tmp_path):
    run = write_pipeline(tmp_path / "run", chain=[("sft", 1)])
    record = json.loads((run / "pipeline.json").read_text())
    record |= {
        "wall_s": "long",
        "seed": [1],
        "baselines": {"unigram": None},
        "table": [None, {"ok": "yes", "after": {"a": 1}}],
    }
    (run / "pipeline.json").write_text(json.dumps(record))
    (run / "sft" / "result.json").write_text(
        '{"wall_s": null, "num_parameters": "many", "metrics": [1], "steps": -1}'
    )
    (run / "sft" / "lineage.json").write_text('{"parent": "x", "data": 3, "versions": [1]}')
    write_lines(
        run / "sft" / "metrics.jsonl",
        [
            {"step": "a"},
            {"train/loss": 1.0},
            {"step": 2, "train/loss": "NaN", "x": "Infinity", "y": [1], "stage": 3},
        ],
    )
    write_lines(
        run / "sft" / "samples.jsonl",
        [
            {},
            {
                "when": "before",
                "response": None,
                "prompt": [
                    {"role": "system", "content": "be"},
                    {"role": "user", "content": "said"},
                ],
            },
            {"response": 3, "reward": "NaN"},
        ],
    )
    assert "system: be user: said" in Page(write_report([run], tmp_path / "report.html")).text


def test_diverging_run_is_plotted_as_far_as_it_is_finite(tmp_path):
    rows = [{"step": i, "train/loss": 3.0 - i / 100 if i < 60 else "NaN"} for i in range(100)]
    (tmp_path / "run").mkdir()
    write_lines(tmp_path / "run" / "metrics.jsonl", rows)
    plain = Page(write_report([tmp_path / "run"], tmp_path / "report.html"))
    (plot,) = plain.plots
    assert plot["series"][0]["points"][-1][0] == 59
    assert 2.3 < plot["y"][0] < plot["y"][1] < 3.1


def test_running_pipeline_without_its_record_is_found_in_order(tmp_path):
    run = write_pipeline(tmp_path / "run", chain=[("sft", 1), ("reward", 1), ("ppo", 2)])
    (run / "pipeline.json").unlink()
    import os

    for age, path in enumerate(["sft", "reward", "round_2/ppo"]):
        os.utime(run / path / "config.yaml", (1e9 + age, 1e9 + age))
    assert [(s.name, s.round) for s in load_run(run).stages] == [
        ("sft", 1),
        ("reward", 1),
        ("ppo", 2),
    ]


def test_round_is_read_from_the_directory_when_nothing_else_tells(tmp_path):
    run = write_pipeline(tmp_path / "run", chain=[("sft", 1)])
    for name in ("ppo", "ppo-2"):
        (run / name).mkdir()
        write_lines(run / name / "metrics.jsonl", [{"step": 1, "stage": "ppo", "train/loss": 1.0}])
        (run / name / "config.yaml").write_text("")
    (run / "pipeline.json").unlink()
    assert [(s.name, s.round) for s in load_run(run).stages] == [("sft", 1), ("ppo", 1), ("ppo", 2)]
    stages = [{"name": "ppo-2", "dir": "ppo-2", "round": 2}, {"name": "sft-3", "dir": "sft"}]
    (run / "pipeline.json").write_text(json.dumps({"stages": stages}))
    assert [(s.name, s.round) for s in load_run(run).stages] == [("ppo", 2), ("sft-3", 1)]


def test_baselines_come_from_the_stage_without_a_pipeline(tmp_path):
    run = write_pipeline(tmp_path / "run", chain=[("pretrain", 1)]) / "pretrain"
    result = json.loads((run / "result.json").read_text())
    result["metrics"] |= {f"baseline/{name}": value for name, value in BASELINES.items()}
    (run / "result.json").write_text(json.dumps(result))
    assert load_run(run).baselines == BASELINES
    assert "Kneser-Ney 5-gram is ahead" in Page(write_report([run], tmp_path / "r.html")).text


def test_collected_pairs_and_blank_answers_are_shown(tmp_path):
    run = tmp_path / "collect"
    run.mkdir()
    (run / "result.json").write_text('{"stage": "collect", "metrics": {"train/pairs": 64}}')
    pair = {"prompt": [{"role": "user", "content": "Copy: x"}], "chosen": "x", "rejected": "why"}
    write_lines(run / "heldout.jsonl", [pair] * 100)
    answers = {"before": "  \n ", "after": ""}
    write_lines(
        run / "samples.jsonl",
        [{"prompt": "p", "when": when, "response": text} for when, text in answers.items()],
    )
    text = Page(write_report([run], tmp_path / "r.html")).text
    assert "train/pairs 64" in text and "Before" not in text.split("Samples")[0]
    assert text.count("why") == 40
    assert "(white space)" in text and "(empty)" in text


def test_single_train_directory_is_a_run(demo, tmp_path):
    plain = Page(write_report([demo / "demo" / "ppo"], tmp_path / "report.html"))
    assert "Tokens clipped" in plain.text and "Results" not in plain.text


@pytest.mark.parametrize("what", ["absent", "empty"])
def test_directory_without_a_run_is_named(tmp_path, what):
    folder = tmp_path / "nothing"
    if what == "empty":
        folder.mkdir()
    with pytest.raises(
        DataError, match=rf"{re.escape(str(folder))} (is not a directory|holds no run)"
    ):
        write_report([folder], tmp_path / "report.html")
    with pytest.raises(DataError, match="Type: distllm report"):
        write_report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_several_runs_share_plots(demo, tmp_path):
    plain = Page(write_report([demo / "demo", demo / "other"], tmp_path / "report.html"))
    single = Page(demo / "out" / "report.html")
    assert len(plain.plots) == len(single.plots)
    loss = plain.plots[0]["series"]
    assert [(one["label"], one["color"]) for one in loss] == [
        ("demo, training", 1), ("demo, held out", 1), ("other, training", 2), ("other, held out", 2),
    ]  # fmt: skip
    assert loss[3]["points"][-1][1] == pytest.approx(loss[1]["points"][-1][1] - 0.3)


def test_runs_of_one_name_are_told_apart(tmp_path):
    for parent in ("a", "b"):
        write_pipeline(tmp_path / parent / "demo", chain=[("sft", 1)])
    plain = Page(
        write_report([tmp_path / "a" / "demo", tmp_path / "b" / "demo"], tmp_path / "r.html")
    )
    labels = [one["label"] for one in plain.plots[0]["series"]]
    assert labels[0] == f"{tmp_path / 'a' / 'demo'}, training"
    assert len(set(labels)) == 4


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (4.1, "The model is ahead of every statistical model: 4.100 nats per held-out token against "
              "4.300 of the Kneser-Ney 5-gram, the best of them (4.7% lower)."),
        (4.35, "The Kneser-Ney 5-gram is ahead: 4.300 nats per held-out token against 4.350 of the model "
               "(1.2% higher). The model beats: Kneser-Ney 3-gram, Kneser-Ney 2-gram, unigram."),
        (7.0, "The Kneser-Ney 5-gram is ahead: 4.300 nats per held-out token against 7.000 of the model "
              "(62.8% higher)."),
    ],
)  # fmt: skip
def test_verdict_says_who_is_ahead(tmp_path, loss, words):
    run = write_pipeline(tmp_path / "run", chain=[("pretrain", 1)])
    write_lines(
        run / "pretrain" / "metrics.jsonl",
        [{"step": 0, "eval/loss": 8.0}, {"step": 9, "eval/loss": loss}],
    )
    loaded = load_run(run)
    assert loaded.baselines == BASELINES
    assert verdict(loaded, loaded.stages[0]) == words
    assert words in Page(write_report([run], tmp_path / "report.html")).text


def test_report_needs_no_torch(demo, tmp_path):
    script = (
        "import sys; from pathlib import Path\n"
        "sys.modules['torch'] = None\n"
        "from distllm.tracking.report import write_report\n"
        f"write_report([Path({str(demo / 'demo' / 'sft')!r})], Path({str(tmp_path / 'r.html')!r}))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "r.html").stat().st_size > 10_000
