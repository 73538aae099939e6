"""Bad configurations and checkpoints, added to the table of tests/bad_inputs.py.

The whole table runs without pytest, so under `python -O` too: python -O -m tests.bad_checkpoints
"""

from __future__ import annotations

import copy
import json
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qwen2vl_fast import Qwen2VL
from qwen2vl_fast.config import Config
from tests import models
from tests.bad_inputs import CASES, case, failures, ours
from tests.models import released_config

# Configuration.


def config_with(vision: dict[str, Any] | None = None, drop: str | None = None, **changes: Any) -> Callable[[Path], Any]:
    def call(folder: Path) -> Config:
        raw = released_config(vision=vision, **changes)
        if drop is not None:
            del raw[drop]
        return Config.from_dict(raw)

    return call


def files(**contents: str) -> Callable[[Path], Any]:
    def call(folder: Path) -> Qwen2VL:
        for name, content in contents.items():
            (folder / f"{name}.json").write_text(content)
        return Qwen2VL.from_pretrained(folder, device="cpu")

    return call


def rope(**changes: Any) -> dict[str, Any]:
    return {"type": "mrope", "mrope_section": [16, 24, 24], **changes}


case("config: missing", FileNotFoundError, "config.json")(files())
case("config: broken JSON", ValueError, "config.json", "JSON")(files(config='{"model_type": "qwen2_vl"'))
case("config: a list", ValueError, "config.json", "object", "list")(files(config="[]"))
case("config: not text", ValueError, "config.json", "JSON")(
    lambda folder: ((folder / "config.json").write_bytes(b"\xff\xfe\x00{"), Qwen2VL.from_pretrained(folder))
)
case("config: generation_config", ValueError, "generation_config.json", "JSON")(
    files(config=json.dumps(released_config()), generation_config="{")
)
case("config: another model", ValueError, "model_type", "qwen2_vl", "llama")(config_with(model_type="llama"))
case("config: model_type missing", ValueError, "model_type", "qwen2_vl")(config_with(drop="model_type"))
for _key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
    case(f"config: {_key} missing", ValueError, _key, "positive integer", "None")(config_with(drop=_key))
    case(f"config: {_key} zero", ValueError, _key, "positive integer", "0")(config_with(**{_key: 0}))
case("config: a size in quotes", ValueError, "hidden_size", "'256'")(config_with(hidden_size="256"))
case("config: dtype", ValueError, "dtype", "int8", "bfloat16")(config_with(torch_dtype="int8"))
case("config: activation", ValueError, "hidden_act", "gelu", "silu")(config_with(hidden_act="gelu"))
case("config: activation of the tower", ValueError, "vision_config.hidden_act", "silu", "quick_gelu")(
    config_with({"hidden_act": "silu"})
)
case("config: merge size", ValueError, "spatial_merge_size", "3", "2")(config_with({"spatial_merge_size": 3}))
case("config: tower's width", ValueError, "vision_config.hidden_size", "128", "256")(config_with({"hidden_size": 128}))
case("config: tower's heads", ValueError, "embed_dim", "num_heads", "multiple of 4")(config_with({"num_heads": 80}))
case("config: tower's ratio", ValueError, "vision_config.mlp_ratio", "-1")(config_with({"mlp_ratio": -1}))
case("config: tower's ratio, a text", ValueError, "vision_config.mlp_ratio", "'4'")(config_with({"mlp_ratio": "4"}))
case("config: tower's rotary", ValueError, "rope_type", "yarn")(config_with({"rope_parameters": {"rope_type": "yarn"}}))
case("config: sliding window", ValueError, "use_sliding_window", "max_window_layers")(
    config_with(use_sliding_window=True, max_window_layers=1)
)
case("config: layer types", ValueError, "layer_types", "full_attention")(config_with(layer_types=["sliding_attention"] * 2))
case("config: rotary scaling", ValueError, "rope_type", "llama3", "yarn")(config_with(rope_scaling=rope(type="llama3")))
case("config: YaRN without factor", ValueError, "factor", "yarn")(config_with(rope_scaling=rope(type="yarn")))
case("config: YaRN, factor under one", ValueError, "factor", "0.5")(config_with(rope_scaling=rope(type="yarn", factor=0.5)))
case("config: sections' sum", ValueError, "mrope_section", "[16, 24, 25]", "64")(
    config_with(rope_scaling=rope(mrope_section=[16, 24, 25]))
)
case("config: two sections", ValueError, "mrope_section", "three", "[32, 32]")(
    config_with(rope_scaling=rope(mrope_section=[32, 32]))
)
case("config: a negative section", ValueError, "mrope_section", "[-1, 33, 32]")(
    config_with(rope_scaling=rope(mrope_section=[-1, 33, 32]))
)
case("config: theta", ValueError, "rope_theta", "-1")(config_with(rope_theta=-1.0))
case("config: eps", ValueError, "rms_norm_eps", "'small'")(config_with(rms_norm_eps="small"))
case("config: heads don't divide", ValueError, "num_attention_heads", "num_key_value_heads")(
    config_with(hidden_size=384, num_attention_heads=3, num_key_value_heads=2, vision={"hidden_size": 384})
)
case("config: head_dim", ValueError, "head_dim", "64", "128")(config_with(head_dim=64))
case("config: quantized", ValueError, "quantization_config", "awq")(config_with(quantization_config={"quant_method": "awq"}))
case("config: a token id", ValueError, "image_token_id", "'<|image_pad|>'")(config_with(image_token_id="<|image_pad|>"))
case("config: end tokens", ValueError, "eos_token_id", "'<|im_end|>'")(config_with(eos_token_id="<|im_end|>"))
for _key in ("text_config", "vision_config", "rope_scaling", "rope_parameters"):
    case(f"config: {_key} is a number", ValueError, _key, "5", "object")(config_with(**{_key: 5}))
