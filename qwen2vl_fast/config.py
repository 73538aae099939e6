"""config.json and generation_config.json of a Qwen2-VL checkpoint as plain dataclasses.

Both layouts in circulation are read: the released flat one (text fields at the top level) and the nested one that
transformers 5 writes (`text_config`, `rope_parameters`). A value that this package does not implement is an error that
names it; nothing is ignored that would change the output.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class VisionConfig:
    """Vision tower (MODEL.md section 2). `hidden_size` is the width it hands to the decoder."""

    depth: int
    embed_dim: int
    num_heads: int
    hidden_size: int
    mlp_ratio: float = 4
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    rope_theta: float = 1e4

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def patch_dim(self) -> int:
        """Length of one row of pixel_values: channels x frames x height x width of a patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class TextConfig:
    """Decoder (MODEL.md section 3). `rope` holds the scaling parameters as the checkpoint spells them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, ...] = (16, 24, 24)
    max_position_embeddings: int = 32768
    rope: dict[str, Any] = field(default_factory=dict)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def rope_table(self) -> tuple[torch.Tensor, float]:
        """(inv_freq [D/2] float32, attention_scaling): the plain table, or YaRN's blend of it (arXiv:2309.00071)."""
        dim, base = self.head_dim, self.rope_theta
        wavelengths = base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        inv_freq = 1.0 / wavelengths
        if self.rope.get("rope_type", "default") != "yarn":
            return inv_freq, 1.0
        factor = float(self.rope["factor"])
        trained = self.rope.get("original_max_position_embeddings") or self.max_position_embeddings

        def pair_of(turns: float) -> float:
            """The (fractional) pair index whose frequency makes `turns` turns over the trained length."""
            return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair_of(self.rope.get("beta_fast") or 32), pair_of(self.rope.get("beta_slow") or 1)
        if self.rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
        keep = 1 - ramp.clamp(0, 1)
        blended = 1.0 / (factor * wavelengths) * (1 - keep) + inv_freq * keep
        return blended, _yarn_attention_scaling(self.rope, factor)


def _yarn_attention_scaling(rope: dict[str, Any], factor: float) -> float:
    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    return magnitude(1.0)


