"""Presets: parameter counts as published, and as transformers counts the same configuration; nothing takes memory."""

import functools
import re
import time

import pytest
import torch

from distllm.arch.hf.family import families, family_of
from distllm.config.compose import compose
from distllm.config.files import first_line, options_in
from distllm.config.footprint import build_meta

transformers = pytest.importorskip("transformers")

PUBLISHED = {
    "bert_tiny": ("4.4M", 0.02),
    "bert_base": ("110M", 0.01),
    "bert_large": ("340M", 0.02),  # the paper's own figure is rounded up
    "modernbert_base": ("149M", 0.01),
    "gpt2_124m": ("124M", 0.005),
    "gpt2_350m": ("355M", 0.005),
    "gpt2_774m": ("774M", 0.005),
    "gpt2_1558m": ("1558M", 0.005),
    "llama3_1b": ("1.24B", 0.005),
    "llama3_3b": ("3.21B", 0.005),
    "llama3_8b": ("8.03B", 0.005),
    "llama3_70b": ("70.6B", 0.005),
    "qwen3_0_6b": ("0.6B", 0.01),
    "qwen3_4b": ("4.0B", 0.01),
    "qwen3_8b": ("8.2B", 0.005),
    "qwen3_30b_a3b": ("30.5B", 0.005),
    "gpt_oss_20b": ("20.9B", 0.005),
    "mistral_7b": ("7.24B", 0.005),
    "gemma3_1b": ("1.0B", 0.005),
    "olmo2_7b": ("7.3B", 0.005),
    "glm4_9b": ("9.4B", 0.005),
}
"""Preset -> (the number its authors give, how far their rounding may be off)."""


@functools.cache
def options_of(preset):
    return compose([f"arch={preset}"], check=False).arch


def count(model):
    return sum(p.numel() for p in model.parameters())


def in_units(text):
    return float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]]


@pytest.mark.parametrize("preset", PUBLISHED)
def test_parameter_counts(preset):
    start = time.perf_counter()
    options = options_of(preset)
    model = build_meta(options)
    ours = count(model)
    published, slack = PUBLISHED[preset]
    assert ours == pytest.approx(in_units(published), rel=slack)
    assert time.perf_counter() - start < 60  # meta tensors: no memory, hardly any time
    family = family_of(options)
    settings = family.write_options(options, "lm")
    config = transformers.AutoConfig.for_model(**settings)
    with torch.device("meta"):
        theirs = getattr(transformers, family.architectures["lm"])(config)
    assert ours == count(theirs)


def test_every_preset_is_counted_or_named_after_no_model():
    """A preset that names a published model has a line above; tiny ones of our own have none."""
    decoders = {
        name for name in options_in("arch") if options_of(name).name in ("decoder", "encoder")
    }
    assert decoders - set(PUBLISHED) == {"llama_tiny"}


@pytest.mark.parametrize("preset", sorted(set(options_in("arch")) - {"auto"}))
def test_the_first_line_of_every_preset_is_its_count(preset):
    """The figure that users read in the file, to its last digit; those of the published models are held above."""
    number, unit = re.match(r"([\d.]+) ([MB]) parameters", first_line("arch", preset)).groups()
    last_digit = 10.0 ** -len(number.partition(".")[2])
    scale = {"M": 1e6, "B": 1e9}[unit]
    ours = count(build_meta(options_of(preset)))
    assert ours / scale == pytest.approx(float(number), abs=0.501 * last_digit)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_named_family_holds_it(preset):
    options = options_of(preset)
    assert options.family in families()
    assert families()[options.family].holds(options)