case("config: tower's rotary, a number", ValueError, "vision_config.rope_parameters", "5", "object")(
    config_with({"rope_parameters": 5})
)
for _key, _value in (
    ("layer_types", 5),
    ("torch_dtype", ["x"]),
    ("initializer_range", "x"),
    ("initializer_range", -1),
    ("hidden_size", [[1], 2]),
    ("rope_theta", 10**400),
    ("tie_word_embeddings", "false"),
    ("use_sliding_window", "false"),
    ("attention_dropout", 0.5),
    ("attention_bias", False),
    ("partial_rotary_factor", 0.5),
):
    case(f"config: {_key} {_value!r:.20}", ValueError, _key.removeprefix("torch_"), repr(_value))(config_with(**{_key: _value}))
case("config: sliding window from no layer", ValueError, "use_sliding_window", "max_window_layers", "None")(
    config_with(use_sliding_window=True, max_window_layers=None)
)
case("config: sections, a number", ValueError, "mrope_section", "5", "three")(config_with(rope_scaling=rope(mrope_section=5)))
case("config: part of the head turned", ValueError, "partial_rotary_factor", "0.5")(
    config_with(rope_scaling=rope(partial_rotary_factor=0.5))
)
for _key, _value in (
    ("attention_factor", "x"),
    ("beta_fast", "x"),
    ("beta_slow", 0),
    ("mscale", "a"),
    ("mscale_all_dim", -1.0),
    ("original_max_position_embeddings", -4),
    ("truncate", "no"),
):
    case(f"config: YaRN, {_key} {_value!r}", ValueError, f"rope_scaling.{_key}", repr(_value))(
        config_with(rope_scaling=rope(type="yarn", factor=4.0, **{_key: _value}))
    )
case("config: YaRN, theta 1", ValueError, "rope_theta", "1.0", "over 1")(
    config_with(rope_scaling=rope(type="yarn", factor=4.0), rope_theta=1.0)
)
case("config: YaRN, bounds out of reach", ValueError, "rope_scaling", "no table")(
    config_with(rope_scaling=rope(type="yarn", factor=4.0, beta_fast=1e308))
)
for _key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_token_id"):
    case(f"config: {_key} over the vocabulary", ValueError, _key, "1000000000", "vocab_size", "272")(
        config_with(**{_key: 10**9})
    )
