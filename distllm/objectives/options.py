"""Settings of pretraining, for every objective; each objective reads the ones that its docstring names."""

from dataclasses import dataclass

PRETRAINING = ("clm", "mlm", "span", "ul2", "blank", "prefix")
"""Objectives that learn from raw text."""


@dataclass(kw_only=True, slots=True)
class PretrainOptions:
    """Learn a language from raw text."""

    name: str = "pretrain"
    objective: str = "auto"
    """What is predicted; `auto` is the architecture's own: `clm` for a decoder, `mlm` for an encoder, `span` for an
    encoder-decoder, `blank` for GLM. Others: `ul2`, `prefix`."""
    baselines: bool = False
    """Also fit a unigram and modified Kneser-Ney n-gram models of every order, and report their held-out loss (clm)."""
    ngram_order: int = 5
    """Highest order of these n-gram models, in tokens; characters profit from 7."""
    mask_rate: float = 0.15
    """Share of the tokens that are hidden (mlm, span, blank). BERT, T5 and GLM: 0.15; ModernBERT: 0.3."""
    eval_mask_rate: float = 0.15
    """The same on held-out text (mlm), so that models trained with different rates compare."""
    mask_whole_words: bool = False
    """Hide words whole (mlm)."""
    mask_token_share: float = 0.8
    """Share of the hidden tokens that are replaced by the mask token (mlm)."""
    random_token_share: float = 0.1
    """Share of the hidden tokens that are replaced by a random one; the rest stay as they are (mlm)."""
    mean_span_length: float = 3.0
    """Mean length of a hidden span in tokens (span, blank)."""
    sentence_share: float = 0.0
    """Share of the texts of which whole sentences are hidden (blank). GLM-10B: 0.3; the smaller models: 0."""
    document_share: float = 0.0
    """Share of the texts whose last part is hidden (blank). GLM-10B: 0.2; the smaller models: 0."""
    min_document_span: float = 0.5
    """Least share of a text that is hidden then, the most is all of it (blank). GLM-10B: 0.25."""
    z_loss: float = 0.0
    """Weight of log(Z)^2 per token, which keeps the logits from drifting; PaLM: 1e-4 (all objectives)."""
    sampled_words: int = 0
    """Words drawn to stand for all that are no target of the batch, in the softmax of the training loss (clm); 0 takes the
    softmax over all words, as held-out loss always does. Worth it where a small model has a large vocabulary; more are
    nearer to the exact loss. The meters count the operations of the whole softmax."""
    fim_rate: float = 0.0
    """Share of the documents that are reordered to prefix, suffix, middle, to learn to fill gaps (clm)."""
    fim_spm_rate: float = 0.5
    """Share of those that begin with the suffix instead (clm)."""


READ_BY = {
    "baselines": ("clm",),
    "mask_rate": ("mlm", "span", "blank"),
    "eval_mask_rate": ("mlm",),
    "mask_whole_words": ("mlm",),
    "mask_token_share": ("mlm",),
    "random_token_share": ("mlm",),
    "mean_span_length": ("span", "blank"),
    "sentence_share": ("blank",),
    "document_share": ("blank",),
    "min_document_span": ("blank",),
    "sampled_words": ("clm",),
    "fim_rate": ("clm",),
    "fim_spm_rate": ("clm",),
}
"""Setting -> the objectives that read it; those that are not here concern all."""
