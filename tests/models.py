"""Small random Qwen2-VL models and batches for them: transformers' model and ours over the same weights."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.qwen2_vl import modeling_qwen2_vl as peer

from qwen2vl_fast import Qwen2VL
from qwen2vl_fast.cache import KVCache
from tests.preprocessing import ImageJudge

OLD_TRANSFORMERS = int(transformers.__version__.split(".")[0]) < 5

# Ids as in the embedded checkpoint: 256 bytes, then the special tokens in the released order.
PAD, EOS, START, END, IMAGE, VIDEO = 256, 258, 265, 266, 268, 269
VOCAB = 272

# What a sequence is made of: ("text", n), ("image", h, w), ("video", t, h, w), sides in patches.
Part = tuple


def released_config(*, vision: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """config.json in the released (flat) layout: head dims 80 and 128 as the real models have. `changes` replace its keys."""
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": PAD,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "hidden_act": "silu",
        "hidden_size": 256,
        "image_token_id": IMAGE,
        "initializer_range": 0.02,
        "intermediate_size": 320,
        "max_position_embeddings": 1024,
        "max_window_layers": 2,
        "model_type": "qwen2_vl",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "rope_theta": 1e6,
        "sliding_window": 1024,
        "tie_word_embeddings": True,
        "torch_dtype": "float64",
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": VIDEO,
        "vision_config": {
            "depth": 2,
            "embed_dim": 160,
            "hidden_size": 256,
            "in_chans": 3,
            "mlp_ratio": 4,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            **(vision or {}),
        },
        "vision_end_token_id": END,
        "vision_start_token_id": START,
        "vision_token_id": 267,
        "vocab_size": VOCAB,
    }
    return {**config, **changes}


# The configurations that parity is shown for, by what each adds to the first.
CONFIGS = {
    "released": released_config(),
    "untied": released_config(tie_word_embeddings=False),
    "other widths": released_config(
        vision={"depth": 3, "embed_dim": 96, "num_heads": 3, "mlp_ratio": 2, "hidden_size": 192},
        hidden_size=192,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=200,
        num_hidden_layers=3,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling={"type": "mrope", "mrope_section": [2, 5, 9]},
        tie_word_embeddings=False,
    ),
    "yarn": released_config(
        rope_scaling={
            "type": "yarn",
            "rope_type": "yarn",
            "mrope_section": [16, 24, 24],
            "factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    ),
}


def transformers_model(config: dict[str, Any], dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A random Qwen2VLForConditionalGeneration whose every parameter matters: no zero bias, no unit norm, and queries and keys
    long enough for attention to be far from uniform, so that positions matter.
    """
    torch.manual_seed(seed)
    hf = transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(**copy.deepcopy(config)))
    for name, parameter in hf.named_parameters():
        noise = torch.randn(parameter.shape, dtype=torch.float64)
        parameter.data = parameter.data.double() + (0.1 if parameter.dim() == 1 else 0.04) * noise
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.data *= 1.5
        elif name.endswith("qkv.weight"):
            parameter.data[: parameter.shape[0] // 3 * 2] *= 1.5
    tables = {module: module.inv_freq for module in hf.modules() if hasattr(module, "inv_freq")}
    hf = hf.to(dtype).eval()
    setattr(hf.config, "torch_dtype" if OLD_TRANSFORMERS else "dtype", dtype)
    for module, table in tables.items():  # .to() casts the frequencies too, loading a checkpoint does not
        module.inv_freq = table
    hf.generation_config.eos_token_id, hf.generation_config.pad_token_id = config["eos_token_id"], config["pad_token_id"]
    return hf


@functools.cache
def pair(name: str = "released") -> tuple[nn.Module, Qwen2VL]:
    """transformers' model and ours over the same float64 parameters. Shared by all tests: not to be changed."""
    hf = transformers_model(CONFIGS[name])
    return hf, Qwen2VL.from_transformers(hf)


def lift_casts(monkeypatch: Any, hf: nn.Module) -> None:
    """Lifts the float32 casts that MODEL.md section 4 names: RMSNorm, the rotation of the tower, the loss.

    cos and sin stay float32 on both sides by definition; for a float64 model transformers widens them, which is exact.
    """

    def rms_norm(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    def vision_rotation(q, k, cos, sin):
        cos, sin = (x.float().to(q.dtype).unsqueeze(-2) for x in (cos, sin))
        return tuple(x * cos + peer.rotate_half(x) * sin for x in (q, k))

    def loss(logits, labels, vocab_size, **_):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    monkeypatch.setattr(type(hf.model.language_model.norm), "forward", rms_norm)
    monkeypatch.setattr(peer, "apply_rotary_pos_emb_vision", vision_rotation)
    monkeypatch.setattr(hf, "loss_function", loss)


def peer_inputs(hf: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` without what this release of transformers has no argument for."""
    accepted = inspect.signature(hf.forward).parameters
    return {name: value for name, value in inputs.items() if name in accepted}


def write_checkpoint(folder: Path, hf: nn.Module, config: dict[str, Any], *, layout: str = "4.x", shards: int = 1) -> Path:
    """Writes config.json and safetensors by hand.

    layout "4.x": visual.*, model.*, as released; "5.x": model.visual.*, model.language_model.*.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, parameter in hf.named_parameters():
        if layout == "4.x":
            name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        tensors[name] = parameter.detach().contiguous()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[index::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
    )
    return folder


def batch(rows: Sequence[Sequence[Part]], *, padding: str = "left", seed: int = 0, dtype=torch.float64) -> dict[str, Tensor]:
    """Token ids and patch rows of B sequences, as a processor would return them.

    padding: "left", "right", or "any": zeros of the mask anywhere. The mask is left out when nothing is padded. Padded ids are
    PAD, in "any" random text ids.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, count: int) -> list[int]:
        return torch.randint(0, high, (count,), generator=generator).tolist()

    sequences, grids = [], {"image": [], "video": []}
    for parts in rows:
        ids: list[int] = []
        for kind, *size in parts:
            if kind == "text":
                ids += integers(256, size[0])
                continue
            grid = [1, *size] if kind == "image" else list(size)
            grids[kind].append(grid)
            count = grid[0] * grid[1] * grid[2] // 4
            ids += [START, *([IMAGE if kind == "image" else VIDEO] * count), END]
        sequences.append(ids)
    length = max(map(len, sequences)) + (3 if padding == "any" else 0)
    input_ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, ids in enumerate(sequences):
        if padding == "any":
            where = torch.randperm(length, generator=generator)[: len(ids)].sort().values
            input_ids[row] = torch.tensor(integers(256, length))
        elif padding == "left":
            where = torch.arange(length - len(ids), length)
        else:
            where = torch.arange(len(ids))
        input_ids[row, where] = torch.tensor(ids)
        mask[row, where] = 1
    inputs = {"input_ids": input_ids}
    if not bool(mask.all()):
        inputs["attention_mask"] = mask
    kinds = (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int()
    inputs["mm_token_type_ids"] = kinds * mask.int()
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[kind]:
            grid = torch.tensor(grids[kind])
            inputs[pixels] = torch.randn(int(grid.prod(1).sum()), 1176, generator=generator, dtype=torch.float64).to(dtype)
            inputs[f"{kind}_grid_thw"] = grid
    return inputs


def real_tokens(inputs: dict[str, Tensor]) -> Tensor:
    """[B, S] bool."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def labels_of(inputs: dict[str, Tensor]) -> Tensor:
    """[B, S]: every real text token but each row's first, which transformers would score from a padded position."""
    real = real_tokens(inputs)
    counted = real & (inputs["mm_token_type_ids"] == 0) & (real.long().cumsum(1) > 1)
    return inputs["input_ids"].masked_fill(~counted, -100)


def alone(inputs: dict[str, Tensor], rows: Sequence[Sequence[Part]], row: int) -> dict[str, Tensor]:
    """One sequence of a batch without padding, with its own media."""
    real = real_tokens(inputs)[row]
    one = {"input_ids": inputs["input_ids"][row][real][None], "mm_token_type_ids": inputs["mm_token_type_ids"][row][real][None]}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        counts = [sum(part[0] == kind for part in parts) for parts in rows]
        if counts[row]:
            first = sum(counts[:row])
            grid = inputs[f"{kind}_grid_thw"]
            patches = grid.prod(1)
            start, own = int(patches[:first].sum()), slice(first, first + counts[row])
            one[f"{kind}_grid_thw"] = grid[own]
            one[pixels] = inputs[pixels][start : start + int(patches[own].sum())]
    return one


GREEDY = {"do_sample": False, "eos_token_id": [], "suppress_vision_tokens": False}


def answers(model: Qwen2VL, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """What generate adds to the prompts: [B, new]."""
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def empty_cache(model: Qwen2VL, batch: int, slots: int) -> KVCache:
    return KVCache(model.config.text, batch, slots, dtype=model.dtype, device=model.device)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def processor():
    """transformers' processor over the embedded tokenizer; without videos, which need torchvision."""

    class ImageProcessor(transformers.Qwen2VLProcessor):
        attributes = ["image_processor", "tokenizer"]

        def check_argument_for_proper_class(self, *_):
            """transformers 5 looks up the video processor's class here, and with it torchvision."""

    nano = Path(__file__).parents[1] / "qwen2vl_fast" / "assets" / "nano"
    tokenizer = transformers.Qwen2TokenizerFast(tokenizer_file=str(nano / "tokenizer.json"), pad_token="<|endoftext|>")
    return ImageProcessor(ImageJudge(), tokenizer)