for _key, _value in (
    ("temperature", -1.0),
    ("temperature", 0.0),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_k", True),
    ("top_k", ""),
    ("repetition_penalty", 0),
    ("do_sample", "false"),
):
    case(f"config: {_key} {_value!r}", ValueError, "generation_config.json", _key, repr(_value))(
        lambda folder, key=_key, value=_value: Config.from_dict(released_config(), {"do_sample": True, key: value})
    )


# Checkpoints.


def checkpoint(change: Callable[[dict[str, torch.Tensor], Path], Any], **options: Any) -> Callable[[Path], Any]:
    """A good checkpoint whose tensors, or folder, `change` spoils."""

    def call(folder: Path) -> Qwen2VL:
        models.write_checkpoint(folder, models.pair()[0], models.CONFIGS["released"])
        file = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        if change(tensors, folder) is not False:
            save_file(tensors, file)
        return Qwen2VL.from_pretrained(folder, **{"device": "cpu", **options})

    return call


def spoil_file(spoil: Callable[[Path], Any]) -> Callable[[dict[str, torch.Tensor], Path], Any]:
    return lambda tensors, folder: (spoil(folder / "model.safetensors"), False)[1]


def index_of(weight_map: Any) -> Callable[[dict[str, torch.Tensor], Path], Any]:
    def write(tensors: dict[str, torch.Tensor], folder: Path) -> None:
        text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)

    return write


