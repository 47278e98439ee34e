"""Reward functions in processes: a bad response loses itself and nothing else."""

import http.server
import json
import math
import sys
import threading
import time
from pathlib import Path

import pytest
from patched import with_bug

from distllm.errors import ConfigError
from distllm.rl.options import RLOptions
from distllm.rl.rewards import pool, rules
from distllm.rl.rewards.base import RewardContext, build_reward, parse_reward
from distllm.types import Prompt

sys.path.insert(0, str(Path(__file__).parent))


def context(**options):
    return RewardContext(
        options=RLOptions(**options),
        function="",
        log=None,
        tokenizer=None,
        join=None,
        pad_id=0,
        batch_size=4,
        load=None,
        freeze=None,
    )


class Server(http.server.ThreadingHTTPServer):
    """Says nothing of a caller that has hung up: its complaint would end in the output of whatever test runs then."""

    def handle_error(self, request, client_address):
        pass


def prompts(count, answer="yes", is_text=False, **extra):
    message = {"role": "user", "content": "??"}
    return [
        Prompt(messages=[message], answer=answer, extra=extra, is_text=is_text)
        for _ in range(count)
    ]


@pytest.fixture
def made(request):
    """Build rewards and close them at the end."""
    found = []

    def make(**options):
        found.append(build_reward(context(**options)))
        return found[-1]

    yield make
    for reward in found:
        reward.close()


def check_trap_44(pool_module):
    reward = pool_module.PooledReward(
        "reward_functions:moody", context(reward_timeout_s=0.5, reward_workers=2)
    )
    texts = ["ok", "raise", "hang", "yes", "spin", "die", "nan", "none", "text", "exit", "ok"]
    try:
        started = time.monotonic()
        scores = reward.score(prompts(len(texts)), texts, texts)
        took_s = time.monotonic() - started
        assert [s for s in scores if math.isfinite(s)] == [2.0, 12.0, 2.0]
        lost = {1: "ValueError: no opinion", 2: "took more than 0.5 s", 4: "took more than 0.5 s",
                5: "process died", 6: "nan", 7: "nan", 8: "could not convert", 9: "process died"}  # fmt: skip
        assert sorted(reward.problems) == sorted(lost)
        for place, words in lost.items():
            assert words in reward.problems[place], (place, reward.problems[place])
        assert took_s < 60, "two responses may hang for half a second each"
        assert len(reward.workers) <= 2
        # And the same again: nothing of the first call is left over.
        assert reward.score(prompts(2), texts[:2], ["ok", "ok"]) == [2.0, 2.0]
        assert reward.problems == {}
    finally:
        reward.close()


def test_item_44_a_bad_response_loses_itself_only():
    check_trap_44(pool)
    for old, new in [
        # A hang that stops the run, and a NaN that passes for a reward.
        ('fail(worker, f"took more than', 'raise AssertionError(f"took more than'),
        ('elif not math.isfinite(message["value"]):', "elif False:"),
    ]:
        with pytest.raises(AssertionError):
            check_trap_44(with_bug(pool, old, new))


def test_nothing_survives_the_reward(made):
    reward = made(reward="reward_functions:length", reward_workers=3)
    assert reward.score(prompts(5), [], ["a", "bb", "", "ccc", "d"]) == [1.0, 2.0, 0.0, 3.0, 1.0]
    processes = [w.process for w in reward.workers]
    assert len(processes) == 3
    reward.close()
    assert all(p.poll() is not None for p in processes)


def test_a_function_gets_what_it_names(made):
    reward = made(reward="reward_functions:moody", reward_workers=1)
    assert reward.score(prompts(1, colour="red"), [], ["yes"]) == [112.0]
    trl = made(reward="reward_functions:like_trl", reward_workers=1)
    assert trl.score(prompts(2), [], ["yes", "no"]) == [1.0, 0.0]
    # As TRL does: a text for a text, and a list of one message for messages.
    long = made(reward="reward_functions:long_like_trl", reward_workers=1)
    assert long.score(prompts(1, is_text=True), [], ["four"]) == [4.0]
    assert long.score(prompts(1), [], ["four"]) == [1.0]


def test_data_that_a_reward_cannot_judge_by_is_refused_before_anything_is_sampled(made):
    strict = made(reward="0.5*exact_match + reward_functions:strict", reward_workers=1)
    strict.check([*prompts(2), *prompts(1, difficulty=3)])
    with pytest.raises(ConfigError) as caught:
        strict.check(prompts(2, level=3))
    said = "needs difficulty, which the data does not have. There is prompt, messages, response, task, answer, level."
    assert f"stage.reward=reward_functions:strict {said}" in str(caught.value)
    assert "data.columns={difficulty:COLUMN}" in str(caught.value)
    with pytest.raises(ConfigError, match=r"exact_match .* no prompt of the data has one"):
        strict.check(prompts(2, answer=None, difficulty=3))
    trl = made(reward="reward_functions:like_trl", reward_workers=1)
    trl.check(prompts(1))
    with pytest.raises(ConfigError, match=r"needs answer.* There is prompts, completions, level"):
        trl.check(prompts(1, answer=None, level=1))
    # A pattern needs no answer.
    made(reward="regex", reward_pattern="a", reward_workers=1).check(prompts(1, answer=None))


