"""Train, load, save and compare tokenizers in Hugging Face layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distllm.data.backends import Backends, backend_of
from distllm.data.options import Units
from distllm.data.units import UNKNOWN, closed_vocabulary
from distllm.data.vocabulary import CLS, ROLES, SEP
from distllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PAD, EOS = "<|pad|>", "<|eos|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = (PAD, EOS, SYSTEM, USER, ASSISTANT, END)
"""Ids 0 to 5 of a tokenizer trained here. `<|eos|>` ends a document, `<|end|>` ends a turn."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}{%- if message['role'] not in ['system', 'user', 'assistant'] "
    "-%}{{- raise_exception('unknown role ' ~ message['role']) -}}{%- endif -%}{{- '<|' ~ "
    "message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}{%- endfor -%}{%- if "
    "add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""`<|user|>question<|end|><|assistant|>answer<|end|>`, nothing in between."""


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    units: Units = Units.BPE,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer: byte-level BPE, which any Unicode text survives and in which digits stand alone, or other units.

    The same texts give the same tokenizer. A small corpus may give fewer than `vocab_size` tokens.

    Args:
        texts: to learn from.
        vocab_size: number of tokens, `special_tokens` included.
        special_tokens: further ones, which get the last ids.
        units: what a token is.

    Raises:
        ConfigError: `vocab_size` has no room for the bytes (or other units) and the special tokens.
        DataError: there is no text.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    texts = [text for text in texts if text]
    if not texts:
        raise DataError("There is no text to train a tokenizer on.")
    room = vocab_size - len(special_tokens)
    if units == Units.BPE:
        backend, roles = _byte_pairs(texts, vocab_size, special_tokens), {}
    else:
        backend = closed_vocabulary(texts, units, room, SPECIAL_TOKENS)
        roles = {"unk_token": UNKNOWN}
    backend.add_special_tokens(list(special_tokens))
    inputs = ["input_ids", "attention_mask"]
    if {CLS, SEP} <= set(
        special_tokens
    ):  # what reads pairs of texts expects them framed and told apart
        inputs.insert(1, "token_type_ids")
        backend.post_processor = processors.TemplateProcessing(
            single=f"{CLS} $A {SEP}",
            pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
            special_tokens=[(t, backend.token_to_id(t)) for t in (CLS, SEP)],
        )
    roles |= {ROLES[token]: token for token in special_tokens if token in ROLES}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        **roles,
        extra_special_tokens=[
            *(SYSTEM, USER, ASSISTANT, END),
            *(token for token in special_tokens if token not in ROLES),
        ],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=inputs,
    )


def _byte_pairs(texts: Sequence[str], vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    num_special = len(SPECIAL_TOKENS) + len(special_tokens)
    if vocab_size < 256 + num_special:
        raise ConfigError(
            f"vocab_size={vocab_size} is below {256 + num_special} = 256 bytes + {num_special} "
            "special tokens. Set 4096."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special_tokens),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a Hugging Face directory (ours or another's), from disk only.

    Raises:
        ConfigError: the folder is missing, holds no tokenizer, or one without a fast
            (`tokenizer.json`) form.
    """
    from transformers import AutoTokenizer

    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"tokenizer={folder} is not a folder. Set one that holds tokenizer.json.")
    try:
        tok = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ConfigError(f"tokenizer={folder} cannot be loaded: {error}") from error
    backend_of(tok)
    return tok


def save_tokenizer(tok: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Write the tokenizer in Hugging Face layout."""
    tok.save_pretrained(str(folder))


def tokenizer_fingerprint(tok: PreTrainedTokenizerFast) -> str:
    """Hash what decides the ids: backend, special tokens, chat template (sha256, hex)."""
    backend = json.loads(backend_of(tok).to_str())
    backend.update(truncation=None, padding=None)
    parts = [
        backend,
        {name: str(token) for name, token in tok.special_tokens_map.items()},
        tok.chat_template,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_fits(tok: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Refuse a tokenizer that can produce ids the model has no row for.

    Raises:
        ConfigError: naming both sizes.
    """
    if len(tok) > vocab_size:
        raise ConfigError(
            f"The tokenizer has {len(tok)} tokens but the model's arch.vocab_size={vocab_size}. "
            f"Set arch.vocab_size={len(tok)} (or more), or give the tokenizer that belongs to the "
            "model."
        )


def encode_texts(tok: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Encode texts as text: nothing is added, and special tokens spelled out stay characters.

    Raises:
        DataError: the tokenizer turns a spelled-out special token into the real one all the same.
    """
    known = Backends.of(tok)
    plain = known.guarded(known.special, stand_ins=False)
    forbidden = known.special - {known.unknown}
    encoded = []
    for text, found in zip(texts, plain.tokenizer.encode_batch_fast(list(texts)), strict=True):
        ids = [plain.real.get(token, token) for token in found.ids]
        if not forbidden.isdisjoint(ids):
            typed = tok.decode(sorted(forbidden.intersection(ids)))
            raise DataError(
                f"This tokenizer turns {typed!r} typed in a text into the real token, even when "
                f"told not to. Remove it from the data: {text[:200]!r}"
            )
        encoded.append(ids)
    return encoded
