"""Models of transformers behind our protocol: families that have no native file, of all three kinds."""

import pytest
import torch

from distllm import generate
from distllm.arch.auto import Auto, AutoOptions
from distllm.arch.io import load_model, read_options, save_model
from distllm.errors import CheckpointError, ConfigError
from distllm.generation import generate as ragged
from distllm.generation.options import GenerationOptions
from distllm.testing import parity

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
MODELS = {
    "gpt_neox": ("GPTNeoXForCausalLM", {**SIZES, "intermediate_size": 48, "max_position_embeddings": 96}),
    "phi3": (
        "Phi3ForCausalLM",
        {**SIZES, "intermediate_size": 48, "max_position_embeddings": 96, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2},
    ),
    "opt": (
        "OPTForCausalLM",
        {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
         "ffn_dim": 48, "max_position_embeddings": 96, "word_embed_proj_dim": 32},
    ),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": 61, "dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48,
         "max_position_embeddings": 96},
    ),
    "pegasus": (
        "PegasusForConditionalGeneration",
        {"vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
         "decoder_ffn_dim": 48, "max_position_embeddings": 96, "decoder_start_token_id": 0,
         "pad_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": None},
    ),
}  # fmt: skip
CAUSAL = ["gpt_neox", "opt", "phi3"]

pytestmark = pytest.mark.filterwarnings("ignore:arch=auto")


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            cls, settings = MODELS[name]
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(name, **settings)
            config._attn_implementation = "eager"
            reference = getattr(transformers, cls)(config)
            parity.perturb(reference, 3)
            folder = tmp_path_factory.mktemp(name)
            reference.eval().save_pretrained(folder)
            made[name] = (load_model(folder, arch="auto")[0], reference, folder)
        return made[name]

    return of


def draw(rows=3, length=12):
    return torch.randint(4, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def inputs(name, ids):
    return {"decoder_input_ids": ids.flip(1)[:, :7]} if name == "pegasus" else {}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_loss(wrapped, name):
    ours, reference, _ = wrapped(name)
    ids = draw()
    given = inputs(name, ids)
    expected = reference(input_ids=ids, **given).logits
    torch.testing.assert_close(ours(ids, **given).logits, expected)
    out = ours(ids, **given, compute_logits=False)
    assert out.logits is None
    labels = torch.randint(0, 61, expected.shape[:2])
    labels[0, :3] = -100
    loss = ours.head.loss(out.last_hidden_state, labels)
    wanted = torch.nn.functional.cross_entropy(
        expected.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss, wanted)
    named = [p for p in ours.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, named, allow_unused=True)
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in grads) > len(named) * 0.8


@pytest.mark.parametrize("name", ["gpt_neox", "opt"])
def test_packed_documents_equal_separate_ones(wrapped, name):
    ours, _, _ = wrapped(name)
    ids = draw(1)
    segments = torch.tensor([[1] * 5 + [2] * 7])
    packed = ours(ids, segment_ids=segments).logits
    alone = torch.cat([ours(ids[:, :5]).logits, ours(ids[:, 5:]).logits], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_tokens_equal_transformers(wrapped, name):
    ours, reference, _ = wrapped(name)
    ids, mask = draw(4), torch.ones(4, 12, dtype=torch.long)
    mask[1, :5] = mask[2, :9] = 0
    expected = reference.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=20, min_new_tokens=20, do_sample=False,
        pad_token_id=1, eos_token_id=None,
    )  # fmt: skip
    got = generate(ours, ids, mask, max_new_tokens=20, temperature=0.0)
    assert got[:, 12:].tolist() == expected[:, 12:].tolist()


def test_sequence_to_sequence_generates(wrapped):
    ours, reference, _ = wrapped("pegasus")
    ids = draw(3)
    expected = reference.generate(
        input_ids=ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, num_beams=1,
        eos_token_id=None,
    )[:, 1:]  # fmt: skip
    rollouts = ragged.generate(
        ours,
        ids.tolist(),
        GenerationOptions(max_new_tokens=12, temperature=0),
        end_ids=[],
        pad_id=0,
    )
    assert [r.response_ids for r in rollouts] == expected.tolist()


