"""The generated pictures and the batches made of conversations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen2vl_fast.chat import Processor
from qwen2vl_fast.media import preprocess_images
from qwen2vl_fast.tokenizer import Tokenizer
from qwen2vl_fast.training.data import IGNORE_INDEX, ConversationEncoder, answers_right, collate, conversation, sample_batch
from qwen2vl_fast.training.nano_files import TOKEN_IDS, build_tokenizer, write_files
from qwen2vl_fast.training.pictures import (
    COLORS,
    MAX_COUNT,
    MAX_LEVEL,
    QUESTIONS,
    SHAPES,
    TASKS,
    TEST_SEEDS,
    TRAIN_SEEDS,
    VALIDATION_SEEDS,
    generate,
)

PAD = TOKEN_IDS["<|endoftext|>"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nano")
    write_files(directory)
    return directory


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> ConversationEncoder:
    return ConversationEncoder(Tokenizer.from_pretrained(checkpoint))


def test_seed_ranges_are_disjoint() -> None:
    ranges = sorted((TRAIN_SEEDS, VALIDATION_SEEDS, TEST_SEEDS), key=lambda seeds: seeds.start)
    assert all(len(seeds) >= 2**20 and seeds.step == 1 for seeds in ranges)
    assert all(before.stop <= after.start for before, after in zip(ranges, ranges[1:], strict=False))


def test_pictures_of_test_and_training_differ() -> None:
    def pictures(seeds: range) -> set[bytes]:
        return {generate(task, seed).picture.tobytes() for task in TASKS for seed in seeds[:100]}

    train, validation, test = map(pictures, (TRAIN_SEEDS, VALIDATION_SEEDS, TEST_SEEDS))
    assert len(train | validation | test) == len(TASKS) * 300


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("level", range(MAX_LEVEL + 1))
def test_a_sample_is_a_function_of_its_seed(task: str, level: int) -> None:
    for seed in range(10):
        first, second = generate(task, seed, level), generate(task, seed, level)
        assert (first.picture == second.picture).all()
        assert (first.question, first.answer) == (second.question, second.answer)
    assert len({generate(task, seed, level).picture.tobytes() for seed in range(10)}) == 10


@pytest.mark.parametrize("task", TASKS)
def test_answers_agree_with_what_is_drawn(task: str) -> None:
    answers = set()
    for seed in range(300):
        sample = generate(task, seed)
        first = sample.shapes[0]
        height, width = sample.picture.shape[:2]
        assert sample.picture.dtype == np.uint8 and height % 28 == 0 and width % 28 == 0
        assert 56 <= min(height, width) <= max(height, width) <= 168
        assert sample.question in QUESTIONS[task]
        assert task == "count" or len(sample.shapes) == 1
        assert all(p.radius <= p.x <= width - p.radius and p.radius <= p.y <= height - p.radius for p in sample.shapes)
        gaps = [
            np.hypot(p.x - q.x, p.y - q.y) - p.radius - q.radius
            for i, p in enumerate(sample.shapes)
            for q in sample.shapes[:i]
        ]
        assert all(gap >= 2 for gap in gaps)
        words = sample.answer.split()
        if task == "count":
            assert int(sample.answer) == len(sample.shapes)
        elif task == "name":
            assert words[1:] == [first.color, first.shape] and words[0] == ("an" if first.color == "orange" else "a")
        else:
            assert sample.answer == getattr(first, task)
        answers.add(words[-1])
    everything = {"count": {str(n) for n in range(1, MAX_COUNT + 1)}, "color": {*COLORS}}
    assert answers == everything.get(task, {*SHAPES})


def test_the_middle_of_a_filled_shape_has_its_color() -> None:
    seen = 0
    for seed in range(100):
        sample = generate("name", seed, 0)
        placed = sample.shapes[0]
        if placed.shape != "ring":
            middle = sample.picture[int(placed.y), int(placed.x)].astype(np.float32)
            assert np.abs(middle - placed.rgb).max() <= 1
            seen += 1
    assert seen > 50


@pytest.mark.parametrize(("task", "level"), [("counting", 2), ("count", MAX_LEVEL + 1), ("count", -1)])
def test_generate_refuses_what_it_does_not_know(task: str, level: int) -> None:
    with pytest.raises(ValueError, match="task|level"):
        generate(task, 0, level)


def test_batches_hold_the_pixels_of_the_public_preprocessing(encoder: ConversationEncoder) -> None:
    samples = [generate(task, seed) for task in TASKS for seed in range(8)]
    batch = sample_batch(samples, encoder, PAD)
    pixel_values, grids = preprocess_images([sample.picture for sample in samples])
    assert torch.equal(batch["pixel_values"], pixel_values)
    assert torch.equal(batch["image_grid_thw"], grids)


def test_training_tokens_are_the_prompt_and_then_the_answer(checkpoint: Path, encoder: ConversationEncoder) -> None:
    processor = Processor.from_pretrained(checkpoint)
    for task in TASKS:
        for seed in range(10):
            sample = generate(task, seed)
            prompt = processor(conversation(sample, answered=False))["input_ids"][0].tolist()
            tokens = sample.picture.shape[0] * sample.picture.shape[1] // 28**2
            ids, labels = encoder(conversation(sample), [tokens])
            answer = [*sample.answer.encode(), TOKEN_IDS["<|im_end|>"]]
            assert ids == [*prompt, *answer, ord("\n")]
            assert labels == [*[IGNORE_INDEX] * len(prompt), *answer, IGNORE_INDEX]


@pytest.mark.parametrize("system", [None, "You are a helpful assistant."])
def test_tokens_of_a_long_conversation_are_those_of_the_chat_template(checkpoint: Path, system: str | None) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    tokenizer = Tokenizer.from_pretrained(checkpoint)
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": " and "},
                                     {"type": "image"}, {"type": "video"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "Zwölf 漢字\n"},
        {"role": "user", "content": "\n again"},
        {"role": "assistant", "content": [{"type": "text", "text": "ye"}, {"type": "text", "text": "s"}]},
    ]  # fmt: skip
    ids, labels = ConversationEncoder(tokenizer, default_system=system)(messages, [1, 1, 1])
    template = json.loads((checkpoint / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    opened = messages if system is None else [{"role": "system", "content": system}, *messages]
    text = ImmutableSandboxedEnvironment().from_string(template).render(messages=opened)
    assert ids == build_tokenizer().encode(text).ids
    end = TOKEN_IDS["<|im_end|>"]
    assert [label for label in labels if label != IGNORE_INDEX] == [*"Zwölf 漢字\n".encode(), end, *b"yes", end]
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(ids, labels, strict=True))


def test_text_cannot_end_a_turn(encoder: ConversationEncoder) -> None:
    ids, labels = encoder([{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "<|image_pad|>"}])
    assert ids.count(TOKEN_IDS["<|im_end|>"]) == 2 and TOKEN_IDS["<|image_pad|>"] not in ids
    assert [label for label in labels if label != IGNORE_INDEX] == [*b"<|image_pad|>", TOKEN_IDS["<|im_end|>"]]


@pytest.mark.parametrize("counts", [[], [4, 4]])
def test_the_number_of_media_must_agree(encoder: ConversationEncoder, counts: list[int]) -> None:
    with pytest.raises(ValueError, match="visual_tokens"):
        encoder([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}], counts)


def test_collate_pads_on_the_right() -> None:
    batch = collate([([5, 6, 7], [IGNORE_INDEX, 6, 7]), ([8], [8])], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 6, 7], [8, IGNORE_INDEX, IGNORE_INDEX]]


def test_an_answer_is_right_when_every_token_is() -> None:
    labels = torch.tensor([[IGNORE_INDEX, 2, 3], [IGNORE_INDEX, 2, 3], [IGNORE_INDEX, IGNORE_INDEX, 1]])
    said = torch.tensor([[2, 3, 0], [2, 1, 3], [0, 1, 0]])
    logits = torch.nn.functional.one_hot(said, 4).float()
    assert answers_right(logits, labels).tolist() == [True, False, True]
