"""Prompts equal transformers' where no special token is typed; media are counted and placed; text comes back whole."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from qwen2vl_fast.chat import Processor, chat
from qwen2vl_fast.config import Config
from qwen2vl_fast.media import preprocess_images
from qwen2vl_fast.model import Qwen2VL
from qwen2vl_fast.template import DEFAULT_TEMPLATE, ChatTemplate, Masked
from qwen2vl_fast.tokenizer import TextStream, Tokenizer
from qwen2vl_fast.video import preprocess_videos
from tests.chatting import SPECIAL, TEXTS, TRIMMING, FakeModel, write_checkpoint, write_json

NANO = Path(__file__).parents[1] / "qwen2vl_fast" / "assets" / "nano"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bpe"), DEFAULT_TEMPLATE)


@pytest.fixture(scope="module")
def processor(folder) -> Processor:
    return Processor.from_pretrained(folder)


@pytest.fixture(scope="module", params=["default", "trimming", "nano"])
def pair(request, tmp_path_factory):
    """A processor, and the tokenizer of transformers for the same files."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "nano":
        for path in NANO.glob("*.json"):
            shutil.copy(path, folder)
    else:
        write_checkpoint(folder, {"default": DEFAULT_TEMPLATE, "trimming": TRIMMING}[request.param])
    return Processor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def frames(count: int, height: int, width: int) -> list[Image.Image]:
    return [picture(height, width, i) for i in range(count)]


def image(height: int = 56, width: int = 56, seed: int = 0, **options) -> dict:
    return {"type": "image", "image": picture(height, width, seed), **options}


def clip(count: int = 4, height: int = 56, width: int = 56, **options) -> dict:
    return {"type": "video", "video": frames(count, height, width), **options}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def user(*parts) -> dict:
    return {"role": "user", "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}


def one_pad_each(ids: list[int], processor: Processor) -> list[int]:
    """ids with every run of placeholders shortened to one, as the template wrote it."""
    pads = (processor.image_token_id, processor.video_token_id)
    return [token for i, token in enumerate(ids) if token not in pads or ids[i - 1] != token]


def assert_like_transformers(pair, messages) -> None:
    processor, judge = pair
    ours = processor(messages)["input_ids"]
    theirs = judge.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert one_pad_each(ours[0].tolist(), processor) == theirs


@pytest.mark.parametrize("value", TEXTS, ids=[ascii(value) for value in TEXTS])
def test_a_text_is_tokenized_as_by_transformers(pair, value):
    assert_like_transformers(pair, [user(value)])
    assert_like_transformers(pair, [user(text(value), text(value), text("x"))])
    assert_like_transformers(
        pair, [{"role": "system", "content": value}, user("a"), {"role": "assistant", "content": value}, user(value)]
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=40).filter(lambda value: "<|" not in value), min_size=1, max_size=4))
def test_random_texts_are_tokenized_as_by_transformers(pair, values):
    messages = [{"role": ("user", "assistant")[i % 2], "content": value} for i, value in enumerate(values)]
    assert_like_transformers(pair, messages)


def test_conversations_with_media_are_tokenized_as_by_transformers(pair):
    assert_like_transformers(pair, [user(image(), text("What is this?"))])
    assert_like_transformers(
        pair, [user(text("one "), image(), text("\ntwo"), clip(), image(84, 56)), user(clip(), text(" end "))]
    )
    turns = [
        user(image(), text("a")),
        {"role": "assistant", "content": "b"},
        user(text("c"), image(56, 112)),
        {"role": "tool", "content": "5"},
    ]
    assert_like_transformers(pair, turns)


def test_the_default_template_writes_what_the_released_one_does(tmp_path):
    folder = write_checkpoint(tmp_path / "c")
    processor = Processor.from_pretrained(folder)

    def prompt(messages) -> str:
        return processor.decode(processor(messages)["input_ids"][0], skip_special_tokens=False)

    opening = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert prompt([user("Hi")]) == opening + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    pads = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    turns = [
        {"role": "system", "content": "Be brief."},
        user(text("A "), image(56, 84), text(" B\n")),
        {"role": "assistant", "content": [text("C")]},
        user(clip(4, 56, 56, min_pixels=3136, max_pixels=3136)),
    ]
    assert prompt(turns) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\nA {pads} B\n<|im_end|>\n<|im_start|>assistant\nC<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{'<|video_pad|>' * 8}<|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    )


