"""The sides of the encoder and encoder-decoder cells of `pretrain_cpu.py`: distllm, transformers' Trainer, bare products.

BERT hides 15% of the tokens of full rows; T5 reads 256 tokens and writes 64. Both sides get the same rows and start from
the same weights. Decoder-only sides are in `pretrain_sides.py`.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from typing import Any

import torch
import torch.nn.functional as F
from pretrain_sides import LR, autocast, timed
from torch import Tensor

from distllm.arch.encoder import Encoder, EncoderOptions
from distllm.arch.encoder_decoder import EncoderDecoder, EncoderDecoderOptions
from distllm.arch.hf import bert, t5
from distllm.engines.base import build_engine
from distllm.engines.options import EngineOptions, HardwareOptions
from distllm.layers.products import product_dtype
from distllm.objectives.clm import CLM
from distllm.objectives.options import PretrainOptions
from distllm.optim.options import AdamWOptions
from distllm.train.step import optimizer_step
from distllm.types import IGNORE_INDEX, Batch

NUM_ROWS, MASK_RATE = 64, 0.15
FULL = {
    "vocab_size": 8192,
    "d_model": 384,
    "n_layers": 6,
    "n_heads": 6,
    "n_kv_heads": 6,
    "d_ff": 1536,
}
TINY = {"vocab_size": 256, "d_model": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "d_ff": 128}


def options_of(family: str, quick: bool) -> Any:
    """Return the shape of the model."""
    sizes: dict[str, Any] = dict(TINY if quick else FULL)
    if family == "bert":
        return EncoderOptions(**sizes, family="bert", max_seq_len=32 if quick else 256)
    return EncoderDecoderOptions(
        **sizes,
        max_seq_len=512,
        norm_eps=1e-6,
        position="relative",  # type: ignore[arg-type]
        attention_scale=1.0,
        gated=False,
        activation="relu",  # type: ignore[arg-type]
        tie_embeddings=True,
        logit_scale=sizes["d_model"] ** -0.5,
    )


def lengths_of(family: str, quick: bool) -> tuple[int, int]:
    """Return tokens read and tokens written per row; an encoder writes none."""
    read = 32 if quick else 256
    return read, 0 if family == "bert" else read // 4


def rows_of(family: str, quick: bool) -> list[dict[str, Tensor]]:
    """Return the rows in transformers' form: input_ids and labels."""
    generator = torch.Generator().manual_seed(0)
    vocab = (TINY if quick else FULL)["vocab_size"]
    read, written = lengths_of(family, quick)
    ids = torch.randint(5, vocab, (NUM_ROWS, read), generator=generator)
    if family == "t5":
        labels = torch.randint(5, vocab, (NUM_ROWS, written), generator=generator)
    else:
        hidden = torch.rand(ids.shape, generator=generator).argsort(1) < round(MASK_RATE * read)
        labels = ids.where(hidden, torch.tensor(IGNORE_INDEX))
        ids = ids.masked_fill(hidden, 4)
    return [{"input_ids": i, "labels": o} for i, o in zip(ids, labels, strict=True)]


def model_of(family: str, quick: bool) -> Any:
    """Build our model."""
    options = options_of(family, quick)
    return Encoder(options) if family == "bert" else EncoderDecoder(options)


class FamilyOurs:
    """distllm: its engine, loss and optimizer step on rows that are prepared beforehand."""

    def __init__(self, family: str, quick: bool, batch: int, precision: str) -> None:
        self.engine = build_engine(
            "policy",
            model_of(family, quick),
            options=EngineOptions(),
            hardware=HardwareOptions(device="cpu"),
            precision=precision,
            optim=AdamWOptions(lr=LR),
        )
        self.objective = CLM(PretrainOptions(), pad_id=0)
        self.rows, self.batch, self.at = rows_of(family, quick), batch, 0
        self.is_t5 = family == "t5"

    def _next(self) -> Batch:
        picked = [self.rows[(self.at + i) % NUM_ROWS] for i in range(self.batch)]
        self.at += self.batch
        ids, labels = (torch.stack([r[k] for r in picked]) for k in ("input_ids", "labels"))
        if not self.is_t5:
            return Batch(input_ids=ids, labels=labels, segment_ids=torch.ones_like(ids))
        return Batch(input_ids=ids, labels=labels, decoder_input_ids=F.pad(labels[:, :-1], (1, 0)))

    def loss(self) -> float:
        """Return the mean loss of the first batch, training nothing."""
        self.at = 0
        batch = self._next()
        out = self.engine.infer(lambda model: self.objective.loss(model, batch))
        return float(out.losses["lm"] / self.objective.weights(batch)["lm"])

    def run(self, steps: int) -> list[float]:
        """Train; return the seconds of each timed step."""
        return timed(
            lambda: optimizer_step(self.engine, self.objective, [self._next()], LR) and None, steps
        )


