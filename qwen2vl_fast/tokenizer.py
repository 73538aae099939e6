"""tokenizer.json of a checkpoint, in two halves that never meet: special tokens, and byte-level BPE of plain text.

`encode` knows plain text only: it runs a tokenizer from which every added token was taken out, so that a special token
typed by a user is spelled in ordinary tokens. Special ids are looked up by name, by code that wrote the name itself.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as _Backend

PAD_TOKEN = "<|endoftext|>"
REQUIRED_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the checkpoint; errors name the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.name} not found in {path.parent}; chat needs it beside config.json") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _byte_alphabet() -> dict[str, int]:
    """The character that spells each byte in a byte-level vocabulary: printable Latin-1 itself, the others from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class Tokenizer:
    """Byte-level BPE with added tokens.

    Args:
        spec: the content of tokenizer.json.
        name: what error messages call it.

    Attributes:
        added: added token -> id, special or not.
    Raises:
        ValueError: not byte-level BPE, a byte without a token, a missing special token, or an added token
            whose flags (lstrip, rstrip, single_word) would let it take in the text around it.
    """

    def __init__(self, spec: dict[str, Any], name: str = "tokenizer.json") -> None:
        model, added = spec.get("model") or {}, spec.get("added_tokens") or []
        if model.get("type") != "BPE" or (spec.get("decoder") or {}).get("type") != "ByteLevel":
            raise ValueError(
                f"{name}: expected a BPE model with a ByteLevel decoder, got {model.get('type')!r} with "
                f"{(spec.get('decoder') or {}).get('type')!r}"
            )
        if not isinstance(model.get("vocab"), dict) or not all(
            isinstance(token.get("content"), str) and isinstance(token.get("id"), int) for token in added
        ):
            raise ValueError(
                f"{name}: expected model.vocab to map tokens to ids, and added_tokens with a content and an id each"
            )
        for token in added:
            flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
            if flags:
                raise ValueError(f"{name}: added token {token['content']!r} sets {', '.join(flags)}, which is not supported")
        self.added: dict[str, int] = {token["content"]: token["id"] for token in added}
        missing = [token for token in REQUIRED_TOKENS if token not in self.added]
        if missing:
            raise ValueError(f"{name}: added_tokens lacks {', '.join(missing)}; expected the special tokens of Qwen2-VL")
        self._special = frozenset(token["id"] for token in added if token.get("special"))
        ids = frozenset(self.added.values())
        plain = {token: i for token, i in model["vocab"].items() if token not in self.added and i not in ids}
        if not plain.keys() >= _BYTES.keys():
            raise ValueError(
                f"{name}: {len(_BYTES.keys() - plain.keys())} of the 256 byte tokens are missing from the vocabulary"
            )
        self._tokens = {i: token for token, i in plain.items()} | {i: token for token, i in self.added.items()}
        self._bytes: dict[int, bytes] = {}
        unbounded = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        try:
            self._plain = _Backend.from_str(json.dumps({**spec, **unbounded, "model": {**model, "vocab": plain}}))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ValueError(f"{name}: {error}") from None

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Tokenizer:
        path = Path(directory) / "tokenizer.json"
        return cls(read_json(path), str(path))

    def encode(self, text: str) -> list[int]:
        """The ids of plain text; none of them is an added token's."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """The bytes that a token stands for: none for an id without a token, nor for a special one that is skipped."""
        if token_id < 0:
            raise ValueError(f"ids: expected token ids of at least 0, got {token_id}")
        if skip_special_tokens and token_id in self._special:
            return b""
        if token_id not in self._bytes:
            token = self._tokens.get(token_id, "")
            known = all(character in _BYTES for character in token)
            self._bytes[token_id] = bytes(_BYTES[character] for character in token) if known else token.encode()
        return self._bytes[token_id]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i, skip_special_tokens) for i in ids).decode(errors="replace")


class TextStream:
    """Text out of ids that come one by one. The pieces join to `decode` of all ids, and no character is ever split."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes, maybe none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id, self._skip))

    def finish(self) -> str:
        """What was held back, once no token follows."""
        return self._decoder.decode(b"", final=True)
