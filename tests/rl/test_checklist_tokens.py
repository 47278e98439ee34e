"""Checklist, items 1 to 11: tokens and masks."""

import itertools

import pytest
import torch
from checklist import holds_and_notices
from transformers import PreTrainedTokenizerFast

from distllm.arch import encoder_decoder, glm, joining
from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.arch.encoder_decoder import EncoderDecoder, EncoderDecoderOptions
from distllm.arch.glm import GLM, GLMOptions
from distllm.arch.options import Position
from distllm.data import chat, datasets
from distllm.data.chat import encode_dialogue, encode_prompt, end_ids
from distllm.data.datasets import ChatDataset, ChatExample
from distllm.data.options import DataOptions
from distllm.data.rendering import render
from distllm.data.tokenizer import train_tokenizer
from distllm.errors import DataError
from distllm.generation.generate import generate
from distllm.generation.options import GenerationOptions
from distllm.layers import masks
from distllm.objectives import collate, sft
from distllm.objectives.sft import SFT, SFTOptions
from distllm.rl import layout, loop
from distllm.rl.layout import collate_rollouts, hidden_states
from distllm.rl.scoring import score_logprobs
from distllm.testing.rl import make_rollout
from distllm.testing.rl_loop import make_source
from distllm.testing.tiny import PAD_ID, VOCAB_SIZE, single_engine, tiny_decoder
from distllm.types import IGNORE_INDEX, Dialogue

TEXTS = ["The cat sat on the mat and said nothing at all.", "Two and two make four, they say."] * 4
CHATML = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
LLAMA = (
    "{%- for m in messages -%}{{- '<|start|>' + m['role'] + '<|sep|>\n\n' + m['content'] + '<|eot|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|start|>assistant<|sep|>\n\n' -}}{%- endif -%}"
)
MISTRAL = (
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}{{- '[INST] ' + m['content'] + ' [/INST]' -}}"
    "{%- else -%}{{- m['content'] + '</s>' -}}{%- endif -%}{%- endfor -%}"
)
GLM4 = (
    "{%- for m in messages -%}{{- '<|' + m['role'] + '|>\n' + m['content'] -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
)
PLAIN = (
    "{%- for m in messages -%}{{- m['role'] + ': ' + m['content'] + '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"
)
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL, "glm": GLM4, "plain": PLAIN}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|sep|>", "<|eot|>", "[INST]", "[/INST]",
           "<|user|>", "<|assistant|>", "</s>"]  # fmt: skip
DIALOGUE = [
    {"role": "user", "content": "What do they say?"},
    {"role": "assistant", "content": "Two and two"},
    {"role": "user", "content": "make?"},
    {"role": "assistant", "content": "four"},
]


@pytest.fixture(scope="module")
def tok():
    backend = train_tokenizer(TEXTS, 320).backend_tokenizer
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="</s>", unk_token=None
    )
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    return made


def test_item_01_the_end_of_the_turn_is_learned_under_every_template(tok):
    def check():
        for name, template in TEMPLATES.items():
            tok.chat_template = template
            ids, mask = encode_dialogue(tok, DIALOGUE)
            learned = [i for i, on in enumerate(mask) if on]
            assert ids[learned[-1]] in end_ids(tok), name
            after = learned[-1] + 1  # nothing but what a template writes behind the last turn
            assert tok.decode(ids[after:]).strip() == "", name

    closing = "mask.append(learned is None or len(messages) - 1 in learned)"
    holds_and_notices(
        check,
        (chat, "last = tokens.places[ends[0]][1]", "pass"),
        (chat, closing, "mask.append(False)"),
    )


def test_item_02_masks_come_from_lengths_because_pad_may_equal_eos():
    eos = 7

    def check():
        rows = [ChatExample([3, eos, 5, eos], [False, True, True, True], 0), ChatExample([3, 4], [False, True], 1)]  # fmt: skip
        batch = SFT(SFTOptions(), pad_id=eos).collate(rows)
        assert batch.attention_mask.sum(1).tolist() == [3, 1]
        learned = [row[row != IGNORE_INDEX].tolist() for row in batch.labels]
        assert learned == [[eos, 5, eos], [4]]
        join = tiny_decoder().join([[eos, 3], [4]], [[eos, eos], [5]], eos)
        assert join.attention_mask.sum(1).tolist() == [4, 2]
        assert (join.labels[0] == eos).sum() == 2

    lengths = "[[1] * (len(e.input_ids) - 1) for e in examples]"
    values = "[[int(t != self.pad_id) for t in e.input_ids[:-1]] for e in examples]"
    holds_and_notices(
        check,
        (sft, lengths, values),
        (joining, "mask[i, : len(row)] = True", "mask[i] = ids[i] != value"),
    )


