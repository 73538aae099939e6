"""ChatML in and out: conversations with images and videos to the inputs of a model, and its tokens back to text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import media, video
from .reference import IMAGE_MEAN, IMAGE_STD
from .template import ChatTemplate, Masked
from .tokenizer import PAD_TOKEN, TextStream, Tokenizer, read_json

ROLES = ("system", "user", "assistant", "tool")
# Bounds on one call, checked before anything is rendered or decoded.
MAX_CONVERSATIONS = 1024
MAX_MESSAGES = 4096
MAX_MEDIA = 1024
MAX_CHARACTERS = 4_000_000

_DEFAULT_LENGTH = 32768
_PART_KEYS = {
    "text": {"text"},
    "image": {"image", "min_pixels", "max_pixels"},
    "video": {"video", "min_pixels", "max_pixels", "fps", "nframes"},
}
# What a preprocessor's configuration may say; anything else would change the pixels.
_FIXED = {
    "patch_size": media.PATCH,
    "merge_size": media.MERGE,
    "temporal_patch_size": 2,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
}

Messages = list[dict[str, Any]]


@dataclass
class _Medium:
    """An image or a video of a conversation; rows [T,1176] and grid [1,3] once it is preprocessed."""

    kind: str
    source: Any
    options: dict[str, Any]
    place: str
    rows: Tensor | None = None
    grid: Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(self.grid.prod()) // 4


def _kind(value: Any) -> str:
    return type(value).__name__


def _known(value: Any, names: Iterable[str]) -> str | None:
    """The name that a string equals. The template gets this one: a subclass of str may equal it and spell something else."""
    return next((name for name in names if isinstance(value, str) and name == value), None)


class _Reader:
    """Checks a conversation and takes it apart: `masked` for the template, `media` in the order of their parts."""

    def __init__(self, messages: Any, place: str) -> None:
        self.masked, self.media, self._characters = Masked(), [], 0
        if not isinstance(messages, (list, tuple)) or not messages:
            raise TypeError(
                f"{place}: expected a non-empty list of messages, got {messages if messages == [] else _kind(messages)}"
            )
        if len(messages) > MAX_MESSAGES:
            raise ValueError(f"{place}: expected at most {MAX_MESSAGES} messages, got {len(messages)}")
        for i, message in enumerate(messages):
            self._message(message, f"{place}, message {i}")

    def _message(self, message: Any, place: str) -> None:
        if not isinstance(message, dict):
            raise TypeError(f"{place}: expected a dict with the keys 'role' and 'content', got {_kind(message)}")
        if set(message) != {"role", "content"}:
            raise ValueError(f"{place}: expected the keys 'role' and 'content', got {sorted(map(str, message))}")
        role, content = _known(message["role"], ROLES), message["content"]
        if role is None:
            raise ValueError(f"{place}: role: expected one of {', '.join(ROLES)}, got {message['role']!r}")
        if isinstance(content, str):
            plain = self._text(content, place)
            masked = self.masked.name(plain)
        elif isinstance(content, (list, tuple)):
            parts = [self._part(part, f"{place}, part {i}") for i, part in enumerate(content)]
            masked, plain = [part[0] for part in parts], [part[1] for part in parts]
        else:
            raise TypeError(f"{place}: content: expected a string or a list of parts, got {_kind(content)}")
        self.masked.messages.append({"role": role, "content": masked})
        self.masked.plain.append({"role": role, "content": plain})

    def _part(self, part: Any, place: str) -> tuple[dict[str, str], dict[str, str]]:
        """A part as the template gets it, with texts masked and plain; a medium is only named."""
        if not isinstance(part, dict):
            raise TypeError(f"{place}: expected a dict such as {{'type': 'text', 'text': ...}}, got {_kind(part)}")
        kind = _known(part.get("type"), _PART_KEYS)
        if kind is None:
            link = _known(part.get("type"), ("image_url",))
            hint = "; download the picture and pass it as {'type': 'image', 'image': ...}" if link else ""
            raise ValueError(f"{place}: type: expected one of {', '.join(_PART_KEYS)}, got {part.get('type')!r}{hint}")
        unknown = [key for key in part if key != "type" and key not in _PART_KEYS[kind]]
        if unknown:
            raise ValueError(
                f"{place}: a part of type {kind!r} has the keys {sorted(_PART_KEYS[kind])}, got {unknown[0]!r} too"
            )
        if part.get(kind) is None:
            raise ValueError(f"{place}: a part of type {kind!r} needs a value under the key {kind!r}")
        if kind == "text":
            text = self._text(part["text"], place)
            return {"type": "text", "text": self.masked.name(text)}, {"type": "text", "text": text}
        options = {key: value for key, value in part.items() if key not in ("type", kind) and value is not None}
        self.media.append(_Medium(kind, part[kind], options, place))
        named = {"type": kind, kind: kind}
        return named, named

    def _text(self, text: Any, place: str) -> str:
        if not isinstance(text, str):
            raise TypeError(f"{place}: text: expected a string, got {_kind(text)}")
        self._characters += len(text)
        if self._characters > MAX_CHARACTERS:
            raise ValueError(f"{place}: expected at most {MAX_CHARACTERS} characters of text in a conversation, got more")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: text: expected valid Unicode, got a lone surrogate at index {error.start}") from None
        return str(text)


class Processor:
    """What a checkpoint needs besides its weights: tokenizer, chat template and the pixel bounds of images.

    Attributes:
        max_length: the longest prompt in tokens that the tokenizer's configuration allows.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        *,
        min_pixels: int = media.MIN_PIXELS,
        max_pixels: int = media.MAX_PIXELS,
        max_length: int = _DEFAULT_LENGTH,
    ) -> None:
        self.tokenizer, self.template = tokenizer, template or ChatTemplate()
        self.min_pixels, self.max_pixels, self.max_length = min_pixels, max_pixels, max_length
        self.image_token_id, self.video_token_id = tokenizer.added["<|image_pad|>"], tokenizer.added["<|video_pad|>"]

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Processor:
        """Reads tokenizer.json, the chat template and preprocessor_config.json of a checkpoint folder.

        Raises:
            FileNotFoundError: a file that is needed is missing; the message names it.
            ValueError: a file says what this package does not implement.
        """
        directory = Path(directory)
        tokenizer = Tokenizer.from_pretrained(directory)
        min_pixels, max_pixels = _pixel_bounds(directory)
        path = directory / "tokenizer_config.json"
        length = read_json(path).get("model_max_length") if path.exists() else None
        # Tokenizers without a bound say 1e30.
        max_length = int(length) if isinstance(length, (int, float)) and 0 < length < 10**9 else _DEFAULT_LENGTH
        template = ChatTemplate.from_pretrained(directory)
        return cls(tokenizer, template, min_pixels=min_pixels, max_pixels=max_pixels, max_length=max_length)

    def __call__(self, messages: Messages | list[Messages], *, max_length: int | None = None) -> dict[str, Tensor]:
        """The inputs of a model for a conversation, or for a batch of them.

        Args:
            messages: a conversation as in DESIGN.md (a list of messages), or a list of B conversations.
            max_length: the most tokens a prompt may have; None is the checkpoint's own bound. Prompts are never cut.
        Returns:
            input_ids and attention_mask int64 [B,S], shorter prompts padded on the left; where there are images
            pixel_values float32 [T,1176] and image_grid_thw int64 [N,3], where there are videos pixel_values_videos
            and video_grid_thw.
        Raises:
            TypeError, ValueError, OSError: what is wrong, with the index of conversation, message and part; or a
                prompt that is too long.
        """
        max_length = self.max_length if max_length is None else max_length
        readers = [_Reader(conversation, f"conversation {i}") for i, conversation in enumerate(_batch(messages))]
        count = sum(len(reader.media) for reader in readers)
        if count > MAX_MEDIA:
            raise ValueError(f"messages: expected at most {MAX_MEDIA} images and videos in a call, got {count}")
        rows, visual = [], media.DEFAULT_LIMITS.tokens
        for i, reader in enumerate(readers):
            rows.append(self._prompt(reader, i, max_length))
            visual -= sum(medium.tokens for medium in reader.media)
            if visual < 0:
                raise ValueError(
                    f"conversation {i}: the call has more than {media.DEFAULT_LIMITS.tokens} visual tokens by now; "
                    "split the batch"
                )
        length = max(len(row) for row in rows)
        pad = self.tokenizer.added[PAD_TOKEN]
        inputs = {
            "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        }
        for kind, rows_name, grid_name in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            media_of_kind = [medium for reader in readers for medium in reader.media if medium.kind == kind]
            if media_of_kind:
                inputs[rows_name] = torch.cat([medium.rows for medium in media_of_kind])
                inputs[grid_name] = torch.cat([medium.grid for medium in media_of_kind])
        return inputs

    def decode(self, ids: Tensor | Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids [S]; bytes that are not UTF-8 become U+FFFD."""
        if isinstance(ids, Tensor):
            if ids.dim() != 1 or ids.is_floating_point():
                raise ValueError(
                    f"ids: expected integers [S], got {ids.dtype} {list(ids.shape)}; decode one sequence at a time"
                )
            ids = ids.tolist()
        return self.tokenizer.decode(ids, skip_special_tokens)

    def _prompt(self, reader: _Reader, index: int, max_length: int) -> list[int]:
        """The ids of a conversation, with t*h*w/4 copies of the pad token for each of its media, preprocessed here."""
        pads = {"<|image_pad|>": "image", "<|video_pad|>": "video"}
        parts: list[list[int] | str] = []
        for special, piece in self.template.render(reader.masked, self.tokenizer.added):
            if special and piece in pads:
                parts.append(pads[piece])
            else:
                parts.append([self.tokenizer.added[piece]] if special else self.tokenizer.encode(piece))
        written = [part for part in parts if isinstance(part, str)]
        if written != [medium.kind for medium in reader.media]:
            raise ValueError(
                f"conversation {index}: the chat template wrote placeholders for {written or 'no media'}, but the "
                f"messages hold {[medium.kind for medium in reader.media] or 'no media'}"
            )
        ids: list[int] = []
        budget = max_length - sum(len(part) for part in parts if not isinstance(part, str))
        if budget < 0:
            raise ValueError(f"conversation {index}: its text alone has {max_length - budget} tokens; at most {max_length} fit")
        media_of_conversation = iter(reader.media)
        for part in parts:
            if not isinstance(part, str):
                ids += part
                continue
            medium = next(media_of_conversation)
            self._preprocess(medium)
            budget -= medium.tokens
            if budget < 0:
                raise ValueError(
                    f"{medium.place}: this {medium.kind} has {medium.tokens} visual tokens, {-budget} more than are "
                    f"left of the {max_length} that fit; a prompt is never cut: lower max_pixels or drop earlier turns"
                )
            ids += [self.image_token_id if part == "image" else self.video_token_id] * medium.tokens
        return ids

    def _preprocess(self, medium: _Medium) -> None:
        try:
            if medium.kind == "image":
                low, high = (
                    media.positive(name, medium.options[name]) if name in medium.options else None
                    for name in ("min_pixels", "max_pixels")
                )
                # The bound that a message gives wins over the checkpoint's other one.
                bounds = {
                    "min_pixels": (self.min_pixels if high is None else min(self.min_pixels, high)) if low is None else low,
                    "max_pixels": (self.max_pixels if low is None else max(self.max_pixels, low)) if high is None else high,
                }
                medium.rows, medium.grid = media.preprocess_images([medium.source], **bounds)
            else:
                options = {name: [value] for name, value in medium.options.items()}
                medium.rows, medium.grid = video.preprocess_videos([medium.source], **options)
        except OSError as error:
            reason = (error.strerror or str(error)).removeprefix(f"{medium.kind}s[0]: ")
            raise OSError(error.errno, f"{medium.place}: {reason}", error.filename) from error
        except (TypeError, ValueError) as error:
            reason = str(error).removeprefix(f"{medium.kind}s[0]: ")
            raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{medium.place}: {reason}") from error


def _batch(messages: Any) -> list[Any]:
    """A conversation or a batch of them, as a batch."""
    if not isinstance(messages, (list, tuple)) or not messages:
        got = "an empty one" if isinstance(messages, (list, tuple)) else _kind(messages)
        raise TypeError(f"messages: expected a list of messages or a list of conversations, got {got}")
    batch = [messages] if isinstance(messages[0], dict) else list(messages)
    if len(batch) > MAX_CONVERSATIONS:
        raise ValueError(f"messages: expected at most {MAX_CONVERSATIONS} conversations, got {len(batch)}")
    return batch


def _pixel_bounds(directory: Path) -> tuple[int, int]:
    """min_pixels and max_pixels for images: of processor_config.json if it has them, else preprocessor_config.json."""
    path = directory / "processor_config.json"
    config = read_json(path).get("image_processor") if path.exists() else None
    if config is None:
        path = directory / "preprocessor_config.json"
        config = read_json(path)
    for key, supported in _FIXED.items():
        if config.get(key) is not None and config[key] != supported:
            raise ValueError(f"{path}: {key} is {config[key]!r}; supported: {supported!r}")
    size = config.get("size") or {}
    bounds = []
    for name, old_name, default in (
        ("min_pixels", "shortest_edge", media.MIN_PIXELS),
        ("max_pixels", "longest_edge", media.MAX_PIXELS),
    ):
        # The released files repeat the names inside `size`.
        found = (value for value in (config.get(name), size.get(old_name), size.get(name)) if value is not None)
        value = next(found, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"{path}: {name}: expected a positive integer, got {value!r}")
        bounds.append(value)
    return bounds[0], bounds[1]


def chat(
    model: Any,
    processor: Processor,
    messages: Messages | list[Messages],
    *,
    max_new_tokens: int = 512,
    stream: bool = False,
    skip_special_tokens: bool = True,
    **sampling: Any,
) -> str | list[str] | Iterator[str]:
    """What the model answers.

    Args:
        model: has generate, stream, config and device as qwen2vl_fast.Qwen2VL does.
        messages: a conversation, or a list of conversations (a batch). Earlier answers go in as assistant messages.
        stream: yield the text piece by piece; one conversation only.
        skip_special_tokens: False keeps the tokens that mark names and boxes (MODEL.md section 6) in the text.
        sampling: passed on to model.generate (do_sample, temperature, top_p, seed, ...).
    Returns:
        A string; a list of strings for a batch, or for num_return_sequences > 1; with `stream` an iterator of strings
        that join to the same.
    """
    config = model.config
    for name in ("image_token_id", "video_token_id"):
        if getattr(config, name) != getattr(processor, name):
            raise ValueError(
                f"processor: its {name} is {getattr(processor, name)}, the model's {getattr(config, name)}; expected "
                "both to be of one checkpoint"
            )
    batch = not isinstance(messages, (list, tuple)) or not messages or not isinstance(messages[0], dict)
    if stream and (batch or sampling.get("num_return_sequences", 1) != 1):
        raise ValueError("stream: expected one conversation and num_return_sequences=1; call chat without stream for a batch")
    inputs = processor(messages, max_length=config.text.max_position_embeddings)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    ends = sampling.get("eos_token_id")
    ends = config.generation.eos_token_id if ends is None else (ends,) if isinstance(ends, Integral) else ends
    arguments = {**inputs, "max_new_tokens": max_new_tokens, **sampling}
    if stream:
        return _stream(model.stream(**arguments), TextStream(processor.tokenizer, skip_special_tokens), frozenset(ends))
    output = model.generate(**arguments)[:, inputs["input_ids"].shape[1] :].tolist()
    texts = []
    for row in output:
        stop = next((i for i, token_id in enumerate(row) if token_id in ends), len(row))
        texts.append(processor.decode(row[:stop], skip_special_tokens))
    return texts if batch or len(texts) > 1 else texts[0]


def _stream(tokens: Iterator[Tensor], text: TextStream, ends: frozenset[int]) -> Iterator[str]:
    for token in tokens:
        token_id = int(token)
        if token_id in ends:
            break
        piece = text.push(token_id)
        if piece:
            yield piece
    if rest := text.finish():
        yield rest
