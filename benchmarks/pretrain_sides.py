"""The sides of `pretrain_cpu.py`: distllm, transformers' Trainer, a plain nanoGPT-style loop, and bare products.

Every side trains the same model from the same weights on batches of the same size; `run(steps)` returns seconds per step,
data loading and optimizer included. Each side lives in a worker process (`serve`), because allocator settings hold for a
whole process and cannot be taken back.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.arch.hf.llama import FAMILY
from distllm.data.packing import PackedRow
from distllm.engines.base import build_engine
from distllm.engines.hardware import tune_cpu
from distllm.engines.options import EngineOptions, HardwareOptions
from distllm.layers.products import product_dtype
from distllm.objectives.clm import CLM
from distllm.objectives.options import PretrainOptions
from distllm.optim.options import AdamWOptions
from distllm.train.step import optimizer_step

LR = 1e-4
NUM_ROWS = 64


def shape_of(quick: bool) -> DecoderOptions:
    """Return the model that all sides train."""
    if quick:
        return DecoderOptions(
            vocab_size=256,
            d_model=64,
            n_layers=2,
            n_heads=2,
            n_kv_heads=2,
            d_ff=128,
            max_seq_len=32,
        )
    return DecoderOptions(
        vocab_size=8192,
        d_model=384,
        n_layers=6,
        n_heads=6,
        n_kv_heads=6,
        d_ff=1024,
        max_seq_len=256,
    )


def tokens_of(shape: DecoderOptions) -> Tensor:
    """Return the training tokens, [rows, seq + 1]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, shape.vocab_size, (NUM_ROWS, shape.max_seq_len + 1), generator=generator
    )


def timed(step: Callable[[], None], steps: int) -> list[float]:
    """Call `step` once untimed and `steps` times timed."""
    step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


class Ours:
    """distllm: its engine, objective and optimizer step, on packed rows."""

    def __init__(self, shape: DecoderOptions, batch: int, precision: str, compiled: bool) -> None:
        self.engine = build_engine(
            "policy",
            Decoder(shape),
            options=EngineOptions(compile=compiled),
            hardware=HardwareOptions(device="cpu"),
            precision=precision,
            optim=AdamWOptions(lr=LR),
        )
        self.objective, self.batch, self.at = CLM(PretrainOptions(), pad_id=0), batch, 0
        self.rows = [
            PackedRow(row[:-1], row[1:], torch.ones_like(row[1:]), i)
            for i, row in enumerate(tokens_of(shape))
        ]

    def _next(self) -> Any:
        rows = [self.rows[(self.at + i) % NUM_ROWS] for i in range(self.batch)]
        self.at += self.batch
        return self.objective.collate(rows)

    def loss(self) -> float:
        """Return the mean loss of the first batch, training nothing."""
        batch = self.objective.collate(self.rows[: self.batch])
        out = self.engine.infer(lambda model: self.objective.loss(model, batch))
        return float(out.losses["lm"] / self.objective.weights(batch)["lm"])

    def run(self, steps: int) -> list[float]:
        """Train; return the seconds of each timed step."""
        return timed(lambda: self._step(), steps)

    def _step(self) -> None:
        optimizer_step(self.engine, self.objective, [self._next()], LR)


class Trainer:
    """transformers' LlamaForCausalLM under its Trainer; `settings` are TrainingArguments beyond the necessary ones."""

    def __init__(
        self,
        shape: DecoderOptions,
        batch: int,
        precision: str,
        compiled: bool,
        attention: str = "sdpa",
        **settings: Any,
    ) -> None:
        import transformers

        config, tensors = FAMILY.to_hf(shape, Decoder(shape).state_dict(), "lm")
        self.model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**config, attn_implementation=attention)
        )
        self.model.load_state_dict(tensors, strict=False)
        self.model.tie_weights()
        self.rows = [{"input_ids": row[:-1], "labels": row[:-1]} for row in tokens_of(shape)]
        self.batch, self.precision = batch, precision
        self.settings = {"bf16": precision == "bf16", "torch_compile": compiled, **settings}
        self.ends: list[float] = []
        self.folder = tempfile.TemporaryDirectory()
        self.trainer: Any = None

    def loss(self) -> float:
        """Return the mean loss of the first batch, training nothing."""
        ids = torch.stack([row["input_ids"] for row in self.rows[: self.batch]])
        with torch.no_grad(), autocast(self.precision):
            return float(self.model.eval()(input_ids=ids, labels=ids).loss)

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


