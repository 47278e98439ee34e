"""Reward functions of every temper, run in processes by the tests."""

import os
import time

CALLS = 0


def length(response):
    return len(response)


def moody(prompt, response, answer, colour=None, **rest):
    """Do to a response what it asks for."""
    print("this must not spoil the pipe")
    if response == "raise":
        raise ValueError("no opinion")
    if response == "hang":
        while True:
            time.sleep(1)
    if response == "spin":
        while True:
            pass
    if response == "die":
        os._exit(3)
    if response == "nan":
        return float("nan")
    if response == "none":
        return None
    if response == "text":
        return "high"
    if response == "exit":
        raise SystemExit(2)
    return float(len(prompt) + 10 * (answer == response) + 100 * (colour == "red"))


def like_trl(prompts, completions, answer, **kwargs):
    assert isinstance(completions[0][0]["content"], str) and prompts[0][0]["role"] == "user"
    return [float(c[0]["content"] == a) for c, a in zip(completions, answer, strict=True)]


def long_like_trl(completions, **kwargs):
    return [float(len(c)) for c in completions]


def strict(response, difficulty, answer=None):
    return float(difficulty)


def slow(response):
    time.sleep(0.2)
    return 1.0


not_callable = 3


def echo(prompt, response):
    """A number that hardly any other prompt and response share."""
    return float(sum((i + 1) * ord(c) for i, c in enumerate(f"{prompt}|{response}")) % 9973)
