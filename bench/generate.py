"""Prefill and decode at the released widths with random weights, against transformers: same weights, same process.

qwen2vl-fast bench generate [--size 2B] [--layers N] [--batch 1 8] [--context 1024] [--tokens 64]
                             [--peers NAME ...] [--json] [--save]

The limit of decoding is the time in which the device copies as many bytes as a token must read: the decoder's weights once,
and every sequence's keys and values.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from bench.timing import ceilings, chosen, keep, measure, parser, publish, say
from qwen2vl_fast import Qwen2VL

# hidden, layers, heads, key-value heads, MLP, tied head
SIZES = {"2B": (1536, 28, 12, 2, 8960, True), "7B": (3584, 28, 28, 4, 18944, False)}
VOCAB = {"2B": 151936, "7B": 152064}
THEIRS, OURS, COMPILED = "transformers sdpa", "qwen2vl_fast", "transformers sdpa, static cache, compiled"
JUDGED = 4  # tokens
PEERS = (THEIRS,)  # the compiled one takes minutes, so only on request


def models(size: str, layers: int | None, dtype: torch.dtype, device: str) -> tuple[Any, Qwen2VL]:
    """transformers' model with random weights, and ours on the same ones. The tower is one block deep: bench tower times it."""
    hidden, depth, heads, kv_heads, mlp, tied = SIZES[size]
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": hidden,
            "num_hidden_layers": layers or depth,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": mlp,
            "vocab_size": VOCAB[size],
            "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24]},
            "rope_theta": 1e6,
            "tie_word_embeddings": tied,
        },
        vision_config={"depth": 1, "hidden_size": hidden},
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            theirs = Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    finally:
        torch.set_default_dtype(default)
    return theirs, Qwen2VL.from_transformers(theirs).eval()


def name_of(options: argparse.Namespace, device: str) -> str:
    return f"generate_{options.size}_{device}_{options.dtype}"


def bytes_a_token(model: Qwen2VL, batch: int, context: float) -> int:
    """What a decode step must read: the decoder's weights, the head, and the cache of every sequence."""
    text = model.config.text
    size = torch.finfo(model.dtype).bits // 8
    weights = (
        sum(p.numel() for name, p in model.model.named_parameters() if "embed_tokens" not in name) + model.head_weight.numel()
    )
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * batch * context
    return int((weights + cache) * size)


def contenders(
    theirs: Any, ours: Qwen2VL, batch: int, context: int, wanted: list[str]
) -> tuple[dict[str, Callable[[int], Any]], float]:
    """{contender: a call that decodes so many tokens greedily}, each judged, and the relative error of our logits behind the
    prompt.
    """
    ids = torch.randint(1000, 100000, (batch, context), device=ours.device)
    expected = theirs(input_ids=ids, logits_to_keep=1).logits.float()
    out = ours(ids, logits_to_keep=1).logits.float()
    error = float((out - expected).norm() / expected.norm())
    if not error < (1e-3 if ours.dtype == torch.float32 else 5e-2):
        raise RuntimeError(f"the models disagree: relative error {error:.1e} of the logits")
    mask = torch.ones_like(ids)

    def generate(tokens: int, **more: Any) -> torch.Tensor:
        return theirs.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, **more
        )

    def ours_generate(tokens: int) -> torch.Tensor:
        return ours.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=[], repetition_penalty=1.0)

    compiled = lambda tokens: generate(tokens, cache_implementation="static")  # noqa: E731
    calls = {THEIRS: generate, OURS: ours_generate, COMPILED: compiled}
    runs = {name: run for name, run in calls.items() if name == OURS or name in wanted}
    for name, run in runs.items():
        judge_tokens(name, theirs, {"input_ids": ids, "attention_mask": mask}, run(JUDGED), JUDGED)
    return runs, error


