"""From conversations and pictures to a batch for the model, labelled on what the assistant says and nothing else.

A conversation is a list of messages in the form that model.chat takes. Its tokens are ChatML (MODEL.md section 6) put together
from ids: the text of a message is encoded as plain text, so that no content can end a turn or claim a picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch

from ..media import pack_rows
from ..tokenizer import Tokenizer
from .tasks import Sample

IGNORE_INDEX = -100

_GROUNDING = re.compile(r"(<\|(?:object_ref|box|quad)_(?:start|end)\|>)")

Encoded = tuple[list[int], list[int]]


class ConversationEncoder:
    """Turns conversations into token ids and labels.

    Args:
        tokenizer: of a checkpoint with the ChatML and vision tokens of Qwen2-VL.
        default_system: the system turn of a conversation that has none. None adds none, as nano's template does; the released
            template has "You are a helpful assistant.".
    """

    def __init__(self, tokenizer: Tokenizer, *, default_system: str | None = None) -> None:
        self._special = tokenizer.added
        self._text = lru_cache(maxsize=4096)(tokenizer.encode)
        self._default_system = default_system

    def __call__(self, messages: Sequence[dict[str, Any]], visual_tokens: Iterable[int] = ()) -> Encoded:
        """Token ids and labels of one conversation.

        Args:
            messages: turns {"role": ..., "content": text or a list of parts}; a part is a text, an image or a video.
            visual_tokens: t*h*w/4 of each image and video, in the order of the conversation.
        Returns:
            ids and labels, equally long: a label is the id where the assistant speaks, its <|im_end|> included, else -100.
        """
        if self._default_system is not None and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self._default_system}, *messages]
        counts = iter(visual_tokens)
        start, end = self._special["<|im_start|>"], self._special["<|im_end|>"]
        ids: list[int] = []
        labels: list[int] = []
        for message in messages:
            spoken = message["role"] == "assistant"
            header = f"{message['role']}\n"
            # A reply is generated after the encoded header, so there the two are encoded apart.
            before = [start, *self._text(header)] if spoken else [start]
            body = self._said(message["content"]) if spoken else self._parts(header, message["content"], counts)
            body = [*body, end]
            after = self._text("\n")
            ids += [*before, *body, *after]
            silent = [IGNORE_INDEX] * len(body)
            labels += [IGNORE_INDEX] * len(before) + (body if spoken else silent) + [IGNORE_INDEX] * len(after)
        if next(counts, None) is not None:
            raise ValueError("visual_tokens: expected one entry for each image and video of the messages, got more")
        return ids, labels

    def _said(self, content: str | Sequence[dict[str, Any]]) -> list[int]:
        """The ids of what the assistant says: text, in which the tokens of the grounding format stand for themselves."""
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        pieces = _GROUNDING.split(text)
        return [i for piece in pieces for i in ([self._special[piece]] if _GROUNDING.fullmatch(piece) else self._text(piece))]

    def _parts(self, text: str, content: str | Sequence[dict[str, Any]], counts: Iterator[int]) -> list[int]:
        """The ids of a message's content after `text`; neighbouring texts are encoded as one."""
        ids: list[int] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part.get("type") == "text":
                text += part["text"]
                continue
            if part.get("type") not in ("image", "video"):
                raise ValueError(f"messages: expected parts of type text, image or video, got {part.get('type')!r}")
            count = next(counts, None)
            if count is None:
                raise ValueError("visual_tokens: expected one entry for each image and video of the messages, got fewer")
            pad = self._special[f"<|{part['type']}_pad|>"]
            ids += [*self._text(text), self._special["<|vision_start|>"], *[pad] * count, self._special["<|vision_end|>"]]
            text = ""
        return ids + self._text(text)


# Clips keep their size: the default bounds of a frame would enlarge such small ones.
CLIP_BOUNDS = {"min_pixels": 28 * 28}


def conversation(sample: Sample, *, answered: bool = True) -> list[dict[str, Any]]:
    """A sample as a conversation: media and question, answers and further questions; the last answer only if `answered`."""
    parts: list[dict[str, Any]] = []
    for medium in sample.media:
        if medium.kind == "image":
            parts.append({"type": "image", "image": medium.frames[0]})
        else:
            parts.append({"type": "video", "video": list(medium.frames), **CLIP_BOUNDS})
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(sample.turns):
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [*parts, text] if number == 0 else [text]})
        messages.append({"role": "assistant", "content": answer})
    return messages if answered else messages[:-1]


def collate(encoded: Sequence[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels int64 [B,S], padded on the right; the model packs, so padding costs nothing."""
    longest = max(len(ids) for ids, _ in encoded)
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORE_INDEX}
    batch = {name: torch.full((len(encoded), longest), value) for name, value in fill.items()}
    for row, (ids, labels) in enumerate(encoded):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, : len(ids)] = torch.tensor(labels)
    return batch


def sample_batch(samples: Sequence[Sample], encoder: ConversationEncoder, pad_id: int) -> dict[str, torch.Tensor]:
    """The inputs of the model for B samples, with pixel_values [T,1176] and image_grid_thw [N,3] where there are images, and
    with those of videos where there are any.
    """
    encoded = [encoder(conversation(sample), [medium.tokens for medium in sample.media]) for sample in samples]
    batch = collate(encoded, pad_id)
    for kind, rows, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        media = [medium.frames for sample in samples for medium in sample.media if medium.kind == kind]
        if media:
            batch[rows], batch[grid] = pack_rows(media)
    return batch


def answers(logits: torch.Tensor, labels: torch.Tensor, decode: Callable[[list[int]], str]) -> list[str]:
    """The last answer of each row: the likeliest token after each token of the right one. logits [B,S,V], labels [B,S]."""
    said = []
    for row, targets in zip(logits[:, :-1].argmax(-1), labels[:, 1:], strict=True):
        places = (targets != IGNORE_INDEX).nonzero().flatten()
        gaps = (places.diff() > 1).nonzero().flatten()
        last = places[int(gaps[-1]) + 1 :] if len(gaps) else places
        said.append(decode(row[last].tolist()))
    return said