@dataclass(frozen=True)
class GenerationConfig:
    """Sampling defaults of a checkpoint (generation_config.json, then config.json)."""

    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Config:
    """A whole model.

    `raw` is config.json as it was read. Saving writes what these fields say; of `raw` it takes bos_token_id and
    initializer_range alone.
    """

    vision: VisionConfig
    text: TextConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    vision_pad_token_id: int = 151654
    tie_word_embeddings: bool = False
    dtype: torch.dtype = torch.float32
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    raw: dict[str, Any] = field(default_factory=dict)

    @property
    def vision_token_ids(self) -> tuple[int, ...]:
        """The ids that only media parts of a prompt may carry; sampling masks them by default."""
        return (self.vision_start_token_id, self.vision_end_token_id, self.vision_pad_token_id,
                self.image_token_id, self.video_token_id)  # fmt: skip

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Config:
        """Reads `path`/config.json and, where it exists, `path`/generation_config.json."""
        directory = Path(path)
        generation = directory / "generation_config.json"
        return cls.from_dict(_read_json(directory / "config.json"), _read_json(generation) if generation.exists() else {})

    @classmethod
    def from_dict(cls, raw: dict[str, Any], generation: dict[str, Any] | None = None) -> Config:
        """Raises ValueError for a key that is missing or a value that is not supported, naming both."""
        if raw.get("model_type") != "qwen2_vl":
            raise ValueError(f"config.json: model_type is {raw.get('model_type')!r}; expected 'qwen2_vl'")
        text = {**raw, **_section(raw, "text_config")}
        dtype = raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or "float32"
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"config.json: dtype {dtype!r} is not supported; expected one of {sorted(_DTYPES)}")
        if raw.get("quantization_config"):
            raise ValueError(f"config.json: quantization_config {raw['quantization_config']!r:.80} is not supported")
        ids = {name: _token_id("config.json", name, raw[name]) for name in _TOKEN_IDS if raw.get(name) is not None}
        if raw.get("vision_token_id") is not None:  # the released name of <|vision_pad|>
            ids["vision_pad_token_id"] = _token_id("config.json", "vision_token_id", raw["vision_token_id"])
        config = cls(
            vision=_vision_config(_section(raw, "vision_config")),
            text=_text_config(text),
            tie_word_embeddings=any(_flag("config.json", source, "tie_word_embeddings") for source in (raw, text)),
            dtype=_DTYPES[dtype],
            generation=_generation_config(generation or {}, text),
            raw=raw,
            **ids,
        )
        if config.vision.hidden_size != config.text.hidden_size:
            raise ValueError(
                f"config.json: vision_config.hidden_size is {config.vision.hidden_size} but the decoder's hidden_size is "
                f"{config.text.hidden_size}; the tower's output must have the decoder's width"
            )
        if max(config.vision_token_ids) >= config.text.vocab_size:
            raise ValueError(
                "config.json: vision_start_token_id, vision_end_token_id, vision_token_id, image_token_id and video_token_id "
                f"are {list(config.vision_token_ids)}; expected ids below vocab_size {config.text.vocab_size}"
            )
        return config

    def to_dicts(self, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
        """config.json and generation_config.json in the released (flat) layout."""
        text, vision, generation = self.text, self.vision, self.generation
        eos = list(generation.eos_token_id)
        flat = {**self.raw, **(self.raw.get("text_config") or {})}
        rope = {key: value for key, value in text.rope.items() if key not in ("rope_type", "rope_theta")}
        kind = text.rope.get("rope_type", "default")
        config = {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "attention_dropout": 0.0,
            "bos_token_id": flat.get("bos_token_id"),
            "eos_token_id": eos[0] if eos else None,
            "hidden_act": "silu",
            "hidden_size": text.hidden_size,
            "image_token_id": self.image_token_id,
            "initializer_range": flat.get("initializer_range", 0.02),
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_position_embeddings,
            "model_type": "qwen2_vl",
            "num_attention_heads": text.num_attention_heads,
            "num_hidden_layers": text.num_hidden_layers,
            "num_key_value_heads": text.num_key_value_heads,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_scaling": {**rope, "type": "mrope" if kind == "default" else kind, "mrope_section": list(text.mrope_section)},
            "rope_theta": text.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "use_cache": True,
            "use_sliding_window": False,
            "video_token_id": self.video_token_id,
            "vision_config": {
                "depth": vision.depth,
                "embed_dim": vision.embed_dim,
                "hidden_size": vision.hidden_size,
                "in_channels": vision.in_channels,
                "mlp_ratio": vision.mlp_ratio,
                "model_type": "qwen2_vl_vision",
                "num_heads": vision.num_heads,
                "patch_size": vision.patch_size,
                "spatial_merge_size": vision.spatial_merge_size,
                "temporal_patch_size": vision.temporal_patch_size,
            },
            "vision_end_token_id": self.vision_end_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_token_id": self.vision_pad_token_id,
            "vocab_size": text.vocab_size,
        }
        if vision.rope_theta != 1e4:
            config["vision_config"]["rope_parameters"] = {"rope_type": "axial", "rope_theta": vision.rope_theta}
        sampling = {
            "bos_token_id": flat.get("bos_token_id"),
            "do_sample": generation.do_sample,
            "eos_token_id": eos,
            "pad_token_id": generation.pad_token_id,
            "repetition_penalty": generation.repetition_penalty,
        }
        if generation.do_sample:  # transformers warns of these beside do_sample=False
            sampling |= {name: getattr(generation, name) for name in ("temperature", "top_k", "top_p")}
        return config, {key: value for key, value in sampling.items() if value is not None}


_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.name} not found in {path.parent}; expected a checkpoint folder") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _section(raw: dict[str, Any], name: str, place: str = "") -> dict[str, Any]:
    """The JSON object under a key; one that is missing or null is empty."""
    value = {} if raw.get(name) is None else raw[name]
    if not isinstance(value, dict):
        raise ValueError(f"config.json: {place}{name} is {value!r:.80}; expected a JSON object")
    return value


