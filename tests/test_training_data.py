"""The generated pictures and the batches made of conversations."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen2vl_fast.chat import Processor
from qwen2vl_fast.media import preprocess_images
from qwen2vl_fast.tokenizer import Tokenizer
from qwen2vl_fast.training import lettering, shapes
from qwen2vl_fast.training.data import (
    CLIP_BOUNDS,
    IGNORE_INDEX,
    ConversationEncoder,
    answers,
    collate,
    conversation,
    sample_batch,
)
from qwen2vl_fast.training.nano_files import TOKEN_IDS, build_tokenizer, write_files
from qwen2vl_fast.training.tasks import (
    BOX_STEP,
    CELL_COLUMNS,
    DIRECTIONS,
    IGNORE,
    MAX_COUNT,
    MAX_LEVEL,
    TASKS,
    TEST_SEEDS,
    TRAIN_SEEDS,
    VALIDATION_SEEDS,
    generate,
    overlap,
    right,
)
from qwen2vl_fast.video import preprocess_videos

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


SEEN = tuple(task for task in TASKS if task not in ("copy", "sum"))


def pixels(sample) -> bytes:
    return b"".join(medium.frames.tobytes() for medium in sample.media)


def test_pictures_of_test_and_training_differ() -> None:
    def seen(seeds: range) -> set[bytes]:
        return {pixels(generate(task, seed)) for task in SEEN for seed in seeds[:12]}

    train, validation, test = map(seen, (TRAIN_SEEDS, VALIDATION_SEEDS, TEST_SEEDS))
    assert len(train | validation | test) == len(SEEN) * 36


@pytest.mark.parametrize(("task", "level"), [(task, level) for task in TASKS for level in range(MAX_LEVEL[task] + 1)])
def test_a_sample_is_a_function_of_its_seed(task: str, level: int) -> None:
    for seed in range(5):
        first, second = generate(task, seed, level), generate(task, seed, level)
        assert pixels(first) == pixels(second) and first.turns == second.turns
    if task in SEEN:
        assert len({pixels(generate(task, seed, level)) for seed in range(10)}) == 10


@pytest.mark.parametrize("task", SEEN)
def test_media_have_legal_sizes_and_as_many_labels_as_tokens(task: str) -> None:
    for seed in range(100):
        for medium in generate(task, seed).media:
            frames, height, width, channels = medium.frames.shape
            assert medium.frames.dtype == np.uint8 and channels == 3
            assert height % 28 == width % 28 == 0 and height * width >= 3136 and max(height, width) <= 336
            assert frames == 1 if task not in ("motion", "order") else frames % 2 == 0 and 4 <= frames <= 16
            pairs = max(1, frames // 2)
            assert medium.tokens == pairs * height * width // 28**2 == len(medium.boxes) and len(medium.pairs) == pairs
            assert medium.cells.shape[1] == len(CELL_COLUMNS)
            limits = np.array([*CELL_COLUMNS.values()])
            assert ((medium.cells == IGNORE) | ((medium.cells >= 0) & (medium.cells < limits))).all()


def test_sizes_cover_the_range() -> None:
    sides = {
        side for task in ("read", "name") for seed in range(200) for side in generate(task, seed).media[0].frames.shape[1:3]
    }
    assert {28, 56, 84, 112, 140, 168} < sides and sides & {280, 336}


def shown(sample, medium: int = 0) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Colours and shapes centred in the cells of a picture, by its labels, with their boxes in shares."""
    cells, boxes = sample.media[medium].cells, sample.media[medium].boxes
    at = cells[:, 6] > 0
    kinds, paints = [*shapes.SHAPES], [*shapes.COLORS]
    return [(paints[c - 1], kinds[k - 1]) for k, c in cells[at][:, 4:6]], boxes[at]


def test_counts_and_comparisons_agree_with_the_labels() -> None:
    said = set()
    for seed in range(60):
        sample = generate("count", seed)
        assert int(sample.answer) == sample.media[0].pairs[0, 0]
        said.add(int(sample.answer))
        sample = generate("compare", seed)
        first, second = (int(medium.pairs[0, 0]) for medium in sample.media)
        assert first != second and sample.answer == ("first" if first > second else "second")
    assert said == {*range(1, MAX_COUNT + 1)}


def test_names_are_those_of_the_shape() -> None:
    for seed in range(100):
        sample = generate("name", seed)
        ((color, kind),) = set(shown(sample)[0])
        article = "an" if color == "orange" else "a"
        assert sample.answer in (color, kind, f"{article} {color} {kind}")
        assert ("color" in sample.question, "shape" in sample.question) == (sample.answer == color, sample.answer == kind)