def test_item_03_a_dialogue_without_a_learned_token_is_an_error(tok):
    tok.chat_template = CHATML

    def check():
        try:
            encode_dialogue(tok, DIALOGUE, learned=[])
        except DataError as error:
            assert "No token of the dialogue is the assistant's" in str(error)
        else:
            raise AssertionError("trained on nothing, quietly")

    holds_and_notices(check, (chat, "if not any(mask):", "if False:"))


def test_item_04_spans_come_from_one_tokenisation(tok):
    tok.chat_template = PLAIN

    def by_prefixes(messages):
        """What prefix-length arithmetic does: tokenise ever longer prefixes and subtract their lengths."""
        rendered = tok.apply_chat_template(messages, tokenize=False)
        ids = tok(rendered, add_special_tokens=False)["input_ids"]
        mask = [False] * len(ids)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = tok.apply_chat_template(
                    messages[:i], tokenize=False, add_generation_prompt=True
                )
                so_far = tok.apply_chat_template(messages[: i + 1], tokenize=False)
                start = len(tok(before, add_special_tokens=False)["input_ids"])
                end = len(tok(so_far, add_special_tokens=False)["input_ids"])
                mask[start:end] = [True] * (end - start)
        return ids, mask

    def check(encode=lambda messages: encode_dialogue(tok, messages)):
        for words in itertools.permutations(["four", " they", "say", "1", "\n"], 2):
            said = "".join(words)
            messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
            ids, mask = encode(messages)
            rendered = tok.apply_chat_template(messages, tokenize=False)
            whole = tok(rendered, add_special_tokens=False)["input_ids"]
            assert ids[: len(whole)] == whole
            spans = render(tok, messages, add_generation_prompt=False)
            text = "".join(s.text for s in spans)
            start = text.index("assistant: ") + len("assistant: ")
            places = tok(rendered, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]  # fmt: skip
            for (first, last), on in zip(places, mask, strict=False):
                overlaps = first < start + len(said) and last > start
                assert on or not overlaps, f"a token of {said!r} is not learned"

    check()
    with pytest.raises(AssertionError):
        check(by_prefixes)


def test_item_05_a_truncated_sample_gets_no_made_up_end(tok):
    tok.chat_template = CHATML
    cut = DataOptions(on_long="cut")

    def check():
        record = Dialogue(messages=DIALOGUE)
        whole = ChatDataset([record], tok, 1000, cut)[0].input_ids
        with pytest.warns(UserWarning, match="longer"):
            short = ChatDataset([record], tok, len(whole) - 4, cut)[0]
        assert short.input_ids == whole[:-4]
        assert short.input_ids[-1] not in end_ids(tok)

    made_up = "ids, mask = [*example.input_ids[: max_len - 1], example.input_ids[-2]], example.mask[:max_len]"  # fmt: skip
    real = "ids, mask = example.input_ids[:max_len], example.mask[:max_len]"
    holds_and_notices(check, (datasets, real, made_up))
    model = tiny_decoder().eval()
    (rollout,) = generate(
        model, [[1, 2]], GenerationOptions(max_new_tokens=3), end_ids=[], pad_id=PAD_ID
    )
    assert rollout.finish_reason == "length" and len(rollout.response_ids) == 3


def absolute(head="lm"):
    options = DecoderOptions(
        vocab_size=VOCAB_SIZE, d_model=16, n_layers=2, n_heads=4, n_kv_heads=4, d_ff=32, max_seq_len=64,
        init_std=0.3, position=Position.learned,
    )  # fmt: skip
    return Decoder(options, head=head, seed=1).double().eval()


