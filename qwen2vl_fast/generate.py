"""Token by token: prefill, decode with a key-value cache, sampling. Works on a Qwen2VL that is passed in."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

from .cache import KVCache
from .ops.backends import using

FIRST_SLOTS = 4096  # cache slots for new tokens at first; the cache grows by itself


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, in transformers' order: penalty, suppression, temperature, top-k, top-p."""

    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    suppressed: tuple[int, ...]
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            _expect(name, getattr(self, name), Real, "a number")
        _expect("top_k", self.top_k, Integral, "an int")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}; for greedy use do_sample=False")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 (off) or a positive integer, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty: expected a positive number, got {self.repetition_penalty}")

    def next(self, logits: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """[B, V] logits, seen [B, V] bool (ids of the prompt and the answer so far) -> [B] int64."""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if seen is not None:
            penalised = torch.where(scores < 0, scores * self.repetition_penalty, scores / self.repetition_penalty)
            scores = torch.where(seen, penalised, scores)
        if self.suppressed:
            scores = scores.index_fill(1, torch.tensor(self.suppressed, device=scores.device), -torch.inf)
        if not self.do_sample:
            return scores.argmax(-1)
        scores = scores / self.temperature
        if 0 < self.top_k < scores.shape[1]:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[:, -1:], -torch.inf)
        if self.top_p < 1:
            ordered, order = scores.sort(descending=True)
            probabilities = ordered.softmax(-1)
            beyond = probabilities.cumsum(-1) - probabilities >= self.top_p  # the token that crosses top_p stays
            scores = scores.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator).squeeze(1)


def generate(model: Any, input_ids: torch.Tensor | None = None, *, streamer: Any = None, **options: Any) -> torch.Tensor:
    """Continues a batch of prompts.

    Args:
        model: a Qwen2VL.
        input_ids, attention_mask, pixel_values, ... : as `Qwen2VL.forward`. Any pattern of padding; a cache and every position
            belong to their sequence, so a batch gives what its members give alone.
        cache: a KVCache, empty or with the beginning of every sequence; input_ids are what follows it. Afterwards it holds all
            but the last token of each answer (its end token, or the last of max_new_tokens), with which the next input begins.
        num_return_sequences: continuations of each prompt, which is read once.
        suppress_vision_tokens: never emit the ids that only media parts may carry.
        max_new_tokens: required.
        do_sample, temperature, top_k, top_p, repetition_penalty: None = generation_config.json. top_k 0 is off.
            The penalty counts the ids of this call: what a cache held before is not among them.
        eos_token_id: an id or a list; None = the checkpoint's, [] = never stop.
        seed: of the sampling; None = torch's global generator.
        streamer: an object with put(tokens [B]) and end(), called for each step.
    Returns: [B * num_return_sequences, S + new] int64: the input, then the answer, padded after its end. With inputs_embeds
        and no input_ids, the answer alone.
    Raises: TypeError, ValueError naming the argument.
    """
    for method in ("put", "end") if streamer is not None else ():
        if not callable(getattr(streamer, method, None)):
            raise TypeError(f"streamer: expected an object with put(tokens) and end(), got {type(streamer).__name__}")
    steps = []
    for tokens in stream(model, input_ids, **options):
        steps.append(tokens)
        if streamer is not None:
            streamer.put(tokens)
    if streamer is not None:
        streamer.end()
    times = options.get("num_return_sequences", 1)
    embeds = options.get("inputs_embeds")
    batch = (input_ids if input_ids is not None else embeds).shape[0]
    answer = torch.stack(steps, 1) if steps else torch.zeros(batch * times, 0, dtype=torch.int64, device=model.device)
    if input_ids is None:
        return answer
    return torch.cat((input_ids.to(answer.device, torch.int64).repeat_interleave(times, 0), answer), 1)


def stream(
    model: Any,
    input_ids: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    attention_mask: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    image_grid_thw: torch.Tensor | None = None,
    pixel_values_videos: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
    mm_token_type_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    cache: KVCache | None = None,
    num_return_sequences: int = 1,
    suppress_vision_tokens: bool = True,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    eos_token_id: int | list[int] | None = None,
    seed: int | None = None,
) -> Iterator[torch.Tensor]:
    """`generate` as an iterator: yields [B] int64 for each step, the pad id for a sequence that has ended."""
    defaults = model.config.generation
    for name, value, least in (("max_new_tokens", max_new_tokens, 0), ("num_return_sequences", num_return_sequences, 1)):
        _expect(name, value, Integral, "an int")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if eos_token_id is None:
        ends = defaults.eos_token_id
    else:
        ends = tuple(eos_token_id) if isinstance(eos_token_id, (list, tuple)) else (eos_token_id,)
        for end in ends:
            _expect("eos_token_id", end, Integral, "an int or a list of them")
    for name, flag in (("do_sample", do_sample), ("suppress_vision_tokens", suppress_vision_tokens)):
        if flag is not None and not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
    if cache is not None:
        _check_cache(cache, model)
    pad = defaults.pad_token_id if defaults.pad_token_id is not None else (ends[0] if ends else 0)
    generator = None
    if seed is not None:
        _expect("seed", seed, Integral, "an int")
        generator = torch.Generator(model.device).manual_seed(seed)
    sampling = Sampling(
        do_sample=_or(do_sample, defaults.do_sample),
        temperature=_or(temperature, defaults.temperature),
        top_k=_or(top_k, defaults.top_k),
        top_p=_or(top_p, defaults.top_p),
        repetition_penalty=_or(repetition_penalty, defaults.repetition_penalty),
        suppressed=_suppressed(model.config, suppress_vision_tokens),
        generator=generator,
    )
    return _steps(
        model, input_ids, inputs_embeds, attention_mask, image_grid_thw, video_grid_thw, mm_token_type_ids, position_ids,
        pixel_values, pixel_values_videos, cache, num_return_sequences, max_new_tokens, sampling, ends, pad,
    )  # fmt: skip


