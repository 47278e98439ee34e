"""SFT with several dialogues in a row: the loss and the gradient of a step are those of padded rows, whatever the split."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from patched import planted

from distllm import registry
from distllm.arch.glm import GLM, GLMOptions
from distllm.arch.hf.family import families
from distllm.config.abilities import packs_dialogues
from distllm.config.checks import check_training
from distllm.config.compose import compose
from distllm.data.datasets import ChatExample
from distllm.engines.base import build_engine
from distllm.engines.options import HardwareOptions
from distllm.engines.processes import processes
from distllm.errors import ConfigError
from distllm.layers import masks
from distllm.objectives import collate
from distllm.objectives.seq2seq import Seq2Seq, last_answer
from distllm.objectives.sft import SFT, SFTOptions, noisy_inputs
from distllm.optim.constant import Constant
from distllm.optim.options import AdamWOptions, ScheduleOptions
from distllm.testing.gloo import run_on
from distllm.testing.stages import SKILLS, StopAfter, run_tiny, timeless_metrics, weights_hash
from distllm.testing.tiny import PAD_ID, VOCAB_SIZE, tiny_decoder
from distllm.train.options import TrainOptions
from distllm.train.source import SampleSource
from distllm.train.step import optimizer_step
from distllm.types import IGNORE_INDEX, sum_by_key

transformers = pytest.importorskip("transformers")

DECODERS = sorted(n for n, f in families().items() if f.arch == "decoder" and f.tiny)
BOTH_SIDES = sorted(n for n, f in families().items() if f.arch == "encoder_decoder")


def dialogues(count=12, seed=0):
    """Dialogues of 4 to 39 tokens with one or two answers each."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        length = int(rng.integers(4, 40))
        ids = rng.integers(4, VOCAB_SIZE - 1, length).tolist()
        mask = [i % (length // 2) >= length // 4 for i in range(length - 1)]
        found.append(ChatExample(ids, [*mask, True], index))
    return found


def model_of(name):
    """Return a small random model in fp64 whose tokens matter to each other."""
    if name == "glm":
        shape = {
            "vocab_size": 97,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 4,
            "d_ff": 64,
        }
        model = GLM(GLMOptions(**shape, max_seq_len=64, blank_id=1, start_id=2))  # fmt: skip
    elif name == "lstm":
        cls = registry.get("arch", "lstm")
        model = cls(cls.Options(d_model=32, d_hidden=48, n_layers=2, vocab_size=97))
    else:
        family = families()[name]
        config = transformers.AutoConfig.for_model(family.model_type, **family.tiny)
        model = registry.get("arch", family.arch)(family.read_options(config.to_dict()))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model.double().eval()


def objective_of(model, pack):
    """Return the objective; packed rows may be up to 48 tokens wide, 8 more than the longest dialogue needs."""
    options = SFTOptions(pack=pack)
    if model.abilities.sft == "seq2seq":
        return Seq2Seq(options, PAD_ID, model.join, 48)
    return SFT(options, PAD_ID, 48)


def step(model, pack, split=(12,)):
    """Return the loss of a step, its gradient by name, and its batches."""
    objective, examples, batches, start = objective_of(model, pack), dialogues(), [], 0
    for size in split:
        batches.append(objective.collate(examples[start : start + size]))
        start += size
    total = sum_by_key(objective.weights(b) for b in batches)["lm"]
    losses = [objective.loss(model, b).losses["lm"] / total for b in batches]
    model.zero_grad()
    sum(losses).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return sum(losses).item(), total.item(), grads, batches


def check(name, splits=((12,),)):
    """Raise AssertionError where packed rows give another step than padded ones."""
    model = model_of(name)
    loss, total, grads, padded = step(model, pack=False)
    scale = max(g.abs().max() for g in grads.values())
    assert scale > 1e-3 and len(padded[0].input_ids) == 12
    learned = sum(sum(e.mask[1:]) for e in dialogues())
    if model.abilities.sft == "seq2seq":
        cuts = [last_answer(e) for e in dialogues()]
        learned = sum(stop - start for start, stop in cuts)
    assert total == learned
    for split in splits:
        other, weight, found, batches = step(model, pack=True, split=split)
        assert all(len(b.input_ids) < n for b, n in zip(batches, split, strict=True))
        assert weight == total
        assert other == pytest.approx(loss, abs=1e-10)
        assert found.keys() == grads.keys()
        assert max((found[n] - g).abs().max() for n, g in grads.items()) <= 1e-10 * scale


@pytest.mark.parametrize("name", [*DECODERS, *BOTH_SIDES, "glm", "lstm"])
def test_a_packed_step_is_the_padded_step(name):
    check(name, ((12,), (7, 5)))


LEAKS = {
    "attention": (masks, "other = segments[:, past:, None] != segments[:, None, :]", "other = segments[:, past:, None] < segments[:, None, :]"),
    "positions": (masks, "starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]", "starts[:, 1:] = False"),
    "one segment": (collate, "marks[to] = segment[which]", "marks[to] = 1"),
    "labels of padding": (collate, '"labels": IGNORE_INDEX', '"labels": 5'),
    "labels shifted": (collate, "out[to] = field[which, column]", "out[to] = field[which, column - 1]"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_is_noticed(name):
    with planted(*LEAKS[name]), pytest.raises(AssertionError):
        check("gpt2")


def test_a_leak_across_the_two_sides_is_noticed():
    own = "visible = queries[:, :, None] == keys[:, None, :]"
    with planted(masks, own, own.replace("==", ">=")), pytest.raises(AssertionError):
        check("bart")


def test_every_token_and_label_is_there_once():
    examples = dialogues(40, seed=3)
    batch = SFT(SFTOptions(pack=True), PAD_ID).collate(examples)
    assert batch.sample_ids.tolist() == list(range(40))
    found = []
    for ids, labels, marks in zip(batch.input_ids, batch.labels, batch.segment_ids, strict=True):
        assert bool((labels[marks == 0] == IGNORE_INDEX).all())
        for segment in range(1, int(marks.max()) + 1):
            places = (marks == segment).nonzero().flatten()
            assert places.tolist() == list(range(places[0], places[-1] + 1))
            found.append((ids[places].tolist(), labels[places].tolist()))
    wanted = [
        (
            e.input_ids[:-1],
            [t if on else IGNORE_INDEX for t, on in zip(e.input_ids[1:], e.mask[1:], strict=True)],
        )
        for e in examples
    ]
    assert sorted(found) == sorted(wanted)
    filled = int((batch.segment_ids != 0).sum()) / batch.segment_ids.numel()
    assert filled > 0.93


def test_rows_are_wider_where_that_saves_padding_and_never_beyond_the_limit():
    """Beside one of 40 tokens, four of 24 need a row each; with 48 columns two of them share one."""
    examples = [ChatExample([5] * n, [True] * n, i) for i, n in enumerate((25, 41, 25, 25, 25))]

    def shape(limit):
        return tuple(SFT(SFTOptions(pack=True), PAD_ID, limit).collate(examples).input_ids.shape)

    assert shape(0) == shape(47) == (5, 40)
    assert shape(48) == shape(1000) == (3, 48)


def test_rows_that_cannot_be_joined_stay_padded():
    examples = [ChatExample([5] * 9, [True] * 9, i) for i in range(3)]
    batch = SFT(SFTOptions(pack=True), PAD_ID).collate(examples)
    assert batch.segment_ids is None and batch.attention_mask is not None


def test_noise_counts_the_tokens_of_its_own_dialogue():
    model, alpha = tiny_decoder(), 7.0
    batch = SFT(SFTOptions(pack=True), PAD_ID).collate(dialogues())
    torch.manual_seed(0)
    draws = [noisy_inputs(model, batch, alpha)["inputs_embeds"] for _ in range(200)]
    noise = (torch.stack(draws) - model.embed(batch.input_ids)).detach().abs().amax(dim=(0, 3))
    assert noise[batch.segment_ids == 0].max() == 0
    for row, marks in enumerate(batch.segment_ids):
        for segment in range(1, int(marks.max()) + 1):
            places = marks == segment
            bound = alpha / (int(places.sum()) * model.options.d_model) ** 0.5
            assert noise[row, places].max() <= 1.0001 * bound
            assert noise[row, places].min() > 0.9 * bound


def weights_after_steps(pack=True):
    """Take five steps, more than an epoch; run on one process or as one rank of several."""
    hardware = HardwareOptions(device="cpu", threads=1)
    options = registry.get("engine", "ddp" if "WORLD_SIZE" in os.environ else "single").Options()
    with processes(options, torch.device("cpu")):
        engine = build_engine(
            "model",
            tiny_decoder().double(),
            options=options,
            hardware=hardware,
            precision="fp32",
            optim=AdamWOptions(eps=1e-3),
        )
        train = TrainOptions(global_batch_size=12, micro_batch_size=3)
        schedule, objective = Constant(ScheduleOptions(), 10), SFT(SFTOptions(pack=pack), PAD_ID)
        source = SampleSource(dialogues(30), engine, objective, schedule, 1e-2, train, seed=0)
        losses, seen = [], []
        for number in range(5):
            (work,), _ = source.next(number)
            result = optimizer_step(engine, work.objective, work.micro_batches, 1e-2)
            losses.append(result.loss)
            seen += [i for b in work.micro_batches for i in b.sample_ids.tolist()]
        weights = {n: p.detach().flatten().tolist() for n, p in engine.model.named_parameters()}
        return {"losses": losses, "weights": weights, "seen": seen, **source.ledger.state()}


@pytest.mark.slow
def test_neither_packing_nor_ranks_change_the_steps():
    """Both sides see each dialogue as often, count it once in the ledger, and end with equal weights."""
    padded, packed = weights_after_steps(pack=False), weights_after_steps(pack=True)
    here = Path(__file__).parent
    shares = run_on(2, "test_sft_packing:weights_after_steps", path=[here, here.parent])
    assert sorted(padded["seen"]) == sorted(packed["seen"]) == sorted(shares[0]["seen"] + shares[1]["seen"])  # fmt: skip
    assert padded["position"] == 60 and len(padded["seen"]) == 60
    for other in (packed, *shares):
        assert (other["position"], other["digest"]) == (padded["position"], padded["digest"])
        assert other["losses"] == pytest.approx(padded["losses"], abs=1e-10)
        for name, wanted in padded["weights"].items():
            assert other["weights"][name] == pytest.approx(wanted, abs=1e-9)


def test_a_packed_run_resumes_bit_for_bit_and_says_how_full_its_rows_are(tmp_path):
    sft = ["stage=sft", *SKILLS, "train.max_steps=4", "train.log_every_steps=1"]
    run_tiny(tmp_path / "whole", sft)
    assert not run_tiny(tmp_path / "parts", sft, StopAfter(2)).finished
    run_tiny(tmp_path / "parts", sft)
    assert weights_hash(tmp_path / "whole") == weights_hash(tmp_path / "parts")
    run_tiny(tmp_path / "padded", [*sft, "stage.pack=false"])
    packed, padded = (
        [r for r in timeless_metrics(tmp_path / n) if "data/packing_efficiency" in r]
        for n in ("whole", "padded")
    )
    assert len(packed) == len(padded) == 4
    for one, other in zip(packed, padded, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)
        assert one["data/packing_efficiency"] > other["data/packing_efficiency"]
        assert one["data/documents_per_row"] > 1 == other["data/documents_per_row"]
        assert one["data/padding_waste"] == pytest.approx(1 - one["data/packing_efficiency"])
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("whole", "padded")]
    assert results[0]["metrics"]["after/loss"] == pytest.approx(
        results[1]["metrics"]["after/loss"], rel=1e-4
    )


def test_what_is_packed_unless_told_otherwise():
    assert packs_dialogues(compose(["stage=sft", "arch=llama_tiny"]))
    assert not packs_dialogues(compose(["stage=sft", "arch=llama_tiny", "stage.pack=false"]))
    assert not packs_dialogues(compose(["stage=sft", "arch=lstm_tiny"]))
    experts = ["stage=sft", "data=skills", "arch.num_experts=4", "arch.experts_per_token=2"]
    assert not packs_dialogues(compose(experts))
    with pytest.raises(ConfigError, match=r"stage\.pack=true.*balance.*Set stage\.pack=false"):
        check_training(compose([*experts, "stage.pack=true"]))