def judge_tokens(name: str, judge: Any, prompt: dict[str, Any], out: torch.Tensor, count: int, **more: Any) -> None:
    """Raises RuntimeError unless `out` is the prompt and `count` greedy tokens: each one's logit, by the judge given those
    before it, is the largest or as near to it as rounding may put it. A token at random is about four deviations away.
    """
    ids = prompt["input_ids"]
    if tuple(out.shape) != (len(ids), ids.shape[1] + count) or not torch.equal(out[:, : ids.shape[1]], ids):
        raise RuntimeError(f"{name}: generated {tuple(out.shape)} behind a prompt of {tuple(ids.shape)}, {count} tokens asked")
    whole = {"input_ids": out, "attention_mask": torch.ones_like(out)}
    logits = judge(**prompt | whole | more, logits_to_keep=count + 1).logits[:, :-1].float()
    said = logits.gather(-1, out[:, ids.shape[1] :, None])[..., 0]
    short = float(((logits.amax(-1) - said) / logits.std(-1)).max())
    if not short < (0.02 if judge.dtype == torch.float32 else 0.5):
        raise RuntimeError(f"{name}: a token whose logit is {short:.2f} deviations below the largest")


def race(options: argparse.Namespace, dtype: torch.dtype, device: str, bandwidth: float) -> list[dict[str, Any]]:
    theirs, ours = models(options.size, options.layers, dtype, device)
    rows = []
    for batch in options.batch:
        runs, error = contenders(theirs, ours, batch, options.context, chosen(options, PEERS))
        first = {name: lambda run=run: run(1) for name, run in runs.items()}
        rest = {name: lambda run=run: run(1 + options.tokens) for name, run in runs.items()}
        prefill = measure(first, repeats=options.repeats, device=device, graph=False)
        whole = measure(rest, repeats=options.repeats, device=device, graph=False)
        needed = bytes_a_token(ours, batch, options.context + options.tokens / 2)
        found = {}
        for name in runs:
            step = (whole[name]["median"] - prefill[name]["median"]) / options.tokens
            found[name] = {
                "prefill_seconds": prefill[name],
                "seconds_a_step": step,
                "tokens_per_second": batch / step,
                "share_of_limit": needed / bandwidth / step,
            }
        rows.append({
            "size": options.size,
            "layers": len(ours.model.layers),
            "dtype": str(dtype).removeprefix("torch."),
            "batch": batch,
            "context": options.context,
            "tokens": options.tokens,
            "error": error,
            "bytes_a_step": needed,
            "limit_tokens_per_second": batch * bandwidth / needed,
            "contenders": found,
        })  # fmt: skip
        tell(options, rows[-1])
        keep(name_of(options, device), options, rows)
    return rows


def tell(options: argparse.Namespace, row: dict[str, Any]) -> None:
    limit = row["limit_tokens_per_second"]
    say(
        options,
        f"{row['size']}, {row['layers']} layers, batch {row['batch']}, context {row['context']}: at most {limit:.1f} tokens/s",
    )
    for name, facts in row["contenders"].items():
        line = f"  {name:<42} {facts['tokens_per_second']:8.1f} tokens/s {100 * facts['share_of_limit']:4.0f} %"
        say(options, f"{line}   prefill {facts['prefill_seconds']['median'] * 1e3:8.1f} ms")


def main(argv: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    arguments = parser("generate", __doc__, repeats=3 if cuda else 2, peers=PEERS, on_request=(COMPILED,))
    arguments.add_argument("--size", choices=tuple(SIZES), default="2B")
    arguments.add_argument(
        "--layers", type=int, default=None if cuda else 4, help="of the decoder (default: all, on the CPU 4)"
    )
    arguments.add_argument("--batch", type=int, nargs="*", default=[1, 8] if cuda else [1])
    arguments.add_argument("--context", type=int, default=1024 if cuda else 128, help="tokens of the prompt")
    arguments.add_argument("--tokens", type=int, default=64 if cuda else 16, help="tokens to decode")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32")
    options = arguments.parse_args(argv)
    device = "cuda" if cuda else "cpu"
    ceiling = ceilings()
    with torch.inference_mode():
        rows = race(options, getattr(torch, options.dtype), device, ceiling["copy_bytes_per_s"])
    publish(name_of(options, device), options, rows, ceilings=ceiling)


if __name__ == "__main__":
    main()