class PlainBlock(nn.Module):
    """A pre-norm block in plain PyTorch: fused query/key/value product, SDPA, gated feed-forward."""

    def __init__(self, shape: DecoderOptions, source: Any) -> None:
        super().__init__()
        self.n_heads, d = shape.n_heads, shape.d_model
        self.ln_1, self.ln_2 = (nn.RMSNorm(d, eps=shape.norm_eps) for _ in range(2))
        self.c_attn, self.c_proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.c_gate, self.c_fc = (nn.Linear(d, shape.d_ff, bias=False) for _ in range(2))
        self.c_out = nn.Linear(shape.d_ff, d, bias=False)
        a, f = source.attention, source.feed_forward
        with torch.no_grad():
            self.c_attn.weight.copy_(torch.cat((a.q_proj.weight, a.k_proj.weight, a.v_proj.weight)))
            self.c_proj.weight.copy_(a.out_proj.weight)
            self.c_gate.weight.copy_(f.gate_proj.weight)
            self.c_fc.weight.copy_(f.up_proj.weight)
            self.c_out.weight.copy_(f.down_proj.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, c = x.shape
        heads = (
            y.view(b, t, self.n_heads, -1).transpose(1, 2)
            for y in self.c_attn(self.ln_1(x)).split(c, dim=2)
        )
        q, k, v = heads
        q, k = (
            y * cos + torch.cat((-y[..., y.shape[-1] // 2 :], y[..., : y.shape[-1] // 2]), -1) * sin
            for y in (q, k)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(b, t, c))
        h = self.ln_2(x)
        return x + self.c_out(F.silu(self.c_gate(h)) * self.c_fc(h))


class PlainModel(nn.Module):
    """The decoder as one would write it down in an afternoon."""

    def __init__(self, shape: DecoderOptions) -> None:
        super().__init__()
        source = Decoder(shape)
        self.wte = nn.Embedding(shape.vocab_size, shape.d_model, _weight=source.embed.weight.data)
        self.h = nn.ModuleList(PlainBlock(shape, layer) for layer in source.layers)
        self.ln_f = nn.RMSNorm(shape.d_model, eps=shape.norm_eps)
        d_head = shape.d_model // shape.n_heads
        channels = torch.arange(0, d_head, 2) / d_head
        angles = torch.outer(torch.arange(shape.max_seq_len), shape.rope_theta**-channels)
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        if torch.is_autocast_enabled("cpu"):
            cos, sin = cos.bfloat16(), sin.bfloat16()
        for block in self.h:
            x = block(x, cos, sin)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


class Plain:
    """A training loop in the manner of nanoGPT's train.py, written for this benchmark."""

    def __init__(
        self, shape: DecoderOptions, batch: int, precision: str, compiled: bool, **adamw: Any
    ) -> None:
        self.tokens, self.batch, self.precision = tokens_of(shape).numpy(), batch, precision
        self.model = PlainModel(shape)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, **adamw
        )
        self.compiled: Any = torch.compile(self.model) if compiled else self.model
        self.generator = torch.Generator().manual_seed(0)

    def loss(self) -> float:
        """Return the mean loss of the first batch, training nothing."""
        rows = torch.from_numpy(self.tokens[: self.batch])
        with torch.no_grad(), autocast(self.precision):
            return float(self.model(rows[:, :-1], rows[:, 1:]))

    def run(self, steps: int) -> list[float]:
        """Train; return the seconds of each timed step."""
        return timed(self._step, steps)

    def _step(self) -> None:
        picked = torch.randint(NUM_ROWS, (self.batch,), generator=self.generator)
        rows = torch.from_numpy(self.tokens[picked.numpy()])
        with autocast(self.precision):
            loss = self.compiled(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()


class Products:
    """The step's bare matrix products of all linear layers, forward and backward: no step can be faster."""

    def __init__(self, shape: DecoderOptions, batch: int, precision: str, compiled: bool) -> None:
        dtype = product_dtype(torch.bfloat16 if precision == "bf16" else torch.float32, "cpu")
        d, f, rows = shape.d_model, shape.d_ff, batch * shape.max_seq_len
        layer = [(d, d)] * 4 + [(d, f)] * 2 + [(f, d)]
        self.cases = [
            (
                torch.randn(rows, i, dtype=dtype),
                torch.randn(o, i, dtype=dtype),
                torch.randn(rows, o, dtype=dtype),
            )
            for i, o in [*layer * shape.n_layers, (d, shape.vocab_size)]
        ]

    def run(self, steps: int) -> list[float]:
        """Multiply; return the seconds of each timed step."""
        return timed(self._step, steps)

    def _step(self) -> None:
        for x, weight, grad in self.cases:
            F.linear(x, weight)
            torch.mm(grad, weight)
            torch.mm(grad.t(), x)


def autocast(precision: str) -> Any:
    """Return the context a training step runs in."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


SIDES = {"ours": Ours, "trainer": Trainer, "plain": Plain, "products": Products}


def serve(connection: Any, tuned: bool, threads: int, quick: bool) -> None:
    """Build sides and run them as told over `connection`; with `tuned` under distllm's allocator and threads."""
    if tuned:
        threads = tune_cpu(HardwareOptions(threads=threads))
    elif threads:
        torch.set_num_threads(threads)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (the libraries' own reports)
    sides: dict[str, Any] = {}
    while True:
        try:
            order = connection.recv()
        except EOFError:  # the parent is done
            return
        try:
            if order["do"] == "build":
                if order["side"].startswith("family"):
                    from pretrain_families import SIDES as families

                    side = families[order["side"]](quick=quick, **order["arguments"])
                else:
                    side = SIDES[order["side"]](shape_of(quick), **order["arguments"])
                sides[order["key"]] = side
                connection.send(side.loss() if hasattr(side, "loss") else None)
            elif order["do"] == "run":
                connection.send(sides[order["key"]].run(order["steps"]))
            elif order["do"] == "drop":
                connection.send(sides.clear())
            else:
                connection.send(torch.get_num_threads())
        except Exception as error:
            connection.send(error)