def test_rows_can_be_dropped_and_repeated_while_sampling(wrapped):
    ours, _, _ = wrapped("gpt_neox")
    prompts = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    options = GenerationOptions(max_new_tokens=20, temperature=1.0)
    together = ragged.generate(ours, prompts, options, end_ids=range(30), pad_id=0, num_samples=3)
    for rollout in together:
        i = rollout.prompt_index
        alone = ragged.generate(
            ours, [prompts[i]], options, end_ids=range(30), pad_id=0, num_samples=3,
            prompt_indices=[i],
        )  # fmt: skip
        assert rollout.response_ids == alone[rollout.sample_index].response_ids


@pytest.mark.parametrize("head", ["last", "value", "classify", "tag", "likelihood"])
@pytest.mark.parametrize("name", ["gpt_neox", "distilbert"])
def test_other_heads_come_back(wrapped, tmp_path, name, head):
    _, _, folder = wrapped(name)
    model, _ = load_model(folder, head=head, arch="auto", seed=4)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.5)
    save_model(model, None, tmp_path / "m")
    again, _ = load_model(tmp_path / "m")
    assert isinstance(again, Auto) and again.head_name == head
    ids, mask = draw(), torch.ones(3, 12, dtype=torch.long)
    mask[0, 9:] = 0
    one, two = model(ids, mask), again(ids, mask)
    for field in ("logits", "scores", "values"):
        a, b = getattr(one, field), getattr(two, field)
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_read_by_transformers(wrapped, tmp_path, name):
    ours, reference, _ = wrapped(name)
    assert not any(n.startswith("head.") for n in ours.state_dict())
    save_model(ours, None, tmp_path / "m")
    again = type(reference).from_pretrained(tmp_path / "m")
    state = reference.state_dict()
    assert all(torch.equal(state[k], v) for k, v in again.state_dict().items())
    assert read_options(tmp_path / "m").kind == ours.options.kind


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_found(wrapped, name):
    ours, _, _ = wrapped(name)
    assert len(ours.blocks()) == (4 if name == "pegasus" else 2)


def test_it_is_announced(wrapped):
    _, _, folder = wrapped("gpt_neox")
    with pytest.warns(UserWarning, match=r"GPTNeoXForCausalLM.*reference speed"):
        load_model(folder, arch="auto")


def test_a_native_family_may_be_wrapped_too(tmp_path):
    from distllm.arch.hf.family import families

    folder = parity.save(parity.reference(families()["gemma2"]), tmp_path / "m")
    native, _ = load_model(folder)
    wrapped, _ = load_model(folder, arch="auto")
    ids = draw()
    torch.testing.assert_close(wrapped(ids).logits, native(ids).logits, rtol=1e-4, atol=1e-4)
    assert wrapped.head.softcap == 5.0
    with pytest.raises(ValueError, match="sliding window"):
        wrapped(ids, segment_ids=torch.ones_like(ids))


def test_without_a_model_it_says_what_it_needs():
    with pytest.raises(ConfigError, match=r"arch=auto.*model=HF_DIR"):
        Auto(AutoOptions())


def test_what_transformers_cannot_read_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "never_heard_of"}')
    with pytest.raises(CheckpointError, match="never_heard_of"):
        load_model(tmp_path, arch="auto")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(CheckpointError, match="vit"):
        load_model(tmp_path, arch="auto")


def test_an_argument_it_cannot_use_is_refused_by_name(wrapped):
    ours, _, _ = wrapped("gpt_neox")
    with pytest.raises(ValueError, match="prefix_lengths"):
        ours(draw(), prefix_lengths=torch.ones(3))
    with pytest.raises(ValueError, match=r"97 tokens.*max_seq_len=96"):
        ours(draw(1, 97))