# generate hands its options on; its signature shows them.
_streaming, _generating = inspect.signature(stream), inspect.signature(generate)
generate.__signature__ = _generating.replace(parameters=[*_streaming.parameters.values(), _generating.parameters["streamer"]])


def _expect(name: str, value: Any, kind: type, words: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {words}, got {type(value).__name__}")


def _check_cache(cache: Any, model: Any) -> None:
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: expected a KVCache, got {type(cache).__name__}")
    text, keys = model.config.text, cache.keys[0]
    wanted = (text.num_hidden_layers, text.num_key_value_heads, text.head_dim)
    got = (len(cache.keys), *keys.shape[2:])
    if got != wanted:
        raise ValueError(
            f"cache: expected {wanted[0]} layers of [B, S, {wanted[1]}, {wanted[2]}] as the model has, got {got[0]} of "
            f"[B, S, {got[1]}, {got[2]}]"
        )
    if keys.dtype != model.dtype or keys.device != model.device:
        raise TypeError(f"cache: expected {model.dtype} on {model.device} like the model, got {keys.dtype} on {keys.device}")


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _suppressed(config: Any, suppress: bool) -> tuple[int, ...]:
    return tuple(i for i in config.vision_token_ids if i < config.text.vocab_size) if suppress else ()


def _steps(
    model, input_ids, inputs_embeds, attention_mask, image_grid_thw, video_grid_thw, mm_token_type_ids, position_ids,
    pixel_values, pixel_values_videos, cache, times, max_new_tokens, sampling, ends, pad,
) -> Iterator[torch.Tensor]:  # fmt: skip
    packed = model._pack(
        input_ids, inputs_embeds, attention_mask, image_grid_thw, video_grid_thw, mm_token_type_ids, position_ids, cache
    )
    if max_new_tokens == 0:
        return
    if cache is None:
        slots = max(packed.lengths) + min(max_new_tokens, FIRST_SLOTS)
        cache = KVCache(model.config.text, len(packed.lengths), slots, dtype=model.dtype, device=model.device)
    with torch.no_grad(), using(model.backend):
        held = cache.lengths, cache.deltas
        try:
            hidden = model._hidden(packed, input_ids, inputs_embeds, pixel_values, pixel_values_videos, cache)
        except BaseException:  # out of memory and Ctrl-C too: what the caller's cache held stays what it holds
            cache.lengths, cache.deltas = held
            raise
        cache.deltas = list(packed.deltas)
        last = torch.tensor(packed.lengths).cumsum(0) - 1
        logits = model._logits(hidden[last.to(hidden.device)])
        if times > 1:
            logits = logits.repeat_interleave(times, 0)
            cache.repeat(times)
        seen = None
        if sampling.repetition_penalty != 1:
            seen = _seen(input_ids, packed, logits).repeat_interleave(times, 0)
        done = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
        stops = torch.tensor(ends, dtype=torch.int64, device=logits.device)
    before = list(cache.lengths)
    fed = torch.zeros_like(done, dtype=torch.int64)
    try:
        for step in range(max_new_tokens):
            with torch.no_grad(), using(model.backend):
                if step:
                    fed += ~done
                    logits = _decode(model, cache, tokens)  # noqa: F821 -- set by the step before
                tokens = sampling.next(logits, seen).masked_fill(done, pad)
                if seen is not None:
                    seen.scatter_(1, tokens[:, None], True)
                done = done | torch.isin(tokens, stops)
            yield tokens
            if ends and bool(done.all()):
                return
    finally:  # what was fed to a sequence after its end is not part of it
        cache.lengths = [length + count for length, count in zip(before, fed.tolist(), strict=True)]


def _seen(input_ids: torch.Tensor | None, packed: Any, logits: torch.Tensor) -> torch.Tensor:
    """[B, V] bool: which ids the real tokens of each prompt hold."""
    batch, length = packed.shape
    seen = torch.zeros(batch, logits.shape[1], dtype=torch.bool, device=logits.device)
    if input_ids is not None:
        rows = packed.rows.to(logits.device)
        seen[rows // length, input_ids.to(logits.device).flatten()[rows]] = True
    return seen


def _decode(model: Any, cache: KVCache, tokens: torch.Tensor) -> torch.Tensor:
    """One more token for every sequence: [B] -> logits [B, V]. Its three ids are its index + the sequence's delta."""
    position = torch.tensor([length + delta for length, delta in zip(cache.lengths, cache.deltas, strict=True)])
    pack = model._text_pack(position.expand(3, -1), (1,) * len(cache.lengths), cache)
    return model._logits(model.model(model.model.embed_tokens(tokens), pack))
