"""Checkpoint folders and a stand-in model for the tests of chat and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from qwen2vl_fast.chat import Processor

SPECIAL = tuple(
    f"<|{name}|>"
    for name in (
        *(
            "endoftext",
            "im_start",
            "im_end",
            "object_ref_start",
            "object_ref_end",
            "box_start",
            "box_end",
            "quad_start",
        ),
        *("quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
    )
)

# How Qwen2 cuts text into words: contractions, letters with one sign before them, single digits, signs, lines, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)

CORPUS = (
    "You are a helpful assistant.\nsystem\nuser\nassistant\n",
    "What is in the picture? How many shapes are there? Read the text, please.",
    "The quick brown fox doesn't jump; it's 1234 metres away, they'll say \u00fcber \u00e9t\u00e9 na\u00efve caf\u00e9.",
    "\u56fe\u7247\u91cc\u6709\u4ec0\u4e48\uff1f\u6709\u4e00\u53ea\u732b\u3002 \u043a\u043e\u0448\u043a\u0430",
    "im_start im_end image_pad vision_start <| |> <|im <|image end|> pad|>",
)

# Texts whose spelling in tokens is easily got wrong: white space at the ends, composed letters, other scripts.
TEXTS = (
    *("Hello", "", " ", "\n", "\n\n", " leading", "trailing ", "\nleading line", "trailing line\n", "\n\n  both \n"),
    *("\t tabs\t", "\r\n", "don't we'll I'D", "12345 67", "e\u0301 \u00e9 A\u030a \u212b", "\u037e\u2126", "\ufffd"),
    *("\u56fe\u7247\u91cc", "\U0001f600\U0001f468\u200d\U0001f469", "\u0645\u0631\u062d\u0628\u0627", "\x00\x07"),
    *("a\u00a0b\u2003c", "<|", "|>", "<|im_en", "d|>", "x < y | z > w", "def f(x):\n    return x\n"),
)

# Another manner of template than the default: it trims, marks generation, uses a loop control and eos_token.
TRIMMING = (
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'tool' %}{% continue %}{% endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' }}\n"
    "    {%- if message.content is string %}{{ message.content | trim }}\n"
    "    {%- else %}{% for part in message.content %}\n"
    "        {%- if 'image' in part %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}\n"
    "        {%- elif 'video' in part %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}\n"
    "        {%- else %}{{ part.text.strip() }}{% endif %}\n"
    "    {%- endfor %}{% endif %}\n"
    "    {%- generation %}{{ eos_token }}{% endgeneration %}{{ '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_checkpoint(directory: Path, template: str | None = None) -> Path:
    """The files that chat reads, with a small BPE tokenizer of Qwen2's kind; 4 to 64 visual tokens an image."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens(list(SPECIAL))
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
    }
    write_json(directory / "tokenizer_config.json", {**config, **({"chat_template": template} if template else {})})
    write_json(directory / "preprocessor_config.json", {"min_pixels": 4 * 784, "max_pixels": 64 * 784})
    return directory


class FakeModel:
    """Says the given rows of token ids, whatever it is asked, and keeps the arguments."""

    device = torch.device("cpu")

    def __init__(self, processor: Processor, rows: list[list[int]]) -> None:
        self.rows, self.arguments = rows, {}
        self.config = SimpleNamespace(
            image_token_id=processor.image_token_id,
            video_token_id=processor.video_token_id,
            text=SimpleNamespace(max_position_embeddings=4096),
            generation=SimpleNamespace(eos_token_id=(processor.tokenizer.added["<|im_end|>"],)),
        )

    def generate(self, input_ids: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return torch.cat([input_ids, torch.tensor(self.rows)], 1)

    def stream(self, input_ids: Tensor, **arguments: Any):
        self.arguments = arguments
        yield from torch.tensor(self.rows).T