def only_pickle(file: Path) -> None:
    file.unlink()
    (file.parent / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")


NORM, QKV = "model.norm.weight", "visual.blocks.0.attn.qkv.weight"
INDEX = "model.safetensors.index.json"
case("weights: none", FileNotFoundError, "model.safetensors")(checkpoint(spoil_file(Path.unlink)))
case("weights: a pickle", ValueError, "pytorch_model.bin", "safetensors")(checkpoint(spoil_file(only_pickle)))
case("weights: a tensor is missing", ValueError, f"missing {NORM}")(checkpoint(lambda tensors, _: tensors.pop(NORM)))
case("weights: many are missing", ValueError, "missing", "and 49 more")(checkpoint(lambda tensors, _: tensors.clear()))
case("weights: one too many", ValueError, "surplus model.layers.7.mlp.bias")(
    checkpoint(lambda tensors, _: tensors.update({"model.layers.7.mlp.bias": torch.zeros(4)}))
)
case("weights: twice the same", ValueError, "surplus")(
    checkpoint(lambda tensors, _: tensors.update({"model.language_model.norm.weight": tensors[NORM].clone()}))
)
case("weights: a shape", ValueError, QKV, "[160, 480]", "[480, 160]")(
    checkpoint(lambda tensors, _: tensors.update({QKV: tensors[QKV].t().contiguous()}))
)
case("weights: integers", ValueError, NORM, "int8", "floating")(
    checkpoint(lambda tensors, _: tensors.update({NORM: torch.ones(256, dtype=torch.int8)}))
)
case("weights: truncated", ValueError, "model.safetensors", "not a readable")(
    checkpoint(spoil_file(lambda file: file.write_bytes(file.read_bytes()[:-100])))
)
case("weights: truncated in the header", ValueError, "model.safetensors", "not a readable")(
    checkpoint(spoil_file(lambda file: file.write_bytes(file.read_bytes()[:50])))
)
case("weights: an empty file", ValueError, "model.safetensors", "not a readable")(
    checkpoint(spoil_file(lambda file: file.write_bytes(b"")))
)
case("weights: a pickle by another name", ValueError, "model.safetensors", "not a readable")(
    checkpoint(spoil_file(lambda file: file.write_bytes(b"\x80\x04cposix\nsystem\n." * 20)))
)
case("weights: an absurd header", ValueError, "model.safetensors", "not a readable")(
    checkpoint(spoil_file(lambda file: file.write_bytes(struct.pack("<Q", 2**62) + b"{}")))
)
case("weights: tensors over each other", ValueError, "model.safetensors", "not a readable")(
    checkpoint(
        spoil_file(
            lambda file: file.write_bytes(
                struct.pack("<Q", 92) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
                b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(92)[:92] + bytes(8)
            )
        )
    )
)
case("index: broken JSON", ValueError, INDEX, "weight_map")(checkpoint(index_of("{")))
case("index: no weight_map", ValueError, INDEX, "weight_map")(checkpoint(index_of('{"metadata": {}}')))
case("index: a list", ValueError, INDEX, "weight_map")(checkpoint(index_of("[]")))
case("index: numbers", ValueError, INDEX, "weight_map")(checkpoint(index_of({NORM: 1, QKV: "x.safetensors"})))
case("index: lists", ValueError, INDEX, "weight_map")(checkpoint(index_of({NORM: ["x.safetensors"]})))
for _target in ("../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "pytorch_model.bin", "a\\..\\b.safetensors"):
    case(f"index: points to {_target!r}", (ValueError, FileNotFoundError), INDEX, _target)(
        checkpoint(index_of({NORM: _target}))
    )
case("index: a shard that isn't there", FileNotFoundError, INDEX, "model-00002-of-00002.safetensors")(
    checkpoint(index_of({NORM: "model.safetensors", QKV: "model-00002-of-00002.safetensors"}))
)
case("from_pretrained: no such folder", FileNotFoundError, "nowhere", "repository id")(
    lambda folder: Qwen2VL.from_pretrained(folder / "nowhere")
)
case("from_pretrained: a file", FileNotFoundError, "folder")(
    lambda folder: ((folder / "x").write_text(""), Qwen2VL.from_pretrained(str(folder / "x")))
)
case("from_pretrained: dtype", TypeError, "dtype", "floating", "int8")(checkpoint(lambda *_: None, dtype=torch.int8))
case("from_pretrained: dtype, a text", TypeError, "dtype", "'bf16'")(checkpoint(lambda *_: None, dtype="bf16"))
case("from_pretrained: backend", ValueError, "backend", "'fast'", "triton")(checkpoint(lambda *_: None, backend="fast"))
case("from_pretrained: max_pack_patches", ValueError, "max_pack_patches", "at least 4", "3")(
    checkpoint(lambda *_: None, max_pack_patches=3)
)
case("from_transformers: a layer", TypeError, "hf_model", "Qwen2VLForConditionalGeneration", "Linear")(
    lambda folder: Qwen2VL.from_transformers(nn.Linear(2, 2))
)
case("from_transformers: without its head", TypeError, "hf_model", "Qwen2VLForConditionalGeneration", "Qwen2VLModel")(
    lambda folder: Qwen2VL.from_transformers(models.pair()[0].model)
)


def from_changed(change: Callable[[nn.Module], Any]) -> Callable[[Path], Any]:
    def call(folder: Path) -> Qwen2VL:
        hf = copy.deepcopy(models.pair()[0])
        change(hf)
        return Qwen2VL.from_transformers(hf)

    return call


case("from_transformers: untied by hand", ValueError, "hf_model", "tie_word_embeddings")(
    from_changed(lambda hf: setattr(hf.lm_head, "weight", nn.Parameter(hf.lm_head.weight.detach().clone())))
)
case("from_transformers: resized by hand", ValueError, "merger.mlp.2.bias", "[5]")(
    from_changed(lambda hf: setattr(hf.model.visual.merger.mlp[2], "bias", nn.Parameter(torch.zeros(5))))
)
case("save_pretrained: a file", FileExistsError, "x")(
    lambda folder: ((folder / "x").write_text(""), ours().save_pretrained(folder / "x"))
)
case("chat without a tokenizer", RuntimeError, "tokenizer.json", "from_pretrained")(
    lambda folder: ours().chat([{"role": "user", "content": "hello"}])
)

if not torch.cuda.is_available():
    case("from_pretrained: no such device", (RuntimeError, ValueError), "device", "cuda")(
        checkpoint(lambda *_: None, device="cuda")
    )
    case("from_pretrained: a backend that can't run", RuntimeError, "backend 'cuda'")(
        checkpoint(lambda *_: None, backend="cuda")
    )


def main() -> int:
    problems = []
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            problems += failures(name, Path(folder))
    print("\n".join(problems) or len(CASES))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
