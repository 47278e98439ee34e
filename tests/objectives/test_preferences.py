"""The preference losses: by hand, against TRL, under every split of a batch, and on a task they must learn."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from patched import with_bug

from distllm.data.datasets import UnpairedExample
from distllm.objectives import dpo, kto, orpo, preference, simpo
from distllm.objectives.dpo import DPO, DPOOptions
from distllm.objectives.kto import KTO, KTOOptions
from distllm.objectives.orpo import ORPO, ORPOOptions
from distllm.objectives.preference import Sides
from distllm.objectives.simpo import SimPO, SimPOOptions
from distllm.testing.stages import run_tiny
from distllm.testing.tiny import PAD_ID, pair_examples, single_engine, tiny_decoder
from distllm.train.step import optimizer_step


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


# Two pairs: log-probabilities, lengths, and what the reference says. The log-ratios are 1 and -0.5; -1 and 1.
PAIRS = Sides(
    chosen=f64(-4, -9),
    rejected=f64(-6, -3),
    chosen_lengths=f64(4, 3),
    rejected_lengths=f64(2, 6),
    confidences=f64(1, 1),
    ref_chosen=f64(-5, -8),
    ref_rejected=f64(-5.5, -4),
)

# With beta = 1/2: h = 0.75 and -1; per token (1/4 + 1/4) / 2 and (-1/3 - 1/6) / 2.
BY_HAND = {
    "sigmoid": (DPO, DPOOptions(beta=0.5), (0.3868710061148999, 1.3132616875182228)),
    "smoothed": (
        DPO,
        DPOOptions(beta=0.5, label_smoothing=0.1),
        (0.46187100611489995, 1.2132616875182227),
    ),
    "robust": (
        DPO,
        DPOOptions(beta=0.5, loss="robust", label_smoothing=0.1),
        (0.2931210061148999, 1.4382616875182226),
    ),
    "hinge": (DPO, DPOOptions(beta=0.5, loss="hinge"), (0.25, 2.0)),
    "ipo": (DPO, DPOOptions(beta=0.5, loss="ipo"), (0.25, 2.25)),
    "ipo, summed": (DPO, DPOOptions(beta=0.5, loss="ipo", reduction="sum"), (0.25, 9.0)),
    "per token": (
        DPO,
        DPOOptions(beta=0.5, reduction="mean"),
        (0.5759394198788436, 0.8259394198788436),
    ),
    "simpo": (SimPO, SimPOOptions(beta=2.0, margin=1.0), (0.04858735157374206, 6.00247568513773)),
    "orpo": (ORPO, ORPOOptions(), (0.08620574462785822, 3.415108249624275)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    cls, options, expected = BY_HAND[name]
    got = cls(options, PAD_ID, None).losses(PAIRS)
    torch.testing.assert_close(got, f64(*expected), rtol=1e-12, atol=0)


def test_kto_by_hand():
    """Good with r = 1.5, bad with r = -2 and twice the weight; z = 0.4, beta = 1/2."""
    objective = KTO(KTOOptions(beta=0.5, undesirable_weight=2.0), PAD_ID, None)
    got = objective.losses(f64(1.5, -2), torch.tensor([True, False]), f64(0.4)[0])
    torch.testing.assert_close(got, f64(0.36586440898919925, 0.4629504330019649))


def test_soft_labels_weigh_both_orders():
    """Probability 3/4 that the label is right is three right labels and a wrong one."""
    objective = DPO(DPOOptions(beta=0.5), PAD_ID, None)
    both = objective.losses(PAIRS)
    turned = Sides(
        PAIRS.rejected, PAIRS.chosen, PAIRS.rejected_lengths, PAIRS.chosen_lengths, f64(1, 1),
        PAIRS.ref_rejected, PAIRS.ref_chosen,
    )  # fmt: skip
    expected = 0.75 * both + 0.25 * objective.losses(turned)
    PAIRS.confidences = f64(0.75, 0.75)
    try:
        torch.testing.assert_close(objective.losses(PAIRS), expected)
    finally:
        PAIRS.confidences = f64(1, 1)


@pytest.mark.parametrize("cls", [DPO, SimPO, ORPO])
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
def test_extreme_log_probabilities_stay_finite(cls, size):
    for sign in (1, -1):
        chosen = torch.tensor([-1e-3 * size if sign > 0 else -2.0 * size], requires_grad=True)
        rejected = torch.tensor([-2.0 * size if sign > 0 else -1e-3 * size], requires_grad=True)
        one = torch.ones(1)
        sides = Sides(chosen, rejected, one, one, one, -one, -one)
        loss = cls(cls.Options(), PAD_ID, None).losses(sides).sum()
        loss.backward()
        assert all(torch.isfinite(x).all() for x in (loss, chosen.grad, rejected.grad))


def test_log_complement_at_both_ends():
    log_p = f64(-1e-6, -1e-3, -0.6, -0.7, -5, -50)
    expected = f64(*(math.log(-math.expm1(x)) for x in log_p.tolist()))
    torch.testing.assert_close(orpo._log_complement(log_p), expected)
    assert torch.isfinite(orpo._log_complement(torch.zeros(1)))


# --- TRL ---


def test_orpo_and_simpo_equal_trl():
    trainers = pytest.importorskip("trl.experimental.orpo")
    cpo = pytest.importorskip("trl.experimental.cpo")
    chosen, rejected = PAIRS.chosen / PAIRS.chosen_lengths, PAIRS.rejected / PAIRS.rejected_lengths
    here = SimpleNamespace(device="cpu")
    them = SimpleNamespace(beta=0.1, accelerator=here)
    theirs = trainers.ORPOTrainer.odds_ratio_loss(them, chosen, rejected)[0]
    ours = ORPO(ORPOOptions(), PAD_ID, None).losses(PAIRS)
    # They compute in float32 and subtract beta x log sigmoid from the loss.
    torch.testing.assert_close(-0.1 * ours, theirs.double(), rtol=1e-5, atol=1e-7)
    for smoothing in (0.0, 0.2):
        them = SimpleNamespace(
            alpha=0.0, beta=2.0, simpo_gamma=1.0, loss_type="simpo", label_smoothing=smoothing,
            accelerator=here,
        )  # fmt: skip
        theirs = cpo.CPOTrainer.cpo_loss(them, chosen, rejected)[0]
        options = SimPOOptions(beta=2.0, margin=1.0, label_smoothing=smoothing)
        torch.testing.assert_close(SimPO(options, PAD_ID, None).losses(PAIRS), theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "smoothing"), [("sigmoid", 0.0), ("robust", 0.1), ("hinge", 0.0), ("ipo", 0.0)]
)  # fmt: skip
def test_dpo_equals_the_trainer_of_trl(tmp_path, loss, smoothing):
    """The whole trainer on the same weights and ids: loss and gradient."""
    trl = pytest.importorskip("trl")
    import datasets
    from transformers import AutoModelForCausalLM

    from distllm.arch.io import save_model
    from distllm.data.datasets import PairExample
    from distllm.data.tokenizer import train_tokenizer

    tok = train_tokenizer(["one two three four five six seven eight nine ten"] * 3, 270)
    models = [tiny_decoder(seed=seed, vocab_size=300) for seed in (1, 2)]
    for name, model in zip(("policy", "reference"), models, strict=True):
        save_model(model, tok, tmp_path / name, end_ids=[1])
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("policy", "reference")
    )
    rows = {"prompt": ["one two ", "three"], "chosen": ["three four", " five"], "rejected": ["six", " seven eight"]}  # fmt: skip
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "out"), loss_type=loss, label_smoothing=smoothing, beta=0.3, use_cpu=True,
        bf16=False, per_device_train_batch_size=2, report_to=[], gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(policy, reference, args, train_dataset=datasets.Dataset.from_dict(rows), processing_class=tok)  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()

    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    answer = batch["completion_mask"].bool()
    examples = []
    for row in range(2):
        both = [(ids[i][mask[i] & ~answer[i]].tolist(), ids[i][answer[i]].tolist()) for i in (row, row + 2)]  # fmt: skip
        examples.append(PairExample(both[0][0], both[0][1], both[1][1], "", row))
    objective = DPO(
        DPOOptions(loss=loss, label_smoothing=smoothing, beta=0.3), PAD_ID, models[0].join
    )
    packed = objective.collate(examples)
    objective.prepare(None, single_engine(models[1], trained=False), [examples], [packed])
    ours = objective.loss(models[0], packed).losses["pairs"] / 2
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    weight = dict(models[0].named_parameters())["layers.0.feed_forward.up_proj.weight"].grad
    other = policy.model.layers[0].mlp.up_proj.weight.grad
    torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-6)


# --- whole batches ---


def unpaired_examples(count, seed=0):
    pairs = pair_examples(count + 1, seed)
    return [
        UnpairedExample(p.prompt_ids, p.chosen_ids, i % 3 != 0, i, pairs[i + 1].chosen_ids)
        for i, p in enumerate(pairs[:count])
    ]


CASES = {
    "dpo": lambda join: (DPO(DPOOptions(sft_coef=0.2), PAD_ID, join), pair_examples(8)),
    "ipo": lambda join: (DPO(DPOOptions(loss="ipo"), PAD_ID, join), pair_examples(8)),
    "orpo": lambda join: (ORPO(ORPOOptions(), PAD_ID, join), pair_examples(8)),
    "simpo": lambda join: (SimPO(SimPOOptions(), PAD_ID, join), pair_examples(8)),
    "kto": lambda join: (KTO(KTOOptions(beta=0.7), PAD_ID, join), unpaired_examples(8)),
}
SPLITS = ([8], [4, 4], [1] * 8, [5, 2, 1])


def step_under(split, name, kto_module=None):
    """Take one optimizer step over `split`; return (loss, weights after it)."""
    model, reference = tiny_decoder(seed=0).double(), tiny_decoder(seed=1).double()
    objective, examples = CASES[name](model.join)
    if kto_module:
        objective = kto_module.KTO(KTOOptions(beta=0.7), PAD_ID, model.join)
    engine, frozen = single_engine(model, lr=0.1), single_engine(reference, trained=False)
    groups, start = [], 0
    for size in split:
        groups.append(examples[start : start + size])
        start += size
    batches = [objective.collate(group) for group in groups]
    objective.prepare(engine, frozen, groups, batches)
    result = optimizer_step(engine, objective, batches, 0.1)
    return result.loss, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", CASES)
def test_no_split_changes_the_step(name):
    whole = step_under(SPLITS[0], name)
    for split in SPLITS[1:]:
        loss, weights = step_under(split, name)
        assert loss == pytest.approx(whole[0], rel=1e-12)
        torch.testing.assert_close(weights, whole[1], rtol=1e-7, atol=1e-9)


def test_a_baseline_per_micro_batch_would_be_noticed():
    bad = with_bug(
        kto,
        '        sums = engine.all_sum({"kl": total[0], "count": total[1]})\n'
        '        baseline = baseline_of(sums["kl"], sums["count"])\n'
        "        for batch in batches:\n"
        "            batch.kl_baseline = baseline\n",
        "        for batch, examples in zip(batches, groups):\n"
        "            others = self.collate_others(examples)\n"
        "            now = engine.infer(response_logprobs, others).double()\n"
        "            before = reference.infer(response_logprobs, others).double()\n"
        "            baseline = (now - before).mean().clamp(min=0)\n"
        "            batch.kl_baseline = baseline\n",
    )
    whole, split = (step_under(s, "kto", bad)[0] for s in (SPLITS[0], SPLITS[3]))
    assert whole == pytest.approx(step_under(SPLITS[0], "kto")[0], rel=1e-12)
    assert split != pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_what_was_computed_beforehand_is_what_would_be_computed_live(name):
    from distllm.pipeline.preferences import answer_logprobs

    model, reference = tiny_decoder(seed=0).double(), tiny_decoder(seed=1).double()
    objective, examples = CASES[name](model.join)
    engine, frozen = (single_engine(m, trained=False) for m in (model, reference))
    live = objective.collate(examples)
    objective.prepare(engine, frozen, [examples], [live])
    for example, row in zip(examples, answer_logprobs(frozen, objective, examples, 3), strict=True):
        objective.note_reference(example, row.tolist())
    known = objective.collate(examples)
    objective.prepare(engine, None, [examples], [known])  # nobody to ask
    for a, b in ((live.ref_sums, known.ref_sums), (live.kl_baseline, known.kl_baseline)):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    losses = [objective.loss(model, batch).losses for batch in (live, known)]
    torch.testing.assert_close(losses[0], losses[1])


def test_a_missing_reference_is_refused():
    model = tiny_decoder()
    for name in ("dpo", "kto"):
        objective, examples = CASES[name](model.join)
        with pytest.raises(ValueError, match="call prepare first"):
            objective.loss(model, objective.collate(examples))


def test_at_the_start_policy_and_reference_agree():
    """The first step: every margin is 0, the loss is log 2, and yet there is a gradient."""
    model = tiny_decoder()
    objective, examples = CASES["ipo"](model.join)
    objective.options.loss = "sigmoid"
    batch = objective.collate(examples)
    objective.prepare(None, single_engine(tiny_decoder(), trained=False), [examples], [batch])
    out = objective.loss(model, batch)
    assert out.losses["pairs"].item() / 8 == pytest.approx(math.log(2))
    assert out.metrics["accuracy"][0].item() == 4.0  # ties count half
    out.losses["pairs"].backward()
    assert model.embed.weight.grad.norm() > 1e-3


def test_item_26_ipo_averages_unless_told_otherwise():
    """The two conventions differ, and each is chosen by name; without the division they would not."""
    averaged, summed = (
        DPO(DPOOptions(beta=0.5, loss="ipo", reduction=r), PAD_ID, None).losses(PAIRS)
        for r in ("auto", "sum")
    )
    assert averaged[1].item() == pytest.approx((-1 / 3 - 1 / 6 - 1) ** 2)
    assert summed[1].item() == pytest.approx((-1 - 1 - 1) ** 2)
    bad = with_bug(dpo, "chosen / sides.chosen_lengths, rejected / sides.rejected_lengths", "chosen, rejected")  # fmt: skip
    wrong = bad.DPO(DPOOptions(beta=0.5, loss="ipo"), PAD_ID, None).losses(PAIRS)
    assert wrong[1].item() != pytest.approx(averaged[1].item())


def test_the_prompt_is_not_part_of_the_answer():
    """Log-probabilities of the answer alone, from the rows' own lengths: a brute-force sum over the vocabulary."""
    model = tiny_decoder().double()
    objective, examples = CASES["dpo"](model.join)
    sums = preference.response_logprobs(model, objective.collate(examples))
    for row, (e, side) in enumerate([*((e, "chosen_ids") for e in examples), *((e, "rejected_ids") for e in examples)]):  # fmt: skip
        answer = getattr(e, side)
        ids = torch.tensor([[*e.prompt_ids, *answer]])
        table = model(ids).logits.log_softmax(-1)[0]
        start = len(e.prompt_ids) - 1
        expected = sum(table[start + i, token] for i, token in enumerate(answer))
        assert sums[row].item() == pytest.approx(expected.item())