class FamilyTrainer:
    """transformers' model of the family under its Trainer."""

    def __init__(
        self,
        family: str,
        quick: bool,
        batch: int,
        precision: str,
        attention: str = "sdpa",
        **more: Any,
    ) -> None:
        import transformers

        source = model_of(family, quick)
        translator: Any = bert.FAMILY if family == "bert" else t5.FAMILY
        config, tensors = translator.to_hf(source.options, source.state_dict(), "lm")
        config |= {"attn_implementation": attention}
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate"):
            config[name] = 0.0
        names = {
            "bert": ("BertConfig", "BertForMaskedLM"),
            "t5": ("T5Config", "T5ForConditionalGeneration"),
        }
        config_class, model_class = (getattr(transformers, n) for n in names[family])
        self.model = model_class(config_class(**config))
        missing = self.model.load_state_dict(tensors, strict=False).unexpected_keys
        assert not missing, missing
        self.model.tie_weights()
        self.rows, self.batch, self.precision = rows_of(family, quick), batch, precision
        self.settings = {"bf16": precision == "bf16", **more}
        self.ends: list[float] = []
        self.folder = tempfile.TemporaryDirectory()
        self.trainer: Any = None

    def loss(self) -> float:
        """Return the mean loss of the first batch, training nothing."""
        picked = self.rows[: self.batch]
        inputs = {k: torch.stack([r[k] for r in picked]) for k in ("input_ids", "labels")}
        with torch.no_grad(), autocast(self.precision):
            return float(self.model.eval()(**inputs).loss)

    def run(self, steps: int) -> list[float]:
        """Train; return the seconds of each timed step."""
        if self.trainer is None:
            self.trainer = self._build()
        self.ends.clear()
        self.trainer.args.max_steps = steps + 1
        self.trainer.train()
        return [b - a for a, b in itertools.pairwise(self.ends)]

    def _build(self) -> Any:
        import transformers

        ends = self.ends

        class Clock(transformers.TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                ends.append(time.perf_counter())

        arguments = transformers.TrainingArguments(
            output_dir=self.folder.name,
            per_device_train_batch_size=self.batch,
            learning_rate=LR,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **self.settings,
        )
        return transformers.Trainer(
            model=self.model, args=arguments, train_dataset=self.rows, callbacks=[Clock()]
        )


class FamilyProducts:
    """The step's bare matrix products of all linear layers, forward and backward."""

    def __init__(self, family: str, quick: bool, batch: int, precision: str) -> None:
        dtype = product_dtype(torch.bfloat16 if precision == "bf16" else torch.float32, "cpu")
        sizes = TINY if quick else FULL
        d, f, layers = sizes["d_model"], sizes["d_ff"], sizes["n_layers"]
        read, written = (batch * n for n in lengths_of(family, quick))
        block = [(d, d)] * 4 + [(d, f), (f, d)]
        found = [(read, i, o) for i, o in block * layers]
        if family == "t5":
            found += [(written, i, o) for i, o in [*block, (d, d), (d, d)] * layers]
            found += [(read, d, d)] * (2 * layers)  # keys and values of what was read
            found.append((written, d, sizes["vocab_size"]))
        else:
            hidden = batch * round(MASK_RATE * read // batch)
            found += [(hidden, d, d), (hidden, d, sizes["vocab_size"])]
        self.cases = [
            tuple(torch.randn(*s, dtype=dtype) for s in ((rows, i), (o, i), (rows, o)))
            for rows, i, o in found
        ]

    def run(self, steps: int) -> list[float]:
        """Multiply; return the seconds of each timed step."""
        return timed(self._step, steps)

    def _step(self) -> None:
        for x, weight, grad in self.cases:
            F.linear(x, weight)
            torch.mm(grad, weight)
            torch.mm(grad.t(), x)


SIDES = {
    "family ours": FamilyOurs,
    "family trainer": FamilyTrainer,
    "family products": FamilyProducts,
}