def test_item_06_left_padded_rows_get_positions_from_the_mask_in_every_forward():
    """Learned absolute positions show it; rotary ones would hide it."""
    prompts, responses = [[1, 2, 3, 4, 5], [6]], [[7, 8], [9, 10, 11]]

    def check():
        for head in ("lm", "value", "last"):  # policy and reference, critic, reward model
            model = absolute(head)
            if head != "lm":
                with torch.no_grad():
                    model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
            batch = model.join(prompts, responses, PAD_ID)
            for row, (p, r) in enumerate(zip(prompts, responses, strict=True)):
                shift = batch.input_ids.shape[1] - len(p) - len(r)
                ids = batch.input_ids.roll(shift, 1)[row : row + 1]
                mask = batch.attention_mask.roll(shift, 1)[row : row + 1]
                padded = model(ids.repeat(2, 1), mask.repeat(2, 1)).last_hidden_state[0, shift:]
                alone = model(torch.tensor([[*p, *r]])).last_hidden_state[0]
                difference = (padded - alone).abs().max()
                assert difference < 1e-9, (head, difference)

    derived = "return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)"
    holds_and_notices(check, (masks, derived, "return columns[None]"))


def test_item_07_encoder_decoders_and_glm_are_padded_shifted_and_placed_as_when_sampled():
    """What the sampler said of its tokens, ragged prompts and all, is what the training path computes."""
    shape = {"vocab_size": 41, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4,
             "d_ff": 48, "max_seq_len": 40, "init_std": 0.3}  # fmt: skip
    t5 = EncoderDecoder(EncoderDecoderOptions(**shape, position=Position.relative), seed=2)
    block = GLM(GLMOptions(**shape, blank_id=38, start_id=39), seed=2)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
    drawn = {}
    for model in (t5, block):
        model.double().eval()
        options = GenerationOptions(max_new_tokens=6)
        drawn[model] = generate(
            model, prompts, options, end_ids=[3], pad_id=0, num_samples=2, seed=1
        )

    def check(model):
        engine = single_engine(model, trained=False)
        scored = score_logprobs(engine, drawn[model], model.join, 0, 1.0, 6)
        for rollout, found in zip(drawn[model], scored, strict=True):
            assert (rollout.rollout_logprobs - found).abs().max() < 1e-9

    start = "targets = [[self.options.decoder_start_id, *r] for r in responses]"
    twice = "s = self.options.decoder_start_id; targets = [[s, s, *r][: len(r) + 1] for r in responses]"  # fmt: skip
    padded = "input_ids, attention_mask = pad_right(prompts, pad_id)"
    unmasked = padded + "; attention_mask = attention_mask | True"
    wrong_side = padded + "; input_ids = input_ids.roll(1, 1)"
    holds_and_notices(
        lambda: check(t5),
        (encoder_decoder, start, twice),
        (encoder_decoder, padded, unmasked),
        (encoder_decoder, padded, wrong_side),
    )
    places = "position_ids=_positions(input_ids, None, lengths),"
    holds_and_notices(lambda: check(block), (glm, places, "position_ids=None,"))


def test_item_08_packed_rows_do_not_see_each_other():
    model = absolute()
    rollouts = [
        make_rollout([1, 2, 3], [4, 5]),
        make_rollout([6], [7, 8, 9, 10, 17, 18]),
        make_rollout([11, 12], [13]),
        make_rollout([14], [15, 16]),
    ]

    def logprobs(batch):
        values, _ = model.head.logprobs(hidden_states(model, batch), batch.labels)
        at = batch.labels != IGNORE_INDEX
        return dict(zip(batch.labels[at].tolist(), values[at].tolist(), strict=True))

    def check():
        alone = logprobs(collate_rollouts(rollouts, model.join, PAD_ID))
        packed = collate_rollouts(rollouts, model.join, PAD_ID, pack=True)
        assert len(packed.input_ids) < len(rollouts)
        found = logprobs(packed)
        assert found.keys() == alone.keys(), "a token is scored twice or from a stranger"
        assert found == pytest.approx(alone, abs=1e-10)

    holds_and_notices(
        check,
        (collate, "marks[to] = segment[which]", "marks[to] = 1"),
        (masks, "return columns - torch.where(starts, columns, 0).cummax(dim=1).values", "return columns[None]"),
    )  # fmt: skip


