"""Classifiers as rewards: their own tokenizer, any architecture, typed special tokens stay text."""

import pytest
import torch

from distllm.arch.io import load_model
from distllm.engines.base import build_engine
from distllm.engines.options import EngineOptions, HardwareOptions
from distllm.errors import ConfigError
from distllm.rl.options import RLOptions
from distllm.rl.rewards.base import RewardContext, build_reward
from distllm.types import Prompt

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a", "[", "]", "sep"]


@pytest.fixture(scope="module", params=["bert", "distilbert"])
def folder(request, tmp_path_factory):
    """A tiny random classifier as transformers writes it; we have no DistilBERT of our own."""
    import transformers

    path = tmp_path_factory.mktemp(request.param)
    shape = {"vocab_size": len(WORDS), "num_labels": 2, "max_position_embeddings": 16}
    torch.manual_seed(0)
    if request.param == "bert":
        config = transformers.BertConfig(
            **shape,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            initializer_range=0.5,
        )
        model = transformers.BertForSequenceClassification(config)
    else:
        config = transformers.DistilBertConfig(
            **shape, dim=16, n_layers=2, n_heads=2, hidden_dim=32, initializer_range=0.5
        )
        model = transformers.DistilBertForSequenceClassification(config)
    model.config.id2label = {0: "negative", 1: "positive"}
    model.eval().save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizer(str(path / "vocab.txt"), model_max_length=16)
    tokenizer.save_pretrained(path)
    return path, model, tokenizer


def reward(path, **options):
    def freeze(model):
        return build_engine(
            "reward",
            model,
            options=EngineOptions(),
            hardware=HardwareOptions(device="cpu", threads=1),
            precision="fp32",
        )

    return build_reward(
        RewardContext(
            options=RLOptions(reward="classifier", reward_model=str(path), **options),
            function="",
            log=None,
            tokenizer=None,
            join=None,
            pad_id=0,
            batch_size=2,
            load=lambda path: load_model(path)[0],
            freeze=freeze,
        )
    )


def expected(model, tokenizer, label, *texts):
    with torch.no_grad():
        encoded = tokenizer(*texts, return_tensors="pt")
        return model(**encoded).logits.softmax(-1)[0, label].item()


PROMPTS = [
    Prompt(messages=[{"role": "user", "content": text}]) for text in ("a ", "a film ", "film ")
]


def test_scores_are_those_of_transformers(folder):
    path, model, tokenizer = folder
    texts = ["good film", "bad", "bad bad good"]
    judge = reward(path)
    scores = judge.score(PROMPTS, [], texts)
    joined = [p.messages[0]["content"] + t for p, t in zip(PROMPTS, texts, strict=True)]
    assert scores == pytest.approx([expected(model, tokenizer, 1, t) for t in joined], abs=1e-5)
    judge = reward(path, reward_reads="response", reward_label="negative")
    assert judge.score(PROMPTS, [], texts) == pytest.approx(
        [expected(model, tokenizer, 0, t) for t in texts], abs=1e-5
    )
    pair = reward(path, reward_reads="pair").score(PROMPTS[:1], [], texts[:1])
    assert pair == pytest.approx([expected(model, tokenizer, 1, "a ", texts[0])], abs=1e-5)
    assert len({round(s, 3) for s in scores}) == 3, "the case tells responses apart"


def test_a_typed_special_token_stays_text(folder):
    path, _, tokenizer = folder
    judge = reward(path, reward_reads="response")
    typed = judge._encode(PROMPTS[:1], ["good [SEP] bad"]).input_ids[0].tolist()
    words = [WORDS[i] for i in typed]
    assert words == ["[CLS]", "good", "[", "sep", "]", "bad", "[SEP]"]
    naive = tokenizer("good [SEP] bad")["input_ids"]
    assert naive.count(WORDS.index("[SEP]")) == 2, "what would happen otherwise"


def test_a_label_that_does_not_exist_is_refused(folder):
    with pytest.raises(ConfigError, match=r"reward_label=happy .* negative, positive"):
        reward(folder[0], reward_label="happy")