def _flag(file: str, raw: dict[str, Any], name: str) -> bool:
    value = False if raw.get(name) is None else raw[name]
    if not isinstance(value, bool):
        raise ValueError(f"{file}: {name} is {value!r}; expected true or false")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive(section: str, raw: dict[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name, default)
    if isinstance(value, list) and value and value == value[:1] * len(value):
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"config.json: {section}{name} is {value!r}; expected a positive integer")
    return value


def _real(section: str, raw: dict[str, Any], name: str, default: float, least: float = 0.0) -> float:
    """A finite number over 0, and at least `least`."""
    value = default if raw.get(name) is None else raw[name]
    if not _is_number(value) or not (0 < value <= sys.float_info.max and value >= least):
        expected = f"of at least {least}" if least else "over 0"
        raise ValueError(f"config.json: {section}{name} is {value!r}; expected a number {expected}")
    return value


def _token_id(file: str, name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{file}: {name} is {value!r}; expected a token id")
    return value


def _refuse(section: str, raw: dict[str, Any], name: str, *supported: Any) -> None:
    if raw.get(name) is not None and raw[name] not in supported:
        raise ValueError(f"config.json: {section}{name} is {raw[name]!r}; supported: {', '.join(map(repr, supported))}")


def _vision_config(raw: dict[str, Any]) -> VisionConfig:
    def size(name: str, default: int | None = None) -> int:
        return _positive("vision_config.", raw, name, default)

    _refuse("vision_config.", raw, "hidden_act", "quick_gelu")
    _refuse("vision_config.", raw, "spatial_merge_size", 2)
    rope = _section(raw, "rope_parameters", "vision_config.")
    _refuse("vision_config.rope_parameters.", rope, "rope_type", "axial", "default")
    config = VisionConfig(
        depth=size("depth", 32),
        embed_dim=size("embed_dim", 1280),
        num_heads=size("num_heads", 16),
        hidden_size=size("hidden_size", 3584),
        mlp_ratio=_real("vision_config.", raw, "mlp_ratio", 4),
        in_channels=size("in_channels", raw.get("in_chans", 3)),
        patch_size=size("patch_size", 14),
        temporal_patch_size=size("temporal_patch_size", 2),
        rope_theta=float(_real("vision_config.rope_parameters.", rope, "rope_theta", 1e4)),
    )
    if config.embed_dim % config.num_heads or config.head_dim % 4:
        raise ValueError(
            f"config.json: vision_config.embed_dim {config.embed_dim} over num_heads {config.num_heads} must give a head_dim "
            "that is a multiple of 4 (two axes of rotary pairs)"
        )
    return config


def _text_config(raw: dict[str, Any]) -> TextConfig:
    def size(name: str, default: int | None = None) -> int:
        return _positive("", raw, name, default)

    _refuse("", raw, "hidden_act", "silu")
    _refuse("", raw, "attention_dropout", 0.0)
    _refuse("", raw, "attention_bias", True)
    _real("", raw, "initializer_range", 0.02)
    layers = size("num_hidden_layers")
    full = raw.get("max_window_layers", layers)
    if _flag("config.json", raw, "use_sliding_window") and not (_is_number(full) and full >= layers):
        raise ValueError(
            f"config.json: use_sliding_window with max_window_layers {full!r} of {layers} layers is not supported; only full "
            "attention is"
        )
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"config.json: layer_types is {kinds!r:.80}; expected a list of 'full_attention' alone")
    rope = {**_section(raw, "rope_scaling"), **_section(raw, "rope_parameters")}
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    rope["rope_type"] = "default" if kind == "mrope" else kind
    _refuse("rope_scaling.", rope, "rope_type", "default", "yarn")
    _refuse("", {**raw, **rope}, "partial_rotary_factor", 1.0)
    theta = float(_real("", {**raw, **rope}, "rope_theta", 1e6))
    if rope["rope_type"] == "yarn":
        _check_yarn(rope, theta)
    sections = (16, 24, 24) if rope.get("mrope_section") is None else rope["mrope_section"]
    if not isinstance(sections, (list, tuple)):
        raise ValueError(f"config.json: mrope_section is {sections!r}; expected a list of three numbers")
    config = TextConfig(
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=size("num_attention_heads"),
        num_key_value_heads=size("num_key_value_heads", raw.get("num_attention_heads")),
        rms_norm_eps=float(_real("", raw, "rms_norm_eps", 1e-5)),  # transformers' default, which its files may leave out
        rope_theta=theta,
        mrope_section=tuple(sections),
        max_position_embeddings=size("max_position_embeddings", 32768),
        rope=rope,
    )
    if config.hidden_size % config.num_attention_heads or config.head_dim % 2:
        raise ValueError(
            f"config.json: hidden_size {config.hidden_size} over num_attention_heads {config.num_attention_heads} must give an "
            "even head_dim"
        )
    if raw.get("head_dim") not in (None, config.head_dim):
        raise ValueError(f"config.json: head_dim {raw['head_dim']} differs from hidden_size / heads = {config.head_dim}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"config.json: num_attention_heads {config.num_attention_heads} is not a multiple of num_key_value_heads "
            f"{config.num_key_value_heads}"
        )
    sections = config.mrope_section
    if len(sections) != 3 or any(not isinstance(n, int) or n < 0 for n in sections) or 2 * sum(sections) != config.head_dim:
        raise ValueError(
            f"config.json: mrope_section {list(sections)} must be three numbers of at least 0 that sum to head_dim / 2 = "
            f"{config.head_dim // 2}"
        )
    try:
        config.rope_table()
    except (ArithmeticError, ValueError) as error:
        raise ValueError(f"config.json: rope_scaling {rope!r:.200} with rope_theta {theta} gives no table: {error}") from None
    return config