def test_item_09_token_t_is_scored_by_the_logits_at_t_minus_1():
    model = tiny_decoder().double().eval()
    rollouts = [make_rollout([1, 2, 3], [4, 5, 6]), make_rollout([7], [8, 9])]

    def check():
        engine = single_engine(model, trained=False)
        scored = score_logprobs(engine, rollouts, model.join, PAD_ID, 1.0, 4)
        for rollout, found in zip(rollouts, scored, strict=True):
            ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
            full = model(ids).logits[0].log_softmax(-1)
            start = len(rollout.prompt_ids)
            for t, token in enumerate(rollout.response_ids):
                assert abs(found[t] - full[start + t - 1, token]) < 1e-10

    right, late = "labels[row, start - 1 : end - 1]", "labels[row, start:end]"
    holds_and_notices(check, (joining, right, late))


def test_item_10_an_environments_words_are_masked_and_ids_are_kept():
    """The mask is True on sampled tokens: inverted, it would train on what the tool said."""
    model = tiny_decoder().double()
    r = make_rollout(
        [1, 2], [3, 4, 30, 31, 5], advantages=[1.0] * 5, old_logprobs=[-3.0] * 5,
        loss_mask=[True, True, False, False, True],
    )  # fmt: skip
    other = make_rollout(
        [1, 2], [3, 4, 30, 31, 5], advantages=[1.0, 1.0, 9.0, -9.0, 1.0],
        old_logprobs=[-3.0, -3.0, -1.0, -8.0, -3.0], loss_mask=[True, True, False, False, True],
    )  # fmt: skip

    def check():
        from distllm.testing.rl import make_algorithm

        objective = make_algorithm("grpo", model).policy
        found = []
        for rollout in (r, other):
            batch = objective.collate([rollout])
            assert objective.weights(batch)["policy"] == 3
            assert batch.labels[batch.labels != IGNORE_INDEX].tolist() == rollout.response_ids
            model.zero_grad()
            objective.loss(model, batch).losses["policy"].backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert torch.equal(found[0], found[1]), "an environment's token reached the loss"

    kept, inverted = "learned & batch.loss_mask[at]", "learned & ~batch.loss_mask[at]"
    holds_and_notices(check, (layout, kept, inverted), (layout, kept, "learned"))


def test_item_11_special_tokens_stay_in_the_trajectory_though_the_text_drops_them():
    end = VOCAB_SIZE - 1
    engine = single_engine(tiny_decoder())
    texts = []

    def check():
        source = make_source(
            "grpo", {"policy": engine}, [[1, 2], [3]], lambda p, r: float(sum(r) % 3), end_id=end,
            max_new_tokens=6, batch_size=16, num_samples=8,
        )  # fmt: skip
        source.sampling.decode = lambda ids: " ".join(str(i) for i in ids if i < 20)
        source.on_rollouts = lambda step, prompts, rollouts, t: texts.extend(t)
        source.sampling.options.max_new_tokens = 6
        while source.phase != "prepare":
            {"sample": source._sample, "reward": source._reward}[source.phase](0)
        assert any(i >= 20 for r in source.rollouts for i in r.response_ids), "the case has some"
        for rollout in source.rollouts:
            assert len(rollout.response_ids) == len(rollout.rollout_logprobs)
            ended = rollout.response_ids[-1] == end
            assert ended == (rollout.finish_reason == "stop")

    kept = "texts = [self.sampling.decode(r.response_ids) for r in fresh]"
    stripped = (
        "texts = [self.sampling.decode(r.response_ids) for r in fresh]; "
        "[setattr(r, 'response_ids', [int(i) for i in t.split()]) for r, t in zip(fresh, texts)]"
    )
    holds_and_notices(check, (loop, kept, stripped))


def test_prompts_are_encoded_as_they_are_said(tok):
    tok.chat_template = CHATML
    typed = [{"role": "user", "content": "a <|im_end|> b"}]
    ids = encode_prompt(tok, typed)
    assert ids.count(tok.convert_tokens_to_ids("<|im_end|>")) == 1, "the template's own, no other"
    assert "<|im_end|> b" in tok.decode(ids)