# --- stages ---

SMALL = [
    "data=file", "data.heldout_fraction=0.2", "train.num_eval_samples=80", "train.seq_len=16",
    "train.global_batch_size=32", "train.micro_batch_size=32", "arch.d_model=32", "arch.vocab_size=320",
    "optim.lr=5e-3",
]  # fmt: skip


@pytest.fixture(scope="module")
def first_letter(tmp_path_factory):
    """Pairs of letters; the better answer is the first, the worse one the second."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrst"
    rows = [
        {"prompt": f"{a} {b}", "chosen": a, "rejected": b} for a in letters for b in letters if a != b
    ]  # fmt: skip
    rng.shuffle(rows)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:360]))
    return path


LEARNERS = {
    "dpo": ["train.max_steps=80", "stage.beta=0.3"],
    "simpo": ["train.max_steps=60"],
    "orpo": ["train.max_steps=60"],
    "kto": [
        "train.max_steps=120", "stage.beta=1", "optim.lr=1e-2", "train.global_batch_size=64",
        "train.micro_batch_size=64",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
def test_learns_to_prefer_the_chosen_answers(tmp_path, first_letter, name):
    """On held-out prompts; which is better shows in nothing but the pairs (the letters are the same)."""
    settings = [f"stage={name}", f"data.path={first_letter}", *SMALL, *LEARNERS[name]]
    metrics = run_tiny(tmp_path / "run", settings).metrics
    assert metrics["after/num_pairs"] >= 40
    assert abs(metrics["before/accuracy"] - 0.5) < 0.15
    assert metrics["after/accuracy"] >= 0.8
    assert metrics["after/accuracy_low"] > 0.7
    assert metrics["after/loss"] < metrics["before/loss"]


@pytest.mark.parametrize("reference", ["precompute", "live"])
def test_kto_resumes_as_if_never_stopped(tmp_path, first_letter, reference):
    from distllm.testing.stages import StopAfter, timeless_metrics, weights_hash

    settings = ["stage=kto", f"data.path={first_letter}", *SMALL, "train.max_steps=6", f"stage.reference={reference}"]  # fmt: skip
    run_tiny(tmp_path / "whole", settings)
    assert not run_tiny(tmp_path / "parts", settings, StopAfter(3)).finished
    run_tiny(tmp_path / "parts", settings)
    assert weights_hash(tmp_path / "whole") == weights_hash(tmp_path / "parts")
    assert timeless_metrics(tmp_path / "whole") == timeless_metrics(tmp_path / "parts")


def test_the_reference_is_asked_once(tmp_path, first_letter, monkeypatch):
    from distllm.pipeline import preferences

    settings = ["stage=dpo", f"data.path={first_letter}", *SMALL, "stage.reference=precompute"]
    run_tiny(tmp_path / "run", [*settings, "train.max_steps=1"])
    kept = (tmp_path / "run" / preferences.REFERENCE_FILE).stat().st_mtime_ns
    monkeypatch.setattr(preferences, "attach_reference", preferences.attach_reference)
    calls = []
    scored = preferences.answer_logprobs
    monkeypatch.setattr(preferences, "answer_logprobs", lambda *a, **k: calls.append(a[0].role) or scored(*a, **k))  # fmt: skip
    run_tiny(tmp_path / "run", [*settings, "train.max_steps=2"])
    assert set(calls) == {"model"}
    assert (tmp_path / "run" / preferences.REFERENCE_FILE).stat().st_mtime_ns == kept


def test_settings_that_cannot_be():
    from distllm.config.compose import compose
    from distllm.errors import ConfigError

    for settings, said in (
        (["stage=dpo", "stage.loss=ipo", "stage.label_smoothing=0.1"], "no meaning with stage.loss=ipo.*sigmoid or"),
        (["stage=dpo", "stage.loss=exo"], "stage.loss=exo must be one of sigmoid, robust, hinge, ipo"),
        (["stage=dpo", "stage.label_smoothing=0.5"], "from 0 to below 0.5"),
        (["stage=kto", "stage.beta=0"], "stage.beta=0.*must be above 0"),
        (["stage=orpo", "stage.odds_coef=0", "stage.sft_coef=0"], "nothing to learn"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            compose([*settings, "data=skills"])


def test_one_answer_alone_is_refused(tmp_path):
    from distllm.errors import DataError

    for name, answers in (("one", "b"), ("two", "cd")):
        rows = [{"prompt": "a" + x, "completion": x, "label": True} for x in answers]
        (tmp_path / name).with_suffix(".jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [f"data.path={tmp_path}/one.jsonl", f"data.heldout_path={tmp_path}/two.jsonl"]
    with pytest.raises(DataError, match="One answer alone cannot be judged"):
        run_tiny(tmp_path / "run", ["stage=kto", *SMALL, *files])


def test_every_loss_of_the_list_is_tried():
    assert {o.loss for _, o, _ in BY_HAND.values() if isinstance(o, DPOOptions)} == set(dpo.LOSSES)
    assert simpo.SimPO in [cls for cls, _, _ in BY_HAND.values()]