def test_the_middle_of_a_filled_shape_has_its_color_and_lies_in_its_box() -> None:
    rng = np.random.default_rng(0)
    for kind in shapes.SHAPES:
        canvas = np.zeros((84, 112, 3), dtype=np.float32)
        rgb = shapes.shade(rng, "red")
        left, top, right_, bottom = shapes.draw(canvas, shapes.Placed(kind, "red", rgb, 50.3, 40.8, 20.0, 0.3))
        if kind != "ring":
            assert np.abs(canvas[40, 50] - rgb).max() <= 1
        inked = np.argwhere(canvas.sum(2) > 0.5 * rgb.sum())
        assert (top, left) == tuple(inked.min(0)) and (bottom - 1, right_ - 1) == tuple(inked.max(0))


def test_boxes_are_those_of_the_named_shape() -> None:
    for seed in range(100):
        sample = generate("box", seed)
        name = sample.question.removeprefix("Find the ").removesuffix(".")
        assert sample.answer.startswith(f"<|object_ref_start|>{name}<|object_ref_end|><|box_start|>(")
        height, width = sample.media[0].frames.shape[1:3]
        assert (
            0 <= min(sample.box) and max(sample.box) <= 999 and sample.box[0] < sample.box[2] and sample.box[1] < sample.box[3]
        )
        # Two shapes may have their centres in one cell; the cell's labels are one's.
        names, boxes = shown(sample)
        for found, box in zip(names, boxes, strict=True):
            if " ".join(found) == name:
                assert np.abs(1000 * box - np.array(sample.box)).max() <= 1
        assert right(sample, sample.answer) and overlap(sample.answer, sample.box) > 0.7
        said = [int(n) for n in re.findall(r"\d+", sample.answer)]
        assert np.abs(np.array(said) - sample.box).max() <= BOX_STEP and not any(n % BOX_STEP for n in said)
        for wrong in (sample.answer.replace(name, "thing"), "", sample.answer + " ", sample.answer * 2, " " + sample.answer):
            assert not right(sample, wrong)


def test_overlap_by_counting_points() -> None:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:60, :60]
    for _ in range(200):
        (l1, l2), (t1, t2) = rng.integers(0, 30, (2, 2))
        (w1, w2), (h1, h2) = rng.integers(1, 30, (2, 2))
        one = (x >= l1) & (x < l1 + w1) & (y >= t1) & (y < t1 + h1)
        other = (x >= l2) & (x < l2 + w2) & (y >= t2) & (y < t2 + h2)
        said = f"<|box_start|>({l1},{t1}),({l1 + w1},{t1 + h1})<|box_end|>"
        assert overlap(said, (l2, t2, l2 + w2, t2 + h2)) == pytest.approx((one & other).sum() / (one | other).sum())
    assert overlap("<|box_start|>(5,5),(1,1)<|box_end|>", (0, 0, 9, 9)) == overlap("(1,1)", (0, 0, 9, 9)) == 0


@pytest.mark.parametrize("level", range(MAX_LEVEL["relation"] + 1))
def test_neighbours_lie_where_the_question_says(level: int) -> None:
    """And nothing else lies on that side."""
    judged = 0
    for seed in range(150):
        sample = generate("relation", seed, level)
        word, _, of = sample.question.removeprefix("What is ").removesuffix("?").partition(" the ")
        places = {" ".join(name): (box[:2] + box[2:]) / 2 for name, box in zip(*shown(sample), strict=True)}
        answer = sample.answer.split(" ", 1)[1]
        if of in places and answer in places:
            judged += 1
            way = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[word]
            assert [name for name, place in places.items() if (place - places[of]) @ way > 0.25] == [answer]
            x, y = places[answer] - places[of]
            assert abs(x) > abs(y) if "of" in word else abs(y) > abs(x)
    assert judged > 100


def test_clips_move_as_they_say() -> None:
    for seed in range(60):
        sample = generate("motion", seed)
        boxes = [pair[~np.isnan(pair[:, 0])] for pair in np.split(sample.media[0].boxes, len(sample.media[0].pairs))]
        x, y = (boxes[-1][0] - boxes[0][0])[:2]
        way = ("left" if x < 0 else "right") if abs(x) > abs(y) else ("up" if y < 0 else "down")
        assert sample.answer == way == DIRECTIONS[sample.media[0].pairs[0, 1]]