def _check_yarn(rope: dict[str, Any], theta: float) -> None:
    place = "rope_scaling."
    if rope.get("factor") is None:
        raise ValueError("config.json: rope_scaling of type 'yarn' needs a factor")
    _real(place, rope, "factor", 1.0, least=1.0)
    for name in ("attention_factor", "beta_fast", "beta_slow", "original_max_position_embeddings"):
        _real(place, rope, name, 1.0)
    for name in ("mscale", "mscale_all_dim"):
        if rope.get(name):  # 0 stands for none
            _real(place, rope, name, 1.0)
    if "truncate" in rope and not isinstance(rope["truncate"], bool):
        raise ValueError(f"config.json: {place}truncate is {rope['truncate']!r}; expected true or false")
    if theta <= 1:
        raise ValueError(f"config.json: rope_theta is {theta}; expected a number over 1 with rope_scaling of type 'yarn'")


def _generation_config(raw: dict[str, Any], text: dict[str, Any]) -> GenerationConfig:
    def first(name: str, default: Any) -> Any:
        return next((source[name] for source in (raw, text) if source.get(name) is not None), default)

    def number(name: str, default: float, most: float = sys.float_info.max) -> float:
        value = default if raw.get(name) is None else raw[name]
        if not _is_number(value) or not 0 < value <= most:
            raise ValueError(f"{file}: {name} is {value!r}; expected a number over 0, at most {most:g}")
        return float(value)

    file = "generation_config.json"
    eos, pad, top_k = first("eos_token_id", ()), first("pad_token_id", None), raw.get("top_k")
    top_k = 0 if top_k is None else top_k
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0:
        raise ValueError(f"{file}: top_k is {top_k!r}; expected 0 (off) or a positive integer")
    do_sample = _flag(file, raw, "do_sample")
    off = not do_sample and raw.get("temperature") == 0  # how some files spell greedy
    return GenerationConfig(
        eos_token_id=tuple(_token_id(file, "eos_token_id", i) for i in (eos if isinstance(eos, (list, tuple)) else (eos,))),
        pad_token_id=None if pad is None else _token_id(file, "pad_token_id", pad),
        do_sample=do_sample,
        temperature=1.0 if off else number("temperature", 1.0),
        top_k=top_k,
        top_p=number("top_p", 1.0, most=1),
        repetition_penalty=number("repetition_penalty", 1.0),
    )
