"""Generation: what a batch, a cache, several answers, sampling and the ends of an answer mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen2vl_fast import Qwen2VL
from tests import models
from tests.compare import check_parity
from tests.models import GREEDY

ROWS = [
    [("text", 3), ("image", 4, 6), ("text", 5), ("video", 2, 4, 4), ("image", 2, 2), ("text", 2)],
    [("text", 7)],
    [("text", 4), ("video", 6, 2, 4), ("text", 1), ("image", 2, 8), ("text", 2)],
    [("image", 2, 4), ("text", 1)],
]


def model() -> Qwen2VL:
    return models.pair()[1]


def answers(inputs: dict[str, Tensor], **options) -> Tensor:
    return models.answers(model(), inputs, **options)


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_decoding_equals_a_forward_for_every_token(row):
    inputs = models.batch([ROWS[row]])
    got = answers(inputs, max_new_tokens=8, **{**GREEDY, "suppress_vision_tokens": True})
    suppressed = list(model().config.vision_token_ids)
    ids = inputs["input_ids"]
    for step in range(8):
        rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "mm_token_type_ids")}
        with torch.no_grad():
            logits = model()(ids, **rest, logits_to_keep=1).logits[:, -1]
        assert torch.equal(logits.index_fill(1, torch.tensor(suppressed), -torch.inf).argmax(-1), got[:, step])
        ids = torch.cat((ids, got[:, step : step + 1]), 1)


def test_inputs_come_first_and_are_left_alone():
    inputs = models.batch(ROWS)
    before = {name: value.clone() for name, value in inputs.items()}
    output = model().generate(**inputs, max_new_tokens=2, **GREEDY)
    assert output.dtype == torch.int64 and output.shape == (4, inputs["input_ids"].shape[1] + 2)
    assert torch.equal(output[:, :-2], inputs["input_ids"])
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())


# The ends of an answer.


def test_no_new_tokens():
    inputs = models.batch(ROWS)
    assert torch.equal(model().generate(**inputs, max_new_tokens=0), inputs["input_ids"])
    assert list(model().stream(**inputs, max_new_tokens=0)) == []


def test_end_tokens():
    inputs = models.batch(ROWS)
    free = answers(inputs, max_new_tokens=9, **GREEDY)
    assert free.shape == (4, 9)
    for ends in (int(free[0, 2]), [int(free[1, 4])], [int(free[0, 2]), int(free[1, 4]), 1000], [int(x) for x in free[:, 0]]):
        got = answers(inputs, max_new_tokens=9, **{**GREEDY, "eos_token_id": ends})
        wanted = torch.isin(free, torch.tensor(ends))
        over = wanted.long().cumsum(1) - wanted.long() > 0  # after the first end token
        expected = free.masked_fill(over, models.PAD)
        last = 9 if not wanted.any(1).all() else int((~over).sum(1).max())
        assert torch.equal(got, expected[:, :last])


def test_end_tokens_of_the_checkpoint():
    inputs = models.batch(ROWS)
    free = answers(inputs, max_new_tokens=6, **GREEDY)
    hf = models.transformers_model(models.CONFIGS["released"])
    hf.generation_config.eos_token_id = [int(x) for x in free[:, 2]]
    stopping = Qwen2VL.from_transformers(hf)
    got = stopping.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_vision_tokens=False)
    assert got.shape[1] - inputs["input_ids"].shape[1] <= 3
    assert stopping.generate(**inputs, max_new_tokens=6, **GREEDY).shape[1] - inputs["input_ids"].shape[1] == 6


def test_streaming():
    class Streamer:
        def __init__(self):
            self.steps, self.ended = [], 0

        def put(self, tokens):
            assert not self.ended
            self.steps.append(tokens.clone())

        def end(self):
            self.ended += 1

    inputs = models.batch(ROWS)
    free = answers(inputs, max_new_tokens=6, **GREEDY)
    options = {"max_new_tokens": 6, **GREEDY, "eos_token_id": [int(free[0, 1]), int(free[1, 3])]}
    streamer = Streamer()
    expected = answers(inputs, **options, streamer=streamer)
    assert streamer.ended == 1 and torch.equal(torch.stack(streamer.steps, 1), expected)
    steps = list(model().stream(**inputs, **options))
    assert all(step.shape == (4,) and step.dtype == torch.int64 for step in steps)
    assert torch.equal(torch.stack(steps, 1), expected)
    first = next(model().stream(**inputs, **options))  # and a stream that is given up after a token leaves nothing behind
    assert torch.equal(first, expected[:, 0]) and torch.equal(answers(inputs, **options), expected)


# Sampling: the distribution that a token is drawn from is transformers'.


@pytest.fixture
def drawn(monkeypatch) -> list[Tensor]:
    """The probabilities that every draw was made from."""
    seen: list[Tensor] = []
    original = torch.multinomial

    def multinomial(probabilities, *arguments, **options):
        seen.append(probabilities.clone())
        return original(probabilities, *arguments, **options)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 7.0, "top_k": 5},
        {"top_k": 1},
        {"top_k": 10**6},
        {"top_p": 0.3},
        {"top_p": 1e-6},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.5, "temperature": 2.0, "top_k": 40, "top_p": 0.7},
    ],
    ids=str,
)
def test_sampling_distribution(drawn, options):
    inputs = models.batch([ROWS[0]])
    fixed = {"max_new_tokens": 4, "do_sample": True, "eos_token_id": [], "seed": 3, "suppress_vision_tokens": False}
    off = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1.0}  # transformers 4 has defaults of its own
    output = model().generate(**inputs, **fixed, **{**off, **options})
    steps = LogitsProcessorList()
    if "repetition_penalty" in options:
        steps.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if "temperature" in options:
        steps.append(TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        steps.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        steps.append(TopPLogitsWarper(options["top_p"]))
    length = inputs["input_ids"].shape[1]
    media = {name: value for name, value in inputs.items() if name not in ("input_ids", "mm_token_type_ids")}
    probabilities = list(drawn)  # transformers draws nothing here
    assert len(probabilities) == 4
    for step, got in enumerate(probabilities):
        ids = output[:, : length + step]
        if torch.isin(ids[:, length:], torch.tensor([models.IMAGE, models.VIDEO])).any():
            break  # a placeholder that was drawn can't be read again
        with torch.no_grad():
            logits = model()(ids, **media, logits_to_keep=1).logits[:, -1]
        expected = steps(ids, logits).softmax(-1)
        assert torch.equal(got > 0, expected > 0)
        check_parity(got, expected, "lifted")
    assert step > 1


def test_draws_follow_the_distribution():
    """2000 draws of one token: the frequencies are within five standard errors of the probabilities, which the seed fixes."""
    inputs = models.batch([[("text", 4)]])
    options = {"do_sample": True, "temperature": 1.5, "top_k": 8, "eos_token_id": [], "suppress_vision_tokens": False}
    got = answers(inputs, max_new_tokens=1, num_return_sequences=2000, seed=0, **options).flatten()
    with torch.no_grad():
        logits = model()(inputs["input_ids"], logits_to_keep=1).logits[0, -1]
    best = logits.topk(8)
    probabilities = (best.values / 1.5).softmax(-1)
    counts = (got[:, None] == best.indices).sum(0)
    assert int(counts.sum()) == 2000
    spread = (2000 * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - 2000 * probabilities).abs() <= 5 * spread).all()


def test_seed_fixes_the_draws():
    inputs = models.batch(ROWS)
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0, "eos_token_id": []}
    first = answers(inputs, seed=5, **options)
    torch.manual_seed(99)
    assert torch.equal(answers(inputs, seed=5, **options), first)
    assert not torch.equal(answers(inputs, seed=6, **options), first)
    torch.manual_seed(7)
    once = answers(inputs, **options)  # without a seed: torch's own generator
    torch.manual_seed(7)
    assert torch.equal(answers(inputs, **options), once)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    answers(inputs, seed=5, **options)
    assert torch.equal(torch.rand(3), expected)  # and with one, that is left alone


def test_defaults_of_the_checkpoint(drawn):
    hf = models.transformers_model(models.CONFIGS["released"])
    hf.generation_config.update(do_sample=True, temperature=0.5, top_k=7, top_p=0.9, repetition_penalty=1.2)
    own = Qwen2VL.from_transformers(hf)
    assert own.config.generation.do_sample and own.config.generation.top_k == 7
    inputs = models.batch([ROWS[0]])
    own.generate(**inputs, max_new_tokens=3, seed=1)
    by_default = list(drawn)
    drawn.clear()
    model().generate(
        **inputs, max_new_tokens=3, seed=1, do_sample=True, temperature=0.5, top_k=7, top_p=0.9, repetition_penalty=1.2
    )
    assert len(by_default) == 3
    assert all(torch.equal(a, b) for a, b in zip(by_default, drawn, strict=True))
    drawn.clear()
    own.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert not drawn


def test_repetition_penalty_counts_real_tokens_only(drawn):
    """The pad id of a batch is no repetition; each sequence is penalised for its own tokens."""
    rows = [[("text", 12)], [("text", 5)], [("image", 2, 2), ("text", 1)]]
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 1, "repetition_penalty": 3.0, "eos_token_id": []}
    inputs = models.batch(rows)
    together = answers(inputs, **options)
    batched = [step.clone() for step in drawn]
    for row in range(3):
        drawn.clear()
        assert torch.equal(answers(models.alone(inputs, rows, row), **options)[0], together[row])
        assert all(torch.equal(a[0] > 0, b[row] > 0) for a, b in zip(drawn, batched, strict=True))