ORDERS = ("i", "v", "ii", "iv", "vi", "vv", "iiv", "ivi", "vii", "ivvi", "viiv", "iiii")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("turns", [1, 2])
def test_media_in_any_order_and_over_turns(processor, order, turns):
    """Placeholders follow the order of the parts; rows and grids are those of the media alone."""
    sizes = [(56, 84), (84, 84), (112, 56), (56, 56)]
    parts, expected = [], []
    for i, kind in enumerate(order):
        height, width = sizes[i]
        bounds = {"min_pixels": 3136, "max_pixels": 12544}
        if kind == "i":
            parts.append(image(height, width, i, **bounds))
            expected.append((processor.image_token_id, *preprocess_images([parts[-1]["image"]], **bounds)))
        else:
            parts.append(clip(2 * i + 2, height, width, **bounds))
            expected.append((processor.video_token_id, *preprocess_videos([parts[-1]["video"]], **bounds)))
    split = len(parts) // turns
    messages = [
        user(*parts[:split], text("one")),
        {"role": "assistant", "content": "ok"},
        user(*parts[split:], text("two")),
    ]
    inputs = processor(messages if turns == 2 else [user(*parts, text("one"))])
    ids = inputs["input_ids"][0]
    pads = ids[(ids == processor.image_token_id) | (ids == processor.video_token_id)]
    assert pads.tolist() == [token for token, _, grid in expected for _ in range(int(grid.prod()) // 4)]
    for token, names in (
        (processor.image_token_id, ("pixel_values", "image_grid_thw")),
        (processor.video_token_id, ("pixel_values_videos", "video_grid_thw")),
    ):
        ours = [(rows, grid) for kind, rows, grid in expected if kind == token]
        if not ours:
            assert not set(names) & set(inputs)
        else:
            assert torch.equal(inputs[names[0]], torch.cat([rows for rows, _ in ours]))
            assert torch.equal(inputs[names[1]], torch.cat([grid for _, grid in ours]))


def test_pixel_bounds_come_from_the_checkpoint_and_yield_to_the_medium(processor):
    big = picture(560, 560)
    assert processor([user({"type": "image", "image": big})])["image_grid_thw"].tolist() == [[1, 16, 16]]
    capped = processor([user({"type": "image", "image": big, "max_pixels": 4 * 784})])
    assert capped["image_grid_thw"].tolist() == [[1, 4, 4]]
    raised = processor([user({"type": "image", "image": big, "max_pixels": 400 * 784})])
    assert raised["image_grid_thw"].tolist() == [[1, 40, 40]]
    small = processor([user({"type": "image", "image": picture(28, 28), "min_pixels": 16 * 784})])
    assert small["image_grid_thw"].tolist() == [[1, 8, 8]]
    # Below the checkpoint's lower bound, above its upper one: the medium's own bound holds.
    least = processor([user({"type": "image", "image": big, "max_pixels": 784})])
    assert least["image_grid_thw"].tolist() == [[1, 2, 2]]
    most = processor([user({"type": "image", "image": big, "min_pixels": 900 * 784, "max_pixels": None})])
    assert most["image_grid_thw"].tolist() == [[1, 60, 60]]


def test_a_batch_is_padded_on_the_left_and_equals_its_conversations(processor):
    conversations = [
        [user("Hi")],
        [user(image(56, 84, 1), text("What is in the picture?"), image(84, 84, 2))],
        [user(clip(4, 56, 56, max_pixels=3136, min_pixels=3136), image(56, 56, 3))],
    ]
    batch, singles = processor(conversations), [processor(conversation) for conversation in conversations]
    length = max(single["input_ids"].shape[1] for single in singles)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, length)
    for row, mask, single in zip(batch["input_ids"], batch["attention_mask"], singles, strict=True):
        pad = length - single["input_ids"].shape[1]
        assert mask.tolist() == [0] * pad + [1] * (length - pad)
        assert row[:pad].tolist() == [processor.tokenizer.added["<|endoftext|>"]] * pad
        assert torch.equal(row[pad:], single["input_ids"][0])
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        assert torch.equal(batch[name], torch.cat([single[name] for single in singles if name in single]))


def test_template_files_are_taken_in_the_order_of_transformers(tmp_path):
    def answer(folder) -> str:
        processor = Processor.from_pretrained(folder)
        return processor.decode(processor([user("x")])["input_ids"][0])

    folder = write_checkpoint(tmp_path / "c", "tokenizer_config")
    assert answer(folder) == "tokenizer_config"
    (folder / "chat_template.jinja").write_text("jinja")
    assert answer(folder) == "jinja"
    write_json(folder / "chat_template.json", {"chat_template": "json"})
    assert answer(folder) == "json"
    write_json(folder / "processor_config.json", {"processor_class": "Qwen2VLProcessor"})
    assert answer(folder) == "json"
    write_json(folder / "processor_config.json", {"chat_template": "processor_config"})
    assert answer(folder) == "processor_config"


def test_a_named_template_of_tokenizer_config(tmp_path):
    folder = write_checkpoint(tmp_path / "c")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    write_json(folder / "tokenizer_config.json", config)
    processor = Processor.from_pretrained(folder)
    assert processor.decode(processor([user("x")])["input_ids"][0]) == "yes"


@pytest.mark.parametrize(
    ("files", "bounds"),
    [
        ({"preprocessor_config.json": {"min_pixels": 784, "max_pixels": 1568}}, (784, 1568)),
        ({"preprocessor_config.json": {"size": {"shortest_edge": 784, "longest_edge": 1568}}}, (784, 1568)),
        (
            {"preprocessor_config.json": {"min_pixels": 784, "size": {"shortest_edge": 1, "longest_edge": 1568}}},
            (784, 1568),
        ),
        ({"preprocessor_config.json": {"size": {"min_pixels": 784, "max_pixels": 1568}}}, (784, 1568)),
        ({"preprocessor_config.json": {}}, (3136, 12845056)),
        ({"processor_config.json": {"image_processor": {"min_pixels": 784, "max_pixels": 1568}}}, (784, 1568)),
        ({"processor_config.json": {}, "preprocessor_config.json": {"min_pixels": 784}}, (784, 12845056)),
    ],
)
def test_where_pixel_bounds_are_read(tmp_path, files, bounds):
    folder = write_checkpoint(tmp_path / "c")
    (folder / "preprocessor_config.json").unlink()
    for name, value in files.items():
        write_json(folder / name, value)
    processor = Processor.from_pretrained(folder)
    assert (processor.min_pixels, processor.max_pixels) == bounds


# Decoding.


def spelled(tokenizer: Tokenizer, length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(450) for _ in range(length)]


@pytest.mark.parametrize("skip", [True, False])
def test_decode_equals_the_tokenizers_library(folder, processor, skip):
    """Also for bytes that are not UTF-8, special tokens in between, and ids without a token."""
    judge = Backend.from_file(str(folder / "tokenizer.json"))
    for seed in range(300):
        ids = spelled(processor.tokenizer, seed % 40, seed)
        assert processor.decode(ids, skip) == judge.decode(ids, skip_special_tokens=skip)
        assert processor.decode(torch.tensor(ids, dtype=torch.int64), skip) == processor.decode(ids, skip)


@pytest.mark.parametrize("skip", [True, False])
def test_streamed_text_joins_to_the_decoded_text(processor, skip):
    for seed in range(300):
        ids = spelled(processor.tokenizer, seed % 40, seed)
        stream = TextStream(processor.tokenizer, skip)
        assert "".join([*map(stream.push, ids), stream.finish()]) == processor.decode(ids, skip)


def test_a_character_is_not_streamed_in_parts(processor):
    value = "\u732b\U0001f600\u00e9!"
    nano = Tokenizer.from_pretrained(NANO)
    stream = TextStream(nano)
    pieces = [stream.push(byte) for byte in nano.encode(value)]
    assert [piece for piece in pieces if piece] == list(value)
    assert stream.finish() == ""


# chat.


def said(processor: Processor, value: str, end: bool = True) -> list[int]:
    return processor.tokenizer.encode(value) + [processor.tokenizer.added["<|im_end|>"]] * end


def test_chat_answers_and_streams_the_same(processor):
    value = "It is a caf\u00e9 \u732b \U0001f600."
    pad = processor.tokenizer.added["<|endoftext|>"]
    model = FakeModel(processor, [[*said(processor, value), pad, pad]])
    messages = [user(image(), text("What?"))]
    assert chat(model, processor, messages, max_new_tokens=9, temperature=0.5) == value
    assert (model.arguments["max_new_tokens"], model.arguments["temperature"]) == (9, 0.5)
    assert torch.equal(model.arguments["image_grid_thw"], processor(messages)["image_grid_thw"])
    pieces = list(chat(model, processor, messages, stream=True, seed=3))
    assert "".join(pieces) == value and len(pieces) > 3 and model.arguments["seed"] == 3


def test_chat_stops_at_the_ends_it_is_given(processor):
    (dot,) = processor.tokenizer.encode(".")
    row = [*said(processor, "One"), dot, *said(processor, "two", end=False)]
    model = FakeModel(processor, [row])
    assert chat(model, processor, [user("x")]) == "One"
    for end in (dot, np.int64(dot)):
        assert chat(model, processor, [user("x")], eos_token_id=end) == "One"
    assert chat(model, processor, [user("x")], eos_token_id=[]) == "One.two"
    assert "".join(chat(model, processor, [user("x")], eos_token_id=[dot], stream=True)) == "One"
    assert "".join(chat(model, processor, [user("x")], eos_token_id=[], stream=True)) == "One.two"


def test_an_answer_that_ends_inside_a_character_streams_as_it_is_decoded(processor):
    ids = processor.tokenizer.encode("a") + [processor.tokenizer.encode("\U0001f600")[0]]
    model = FakeModel(processor, [ids])
    assert chat(model, processor, [user("x")]) == "a\ufffd"
    assert "".join(chat(model, processor, [user("x")], stream=True)) == "a\ufffd"


def test_the_longest_special_token_of_a_template_wins():
    assert ChatTemplate("<a><a>b<a").render(Masked(), ["<a>", "<a>b"]) == [(True, "<a>"), (True, "<a>b"), (False, "<a")]


def test_chat_keeps_grounding_tokens_on_request(processor):
    added = processor.tokenizer.added
    row = [
        added["<|box_start|>"],
        *processor.tokenizer.encode("(1,2),(3,4)"),
        added["<|box_end|>"],
        added["<|im_end|>"],
    ]
    model = FakeModel(processor, [row])
    assert chat(model, processor, [user("x")]) == "(1,2),(3,4)"
    assert chat(model, processor, [user("x")], skip_special_tokens=False) == "<|box_start|>(1,2),(3,4)<|box_end|>"


def test_chat_with_a_batch_and_with_several_answers(processor):
    rows = [said(processor, "a"), said(processor, "b")]
    model = FakeModel(processor, rows)
    assert chat(model, processor, [[user("x")], [user("y")]]) == ["a", "b"]
    assert chat(FakeModel(processor, rows[:1]), processor, [[user("x")]]) == ["a"]


def test_the_model_chats_alike_alone_in_a_batch_and_streaming():
    """With nano's shape and random weights in float64: what is said depends on nothing but the conversation."""
    torch.manual_seed(0)
    model = Qwen2VL(Config.from_pretrained(NANO)).double()
    model.source = NANO
    conversations = [
        [user("Hello")],
        [user(image(56, 84, 1), text("What is this?")), {"role": "assistant", "content": "a"}, user(image(84, 84, 2))],
        [user(clip(4, 56, 56, min_pixels=3136, max_pixels=3136), image(56, 56, 3), text("And this?"))],
    ]
    options = {"max_new_tokens": 12, "eos_token_id": []}
    answers = model.chat(conversations, **options)
    assert len(set(answers)) > 1
    for conversation, answer in zip(conversations, answers, strict=True):
        assert model.chat(conversation, **options) == answer
        assert "".join(model.chat(conversation, stream=True, **options)) == answer
    several = model.chat(conversations[1], num_return_sequences=3, do_sample=True, seed=1, **options)
    assert len(several) == 3 and len(set(several)) > 1


def test_special_ids_are_those_of_the_files(folder, processor):
    judge = Backend.from_file(str(folder / "tokenizer.json"))
    assert processor.tokenizer.added == {token: judge.token_to_id(token) for token in SPECIAL}