def test_what_comes_first_and_last() -> None:
    for seed in range(60):
        sample = generate("order", seed)
        medium = sample.media[0]
        cells = np.split(medium.cells, len(medium.pairs))[-1 if "last" in sample.question else 0]
        kind, color = cells[cells[:, 4] > 0][0, 4:6]
        name = f"{[*shapes.COLORS][color - 1]} {[*shapes.SHAPES][kind - 1]}"
        assert sample.answer.split(" ", 1)[1] == name


def test_the_labels_of_text_spell_it() -> None:
    spelled = 0
    for seed in range(200):
        sample = generate("read", seed, 3)
        assert set(sample.answer) <= {*lettering.ALPHABET} and 1 <= len(sample.answer) <= 6
        cells = sample.media[0].cells
        # One line: its cells from left to right. Large type may put its centres on two rows of cells.
        cells = cells[(cells[:, 0] > 0)]
        order = np.argsort(cells[:, 3], kind="stable")
        text = "".join(lettering.ALPHABET[c - 1] for cell in cells[order] for c in cell[:3] if c > 0)
        spelled += text == sample.answer
    assert spelled >= 190
    two = [sample.answer for seed in range(100) if "\n" in (sample := generate("read", seed)).answer]
    assert 10 <= len(two) <= 45 and all(1 <= len(line) <= 4 for text in two for line in text.split("\n"))


def test_text_stands_out_from_its_background() -> None:
    luma = np.array([0.299, 0.587, 0.114])
    for seed in range(200):
        brightness = np.sort((generate("read", seed).media[0].frames[0].astype(float) @ luma).ravel())
        assert brightness[-20] - brightness[20] > 50


@pytest.mark.parametrize(("task", "level"), [("counting", 2), ("count", MAX_LEVEL["count"] + 1), ("count", -1)])
def test_generate_refuses_what_it_does_not_know(task: str, level: int) -> None:
    with pytest.raises(ValueError, match="task|level"):
        generate(task, 0, level)


def test_batches_hold_the_pixels_of_the_public_preprocessing(encoder: ConversationEncoder) -> None:
    samples = [generate(task, seed) for task in TASKS for seed in range(8)]
    batch = sample_batch(samples, encoder, PAD)
    media = [medium for sample in samples for medium in sample.media]
    pixel_values, grids = preprocess_images([medium.frames[0] for medium in media if medium.kind == "image"])
    assert torch.equal(batch["pixel_values"], pixel_values)
    assert torch.equal(batch["image_grid_thw"], grids)
    pixel_values, grids = preprocess_videos([list(medium.frames) for medium in media if medium.kind == "video"], **CLIP_BOUNDS)
    assert torch.equal(batch["pixel_values_videos"], pixel_values)
    assert torch.equal(batch["video_grid_thw"], grids)


def test_training_tokens_are_the_prompt_and_then_the_answer(checkpoint: Path, encoder: ConversationEncoder) -> None:
    processor = Processor.from_pretrained(checkpoint)
    end = TOKEN_IDS["<|im_end|>"]
    for task in TASKS:
        for seed in range(6):
            sample = generate(task, seed)
            prompt = processor(conversation(sample, answered=False))["input_ids"][0].tolist()
            ids, labels = encoder(conversation(sample), [medium.tokens for medium in sample.media])
            answer = ids[len(prompt) : -1]
            assert ids == [*prompt, *answer, ord("\n")] and processor.decode(answer, False) == f"{sample.answer}<|im_end|>"
            earlier = [i for _, said in sample.turns[:-1] for i in [*said.encode(), end]]
            assert [label for label in labels[: len(prompt)] if label != IGNORE_INDEX] == earlier
            assert labels[len(prompt) :] == [*answer, IGNORE_INDEX]


def test_a_box_is_said_in_the_tokens_of_the_format(encoder: ConversationEncoder) -> None:
    sample = generate("box", 0)
    ids, _ = encoder(conversation(sample), [medium.tokens for medium in sample.media])
    for token in ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"):
        assert ids.count(TOKEN_IDS[token]) == 1
    ids, _ = encoder([{"role": "user", "content": sample.answer}, {"role": "assistant", "content": "no"}])
    assert TOKEN_IDS["<|box_start|>"] not in ids


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


def test_answers_are_the_likeliest_tokens_of_the_last_turn() -> None:
    labels = torch.tensor(
        [[IGNORE_INDEX, 2, 3, IGNORE_INDEX, 1, 2], [IGNORE_INDEX, 2, 3, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]]
    )
    said = torch.tensor([[3, 3, 0, 1, 0, 0], [2, 1, 3, 0, 0, 0]])
    logits = torch.nn.functional.one_hot(said, 4).float()
    assert answers(logits, labels, lambda ids: "".join(map(str, ids))) == ["10", "21"]