def test_several_rewards_add_up_with_their_weights(made):
    reward = made(reward="exact_match + 0.5*reward_functions:length", reward_workers=1)
    assert reward.score(prompts(2), [], ["yes", "nope!"]) == [1 + 1.5, 2.5]
    assert reward.means == {"exact_match": 0.5, "reward_functions:length": 4.0}
    scores = reward.score([*prompts(1), *prompts(1, answer=None)], [], ["yes", "yes"])
    assert scores[0] == 2.5 and math.isnan(scores[1])
    assert reward.problems == {1: "exact_match: the prompt has no answer to compare with"}


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("so #### 12", "5 + 7 = 12\n#### 12", 1.0),
        ("#### 3 no, #### 12", "12", 1.0),
        ("#### 1,200", "#### 1200", 1.0),
        ("12", "#### 12", 0.0),
        ("#### 13", "#### 12", 0.0),
        ("#### 13", None, 1.0),
    ],
)
def test_regex(response, answer, expected):
    from distllm.rl.rewards.rules import regex

    assert regex(response, r"#### *(-?[0-9.,]+)", answer) == expected


def test_format_asks_for_a_match_whatever_it_says(made):
    reward = made(reward="regex + 0.5*format", reward_pattern=r"#### (\d+)", reward_workers=1)
    scores = reward.score(prompts(3, answer="12"), [], ["#### 12", "#### 13", "12"])
    assert scores == [1.5, 0.5, 0.0]
    assert reward.means == {"regex": 1 / 3, "format": 2 / 3}


def test_math_verify(made):
    pytest.importorskip("math_verify")
    reward = made(reward="math_verify", reward_workers=1, reward_timeout_s=120.0)
    texts = [r"\boxed{\frac{1}{2}}", "It is 0.5", "It is 2", "nothing"]
    assert reward.score(prompts(4, answer="1/2"), [], texts) == [1.0, 1.0, 0.0, 0.0]
    assert math.isnan(reward.score(prompts(1, answer=None), [], ["1"])[0])


def test_http_retries_and_gives_up(made):
    seen = []

    class Judge(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            sample = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(sample)
            if sample["response"] == "hang":
                time.sleep(3)
            status = 500 if sample["response"] == "down" or len(seen) == 1 else 200
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps({"reward": len(sample["response"])}).encode())

        def log_message(self, *args):
            pass

    server = Server(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/judge"
        reward = made(reward="http", reward_url=url, reward_workers=1, reward_timeout_s=0.5, reward_retries=1)  # fmt: skip
        scores = reward.score(prompts(3), [], ["four", "down", "hang"])
        assert scores[0] == 4.0 and math.isnan(scores[1]) and math.isnan(scores[2])
        assert "500" in reward.problems[1] and ("time" in reward.problems[2] or "took" in reward.problems[2])  # fmt: skip
        assert [s["response"] for s in seen] == ["four", "four", "down", "down", "hang", "hang"]
        assert seen[0]["prompt"] == "??" and seen[0]["answer"] == "yes"
    finally:
        server.shutdown()


@pytest.mark.parametrize("answer", ['{"score": 1}', '{"reward": null}', "[1]", "<html>", ""])
def test_an_endpoint_that_gives_no_reward_is_quoted(answer):
    with pytest.raises(ValueError, match=r"the endpoint answers .* instead of") as error:
        rules._reward_in(answer.encode())
    assert repr(answer) in str(error.value)
    assert rules._reward_in(b'{"reward": "0.5", "why": "x"}') == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reward": "no_such_module:f"}, ["no_such_module", "MODULE:FUNCTION"]),
        ({"reward": "reward_functions:missing"}, ["no function missing"]),
        ({"reward": "reward_functions:not_callable"}, ["no function not_callable"]),
        ({"reward": "exact_mach"}, ["Did you mean exact_match", "MODULE:FUNCTION"]),
        ({"reward": "exact_match + exact_match"}, ["twice"]),
        ({"reward": "much*exact_match"}, ["'much' is not a weight"]),
        ({"reward": "regex"}, ["reward_pattern=''"]),
        ({"reward": "format", "reward_pattern": "("}, ["no regular expression"]),
        ({"reward": "regex", "reward_pattern": "("}, ["no regular expression"]),
        ({"reward": "http", "reward_url": "example.org"}, ["no address"]),
    ],
)
def test_what_cannot_work_is_said_at_the_start(options, words):
    with pytest.raises(ConfigError) as caught:
        build_reward(context(**options, reward_workers=1))
    for word in words:
        assert word in str(caught.value)


def test_expressions():
    assert parse_reward(RLOptions()) == [("exact_match", 1.0)]
    assert parse_reward(RLOptions(reward_model="x")) == [("model", 1.0)]
    expression = "math_verify + 0.2*my_mod.sub:f + -1e-3 * b:g"
    found = [("math_verify", 1.0), ("my_mod.sub:f", 0.2), ("b:g", -1e-3)]
    assert parse_reward(RLOptions(reward=expression)) == found


def test_many_responses_keep_their_places(made):
    reward = made(reward="reward_functions:length", reward_workers=3)
    texts = ["x" * (i * 7 % 50) for i in range(300)]
    assert reward.score(prompts(300), [], texts) == [float(len(t)) for t in texts]


def test_a_worker_starts_without_torch():
    import subprocess

    code = "import sys, distllm.rl.rewards.worker, distllm.rl.rewards.rules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
