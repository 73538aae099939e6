"""config.json in both layouts, the released values, rotary tables, and what is written back."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwen2vl_fast.config import Config
from tests import models
from tests.models import released_config


def peer_config(raw: dict) -> transformers.Qwen2VLConfig:
    return transformers.Qwen2VLConfig(**copy.deepcopy(raw))


# MODEL.md section 3, in the words of the released files.
RELEASED = {
    "2B": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "72B": {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 29568,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}


def released(size: str) -> dict:
    """config.json as it was published; the vision config is left short, as there: the rest are its defaults."""
    values = RELEASED[size]
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "max_window_layers": values["num_hidden_layers"],
        "model_type": "qwen2_vl",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "hidden_size": values["hidden_size"],
            "in_chans": 3,
            "model_type": "qwen2_vl",
            "spatial_patch_size": 14,
            **({"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16} if size == "2B" else {}),
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        **values,
    }


@pytest.mark.parametrize("size", RELEASED)
def test_released_values(size):
    raw = released(size)
    config = Config.from_dict(raw, {"eos_token_id": [151645, 151643], "pad_token_id": 151643, "do_sample": True, "top_k": 1})
    text, vision = config.text, config.vision
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
        assert getattr(text, name) == raw[name]
    assert (text.vocab_size, config.tie_word_embeddings, text.head_dim) == (raw["vocab_size"], raw["tie_word_embeddings"], 128)
    assert (text.rms_norm_eps, text.rope_theta, text.mrope_section) == (1e-6, 1e6, (16, 24, 24))
    assert (vision.depth, vision.embed_dim, vision.num_heads, vision.head_dim, vision.mlp_dim) == (32, 1280, 16, 80, 5120)
    assert (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size, vision.patch_dim) == (14, 2, 2, 1176)
    assert vision.hidden_size == text.hidden_size and vision.rope_theta == 1e4
    assert config.vision_token_ids == (151652, 151653, 151654, 151655, 151656)
    assert config.dtype == torch.bfloat16
    assert config.generation.eos_token_id == (151645, 151643) and config.generation.pad_token_id == 151643
    assert config.generation.do_sample and config.generation.top_k == 1
    peer = peer_config(raw)
    assert peer.vision_config.depth == vision.depth and peer.vision_config.embed_dim == vision.embed_dim


def fields(config: Config) -> tuple:
    """What a config means, without how it was spelt."""
    text = config.text
    table, scaling = text.rope_table()
    sizes = {name: value for name, value in vars(text).items() if name != "rope"}
    return config.vision, sizes, table.tolist(), scaling, config.tie_word_embeddings, config.vision_token_ids, config.generation


@pytest.mark.parametrize("name", models.CONFIGS)
def test_the_layout_of_transformers_reads_the_same(tmp_path, name):
    """Flat as released, and what the installed transformers writes (5.x: text_config, rope_parameters)."""
    raw = models.CONFIGS[name]
    peer_config(raw).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "text_config" in written
    assert fields(Config.from_pretrained(tmp_path)) == fields(Config.from_dict(raw))


def test_nested_layout_by_hand():
    """As transformers 5 writes it, whichever release is installed."""
    flat = models.CONFIGS["yarn"]
    outer = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
    nested = {name: flat[name] for name in (*outer, "model_type", "vision_config", "tie_word_embeddings")}
    text = {name: value for name, value in flat.items() if name not in nested and "rope" not in name and name != "torch_dtype"}
    rope = {**flat["rope_scaling"], "rope_theta": flat["rope_theta"]}
    nested["text_config"] = {**text, "model_type": "qwen2_vl_text", "rope_parameters": rope, "dtype": "float64"}
    nested["vision_config"] = {**flat["vision_config"], "rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}
    nested["dtype"] = "float64"
    config = Config.from_dict(nested)
    assert fields(config) == fields(Config.from_dict(flat))
    assert config.dtype == torch.float64


@pytest.mark.parametrize("name", models.CONFIGS)
@pytest.mark.parametrize("nested", [False, True])
def test_written_configs_are_the_same_model(tmp_path, name, nested):
    """What save_pretrained writes is read back as the same model, here and by transformers."""
    raw = models.CONFIGS[name]
    if nested:
        peer_config(raw).save_pretrained(tmp_path)
        raw = json.loads((tmp_path / "config.json").read_text())
    config = Config.from_dict(raw, {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9, "eos_token_id": [5, 6]})
    written, generation = (json.loads(json.dumps(part)) for part in config.to_dicts(torch.float16))
    again = Config.from_dict(written, generation)
    assert fields(again) == fields(config) and again.dtype == torch.float16
    assert written["bos_token_id"] == generation["bos_token_id"] == models.PAD
    theirs, before = (peer.get_text_config() for peer in (peer_config(written), peer_config(models.CONFIGS[name])))
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "vocab_size", "max_position_embeddings"):
        assert getattr(theirs, key) == getattr(before, key)
    if not models.OLD_TRANSFORMERS:
        spelling = ("type", "rope_type")
        left, right = ({k: v for k, v in c.rope_parameters.items() if k != "type"} for c in (theirs, before))
        assert left == right and spelling[1] in left
    assert transformers.GenerationConfig.from_dict(generation).top_k == 0


def test_other_rotary_base_of_the_tower_is_kept():
    raw = released_config(vision={"rope_parameters": {"rope_type": "axial", "rope_theta": 500.0}})
    config = Config.from_dict(raw)
    assert config.vision.rope_theta == 500.0
    assert Config.from_dict(config.to_dicts(torch.float32)[0]).vision.rope_theta == 500.0


def test_greedy_checkpoints_name_no_sampling_values():
    """transformers warns of sampling values beside do_sample=False, and takes top_k for 50 where it is missing."""
    greedy = Config.from_dict(released_config(), {}).to_dicts(torch.float32)[1]
    assert not {"temperature", "top_k", "top_p"} & set(greedy) and greedy["do_sample"] is False
    sampled = Config.from_dict(released_config(), {"do_sample": True}).to_dicts(torch.float32)[1]
    assert sampled["top_k"] == 0


# Rotary tables.

YARN = {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}


YARNS = [
    YARN,
    {**YARN, "factor": 2.5, "beta_fast": 16, "beta_slow": 2},
    {**YARN, "factor": 1.0},
    {**YARN, "attention_factor": 1.3},
    {**YARN, "original_max_position_embeddings": 128, "factor": 32.0},
    # transformers 4.52 rounds the bounds of the ramp always
    *([] if models.OLD_TRANSFORMERS else [{**YARN, "truncate": False}, {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}]),
]


@pytest.mark.parametrize("rope", YARNS, ids=str)
@pytest.mark.parametrize("theta", [1e6, 1e4])
def test_yarn_table(rope, theta):
    """The same float32 numbers as transformers: one bit apart is 2e-3 rad at position 30000."""
    rope = {**rope, "mrope_section": [16, 24, 24]}
    longest = int(rope["factor"] * rope["original_max_position_embeddings"])  # 4.52 takes their ratio for the factor
    raw = released_config(rope_scaling=rope, rope_theta=theta, max_position_embeddings=longest)
    text = peer_config(raw).get_text_config()
    expected, expected_scaling = ROPE_INIT_FUNCTIONS["yarn"](text, torch.device("cpu"))
    table, scaling = Config.from_dict(raw).text.rope_table()
    assert table.dtype == torch.float32 and scaling == expected_scaling
    assert (table - expected).abs().max() == 0


@pytest.mark.parametrize("theta", [1e6, 1e4, 123456.0])
def test_plain_table(theta):
    table, scaling = Config.from_dict(released_config(rope_theta=theta)).text.rope_table()
    assert scaling == 1.0 and table.dtype == torch.float32
    assert torch.equal(table, 1.0 / theta ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128))


# Where defaults come from.


def write(folder: Path, **files: dict) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_generation_config_comes_first(tmp_path):
    generation = {"eos_token_id": [7, 8], "pad_token_id": 9, "temperature": 0.1, "top_p": 0.001, "repetition_penalty": 1.05}
    both = Config.from_pretrained(write(tmp_path, config=released_config(), generation_config=generation)).generation
    assert (both.eos_token_id, both.pad_token_id) == ((7, 8), 9)
    assert (both.temperature, both.top_p, both.repetition_penalty, both.top_k) == (0.1, 0.001, 1.05, 0)
    (tmp_path / "generation_config.json").unlink()
    alone = Config.from_pretrained(tmp_path).generation
    assert (alone.eos_token_id, alone.pad_token_id, alone.do_sample) == ((models.EOS,), models.PAD, False)


def test_no_end_token():
    raw = released_config()
    del raw["eos_token_id"], raw["pad_token_id"]
    assert Config.from_dict(raw).generation.eos_token_id == ()


def test_temperature_zero_is_how_some_files_spell_greedy():
    raw = released_config()
    config = Config.from_dict(raw, {"do_sample": False, "temperature": 0})
    assert (config.generation.do_sample, config.generation.temperature) == (False, 1.0)
    with pytest.raises(ValueError, match="temperature is 0"):
        Config.from_dict(raw, {"do_sample": True, "temperature": 0})
