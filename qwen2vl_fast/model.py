"""Qwen2VL: pixels and tokens in, logits out. Composes the tower, the decoder, generation and chat."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import generate as generation
from . import inputs as batches
from . import ops, weights
from .cache import KVCache
from .config import Config
from .modules import Linear, plain
from .ops.backends import check_backend, using
from .ops.linear import linear
from .positions import attention_schedule, check_grid
from .text import Decoder, TextPack
from .vision import VisionTower

DEFAULT_MAX_PACK_PATCHES = 1 << 17
_SHARED_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.json", "chat_template.jinja", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


class Output:
    """loss: a scalar, or None without labels. logits: [B, S or logits_to_keep, V] in the model's dtype, zeros at padding.

    With labels the logits are computed when they are first asked for: the loss does not need them, and they are the largest
    tensor of a training step.
    """

    def __init__(self, loss: torch.Tensor | None, logits: Callable[[], torch.Tensor]):
        self.loss = loss
        self._logits = logits

    @cached_property
    def logits(self) -> torch.Tensor:
        return self._logits()


class Qwen2VL(nn.Module):
    """The full network. The module tree carries the released checkpoint's names: visual, model, lm_head."""

    def __init__(self, config: Config, *, backend: str | None = None, max_pack_patches: int | None = None):
        """Random weights (normal, the config's initializer_range). See `from_pretrained` for the arguments."""
        super().__init__()
        if max_pack_patches is not None:
            batches.check_int("max_pack_patches", max_pack_patches)
            if max_pack_patches < 4:
                raise ValueError(f"max_pack_patches: expected at least 4 (one visual token), got {max_pack_patches}")
        check_backend(backend)
        self.config = config
        self.backend = backend
        self.max_pack_patches = max_pack_patches or DEFAULT_MAX_PACK_PATCHES
        self.source: Path | None = None
        self._processor = None
        self.visual = VisionTower(config.vision)
        self.model = Decoder(config.text)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        )
        std = config.raw.get("initializer_range")
        std = 0.02 if std is None else std
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv3d)):
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        max_pack_patches: int | None = None,
        revision: str | None = None,
    ) -> Qwen2VL:
        """Loads a checkpoint in the released format from a folder, or from the Hugging Face hub by repository id.

        Args:
            path_or_repo_id: a folder, or a repository id ("owner/name"), which huggingface_hub downloads at one revision.
            device: None = CUDA where there is one, else the CPU.
            dtype: None = the checkpoint's own. On the CPU that dtype is mapped from the file, not copied.
            backend: prefer this backend for every op that it has (see `backends()`); None = the fastest.
            max_pack_patches: patches that go through the tower at once, default 131072; more images make more packs.
            revision: a branch, tag or commit of the repository.
        Raises: FileNotFoundError, ValueError for a missing file, an unsupported config value, or tensors that don't fit;
            TypeError, RuntimeError for a dtype, device or backend that can't be.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating torch.dtype or None, got {dtype!r}")
        device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"device: expected one that this machine has, got {str(device)!r}; torch sees no CUDA device")
        directory = _local_folder(path_or_repo_id, revision)
        config = Config.from_pretrained(directory)
        with torch.device("meta"):
            model = cls(config, backend=backend, max_pack_patches=max_pack_patches)
        weights.load_parameters(model, directory, tied=config.tie_word_embeddings, device=device, dtype=dtype or config.dtype)
        model.source = directory
        return model.eval()

    @classmethod
    def from_transformers(cls, hf_model: nn.Module) -> Qwen2VL:
        """Wraps a transformers Qwen2VLForConditionalGeneration: the same Parameter objects, nothing copied."""
        head = getattr(hf_model, "lm_head", None)
        if head is None or not hasattr(hf_model, "config"):
            raise TypeError(f"hf_model: expected a Qwen2VLForConditionalGeneration, got {type(hf_model).__name__}")
        raw = hf_model.config.to_dict()
        generation_config = getattr(hf_model, "generation_config", None)
        config = Config.from_dict(raw, generation_config.to_dict() if generation_config is not None else None)
        tied = head.weight is hf_model.get_input_embeddings().weight
        if tied != config.tie_word_embeddings:
            raise ValueError(f"hf_model: tie_word_embeddings is {config.tie_word_embeddings}, but the weights say {tied}")
        with torch.device("meta"):
            model = cls(config)
        weights.share_parameters(model, hf_model.named_parameters(), tied=tied)
        return model.train(hf_model.training)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, E], the output projection: the embedding itself when they are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> Output:
        """Logits of a batch, and with labels the mean cross entropy of the next token.

        Args:
            input_ids: [B, S] integer; placeholders (config.image_token_id, video_token_id) stand where media go.
            attention_mask: [B, S], nonzero = a real token; any pattern of padding.
            pixel_values, pixel_values_videos: [T, 1176] patch rows; image_grid_thw, video_grid_thw: [N, 3] their grids.
            mm_token_type_ids: [B, S], what transformers' processor returns; checked against input_ids.
            position_ids: [3, B, S] (or [B, S]) in place of the computed ones.
            inputs_embeds: [B, S, E] in place of the token embeddings.
            labels: [B, S] int64, aligned with the input; -100 does not count. A token is scored by its predecessor among the
                real tokens, so padding changes nothing.
            logits_to_keep: logits of the last n positions only; 0 = all.
        Raises: TypeError, ValueError naming the argument, what was expected and what came.
        """
        batches.check_int("logits_to_keep", logits_to_keep)
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep: expected 0 (all) or a positive number, got {logits_to_keep}")
        packed = self._pack(
            input_ids, inputs_embeds, attention_mask, image_grid_thw, video_grid_thw, mm_token_type_ids, position_ids
        )
        if labels is not None:
            batches.check_labels(labels, packed.shape, self.config.text.vocab_size)
        with using(self.backend):
            hidden = self._hidden(packed, input_ids, inputs_embeds, pixel_values, pixel_values_videos)
            if labels is not None:
                loss = self._loss(hidden, batches.shifted_labels(labels, packed).to(hidden.device))
                return Output(loss, self._late_logits(hidden, packed, logits_to_keep))
            logits = self._padded_logits(hidden, packed, logits_to_keep)
            return Output(None, lambda: logits)

    def encode_images(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Visual tokens of images or videos, in order: [T, 1176] rows and their [N, 3] grids -> [T / 4, hidden_size].

        Frame pairs are packed up to max_pack_patches; the result does not depend on the packing.
        """
        for name, x in (("pixel_values", pixel_values), ("grid_thw", grid_thw)):
            batches.check_tensor(name, x, optional=False)
        (grid,) = batches.to_host(grid_thw)
        grid = check_grid(grid, self.config.vision.spatial_merge_size)
        batches.check_pixels("pixel_values", pixel_values, int(grid.prod(1).sum()), self.config)
        return self._encode(grid, [pixel_values])

    generate = generation.generate
    stream = generation.stream

    def chat(self, messages: list, *, max_new_tokens: int = 512, stream: bool = False, **sampling: Any) -> Any:
        """Answers a conversation, or a list of them; see `chat.chat`. Needs the tokenizer files beside the weights."""
        from . import chat

        if self._processor is None:
            if self.source is None:
                raise RuntimeError("chat needs tokenizer.json beside the weights; load the model with from_pretrained")
            self._processor = chat.Processor.from_pretrained(self.source)
        return chat.chat(self, self._processor, messages, max_new_tokens=max_new_tokens, stream=stream, **sampling)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes config.json, generation_config.json and safetensors in the released format, and copies the tokenizer and
        preprocessor files of the folder that the model came from. On an error the folder keeps what it held.
        """
        directory = Path(path)
        config, generation_config = self.config.to_dicts(self.dtype)
        with weights.replacing_checkpoint(directory) as part:
            for name, value in (("config.json", config), ("generation_config.json", generation_config)):
                (part / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
            weights.save_parameters(self, part)
            if self.source is not None and self.source.resolve() != directory.resolve():
                for name in _SHARED_FILES:
                    if (self.source / name).is_file():
                        shutil.copyfile(self.source / name, part / name)

    # The pieces that forward and generate share.

    def _pack(
        self, input_ids, inputs_embeds, attention_mask, image_grid_thw, video_grid_thw, mm_token_type_ids, position_ids,
        cache: KVCache | None = None,
    ) -> batches.Packed:  # fmt: skip
        return batches.pack(
            self.config,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            position_ids=position_ids,
            offsets=None if cache is None else list(zip(cache.lengths, cache.deltas, strict=True)),
        )

    def _hidden(self, packed, input_ids, inputs_embeds, pixel_values, pixel_values_videos, cache=None) -> torch.Tensor:
        """The decoder's output [T, E] for a packed batch; with a cache its keys and values are added to it."""
        batches.refuse_autocast(self.device.type)
        rows = packed.rows.to(self.device, non_blocking=True)
        if inputs_embeds is not None:
            x = inputs_embeds.to(self.device, self.dtype).flatten(0, 1)[rows]
        else:
            x = self.model.embed_tokens(input_ids.to(self.device).flatten()[rows])
        features = self._features(packed, pixel_values, pixel_values_videos)
        if features is not None:
            x = x.index_copy(0, packed.visual.to(self.device, non_blocking=True), features.to(x.dtype))
        return self.model(x, self._text_pack(packed.position_ids, packed.lengths, cache))

    def _text_pack(self, position_ids: torch.Tensor, lengths: tuple[int, ...], cache: KVCache | None) -> TextPack:
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        text = self.config.text
        inv_freq, scaling = text.rope_table()
        return TextPack(
            position_ids=position_ids.to(self.device, non_blocking=True),
            inv_freq=inv_freq.to(self.device, non_blocking=True),
            attention_scaling=scaling,
            schedule=attention_schedule(
                bounds, heads=text.num_attention_heads, heads_k=text.num_key_value_heads, device=self.device,
                head_dim=text.head_dim, causal=True,
            ),  # fmt: skip
            cache=cache,
            step=None if cache is None else cache.begin(list(lengths)),
        )

    def _features(self, packed: batches.Packed, pixel_values, pixel_values_videos) -> torch.Tensor | None:
        """Images and videos of the call through the tower together; None without media."""
        media = ("pixel_values", pixel_values), ("pixel_values_videos", pixel_values_videos)
        for (name, pixels), patches in zip(media, packed.patches, strict=True):
            batches.check_pixels(name, pixels, patches, self.config)
        pixels = [pixels for _, pixels in media if pixels is not None and pixels.shape[0]]
        return self._encode(packed.grid_thw, pixels) if pixels else None

    def _encode(self, grid_thw: torch.Tensor, pixels: list[torch.Tensor]) -> torch.Tensor:
        x = [rows.to(device=self.device, dtype=self.visual.patch_embed.proj.weight.dtype) for rows in pixels]
        x = x[0] if len(x) == 1 else torch.cat(x)
        batches.refuse_autocast(self.device.type)
        with using(self.backend):
            packs = [self.visual(x[rows], grid) for rows, grid in batches.capped_packs(grid_thw, self.max_pack_patches)]
        if not packs:
            return x.new_zeros(0, self.config.vision.hidden_size)
        return packs[0] if len(packs) == 1 else torch.cat(packs)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden, self.model.embed_tokens.weight) if self.lm_head is None else self.lm_head(hidden)

    def _loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.lm_head is None or plain(self.lm_head, Linear):
            return ops.linear_cross_entropy(hidden, self.head_weight, targets)
        logits = self._logits(hidden)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)

    def _late_logits(self, hidden: torch.Tensor, packed: batches.Packed, keep: int) -> Callable[[], torch.Tensor]:
        """The logits of this forward, for when they are asked for: not those of weights that have changed since."""
        version = self.head_weight._version

        def logits() -> torch.Tensor:
            if self.head_weight._version != version:
                raise RuntimeError(
                    "logits: the head's weight has changed since this forward; read them before the optimizer step"
                )
            with using(self.backend):
                return self._padded_logits(hidden, packed, keep)

        return logits

    def _padded_logits(self, hidden: torch.Tensor, packed: batches.Packed, keep: int) -> torch.Tensor:
        batch, length = packed.shape
        keep = min(keep, length) or length
        column = packed.rows % length
        wanted = (column >= length - keep).nonzero().squeeze(1)
        logits = self._logits(hidden if wanted.numel() == hidden.shape[0] else hidden[wanted.to(hidden.device)])
        if wanted.numel() == batch * keep:
            return logits.view(batch, keep, -1)
        target = (packed.rows // length * keep + column - (length - keep))[wanted].to(hidden.device)
        return logits.new_zeros(batch * keep, logits.shape[1]).index_copy(0, target, logits).view(batch, keep, -1)


def _local_folder(path_or_repo_id: str | Path, revision: str | None) -> Path:
    path = Path(path_or_repo_id).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_repo_id)
    if isinstance(path_or_repo_id, Path) or path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{path_or_repo_id}: expected a checkpoint folder or a repository id 'owner/name'")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))
