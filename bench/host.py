"""What a call costs on the host before a kernel starts: Python, checks, torch's dispatch, allocation. Needs no GPU.

    qwen2vl-fast bench host [--peers NAME ...] [--repeats 30] [--json] [--save]

Everything takes the path that it takes on a Hopper device, with tiny tensors on the CPU and every start of a kernel of ours
replaced by nothing. Library calls (matrix products, and all that transformers does) run on the CPU, at sizes where they are
dispatch and little else. A device adds the start of each kernel to both sides; transformers starts more of them.
"""

from __future__ import annotations

import copy
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn

import qwen2vl_fast
from bench.timing import parser, publish, say, taking_part
from qwen2vl_fast import ops, positions

DEPTH, WIDTH, HEADS, DIM = 4, 64, 4, 16  # of both towers; a layer's cost is a part of what a forward takes
SECTIONS = [2, 3, 3]
GRID = torch.tensor([[1, 4, 4]])
IMAGE, TEXT = 200, 8
CUDA = torch.device("cuda")
PEERS = ("transformers",)


def nothing(*_: Any, **__: Any) -> None:
    return None


@contextmanager
def no_kernels() -> Iterator[None]:
    """Tensors of the CPU go where those of a Hopper device would, and no kernel of ours starts."""
    module = lambda name: importlib.import_module(f"qwen2vl_fast.{name}")  # noqa: E731
    extension = SimpleNamespace(
        VarlenAttention=nothing, varlen_attention_forward=nothing, varlen_attention_backward=nothing,
        varlen_attention_tiles=nothing,
    )  # fmt: skip
    choose = module("ops.backends").choose
    changes = [
        (qwen2vl_fast, "_C", extension),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=132)),
        (module("ops.backends"), "extension_error", nothing),
        (module("ops.backends"), "driver_error", nothing),
        (module("ops.attention_cuda"), "refuses", nothing),
        (module("ops.attention_cuda"), "_place", lambda _: (0, 0)),
        (module("ops.rope"), "_check_values", nothing),
        (module("ops.linear"), "_ONEDNN", False),
        *((module(f"patch.{name}"), "project", lambda layer, x: layer(x)) for name in ("vision", "text")),
        *((module(f"kernels.{name}"), "start", nothing) for name in ("activation", "gated", "loss", "norm", "rope", "sums")),
        *(
            (module(f"ops.{name}"), "choose", lambda op, backend, device, *rest: choose(op, backend, CUDA, *rest))
            for name in ("norm", "rope", "activation", "gated", "merge", "attention", "vision_attention", "loss")
        ),
    ]
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value, create=name == "_C"))
        yield


def microseconds(contenders: dict[str, Callable[[], Any]], repeats: int, calls: int) -> dict[str, float]:
    """Smallest processor time of a call, over rounds in which each contender is called `calls` times: other work only adds."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            start = time.process_time()
            for _ in range(calls):
                run()
            if turn:
                found[name].append((time.process_time() - start) / calls * 1e6)
    return {name: min(times) for name, times in found.items()}


def steps(run: Callable[[], Any]) -> int:
    """Calls of functions, Python's and C's, inside one call: the same on every machine, however busy."""
    count = [0]

    def see(frame: Any, event: str, argument: Any) -> None:
        count[0] += event in ("call", "c_call")

    run()
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count[0] - 1  # setprofile's own


def op_calls() -> dict[str, Callable[[], Any]]:
    tokens = int(GRID.prod())
    x, weight, bias = torch.randn(tokens, WIDTH), torch.randn(WIDTH), torch.randn(WIDTH)
    q, k, v = torch.randn(tokens, 3, HEADS, DIM).unbind(1)
    ids = positions.vision_position_ids(GRID)
    three = torch.cat((ids, ids[:1]))
    schedule = positions.attention_schedule(GRID, heads=HEADS, head_dim=DIM, device="cpu")
    return {
        "add + layer_norm": lambda: ops.layer_norm(x, weight, bias, eps=1e-6, residual=x),
        "add + rms_norm": lambda: ops.rms_norm(x, weight, eps=1e-6, residual=x),
        "quick_gelu": lambda: ops.quick_gelu(x, bias),
        "swiglu": lambda: ops.swiglu(x),
        "merge_patches": lambda: ops.merge_patches(x, weight, bias),
        "vision_rope": lambda: ops.vision_rope(q, k, ids),
        "vision_rope_": lambda: ops.vision_rope_(q, k, ids),
        "mrope": lambda: ops.mrope(q, k, three, sections=SECTIONS),
        "mrope_": lambda: ops.mrope_(q, k, three, sections=SECTIONS),
        "varlen_attention": lambda: ops.varlen_attention(q, k, v, schedule.cu_seqlens, schedule=schedule),
        "torch: empty_like": lambda: torch.empty_like(x),
        "torch: linear": lambda: torch.nn.functional.linear(x, x, None),
        "torch: layer_norm": lambda: torch.nn.functional.layer_norm(x, (WIDTH,), weight, bias),
    }


def build() -> nn.Module:
    text = {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": 2,
        "num_hidden_layers": DEPTH, "vocab_size": 256, "rope_theta": 1e6, "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": SECTIONS}, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"depth": DEPTH, "embed_dim": WIDTH, "num_heads": HEADS, "mlp_ratio": 2, "hidden_size": WIDTH, "patch_size": 2}
    config = transformers.Qwen2VLConfig(
        **text, vision_config=vision, image_token_id=IMAGE, video_token_id=201, vision_start_token_id=202,
        vision_end_token_id=203, vision_token_id=204,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def model_calls() -> dict[str, tuple[int, dict[str, Callable[[], Any]]]]:
    """{what: (its layers, {contender: a call})}."""
    model = build()
    patched = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    qwen2vl_fast.patch(patched)
    own = qwen2vl_fast.Qwen2VL.from_transformers(model)
    pixels = torch.randn(int(GRID.prod()), 24)
    ids = torch.randint(0, IMAGE, (1, TEXT))
    one, labels = ids[:, :1], ids
    caches = [transformers.DynamicCache(config=model.config.get_text_config()) for _ in range(2)]
    theirs = {"transformers": model, "patched": patched}
    for one_model, cache in zip(theirs.values(), caches, strict=True):
        with torch.no_grad():
            one_model(input_ids=ids, past_key_values=cache)

    def step(one_model: nn.Module, **inputs: Any) -> None:
        if not one_model.training:
            one_model.train()
        one_model(**inputs).loss.backward()

    def decode(one_model: nn.Module, cache: Any) -> None:
        one_model(input_ids=one, past_key_values=cache)
        cache.crop(-1)

    def tower_step(one_model: nn.Module) -> None:
        out = one_model.model.visual(pixels, grid_thw=GRID)
        getattr(out, "pooler_output", out).sum().backward()

    return {
        "tower": (DEPTH, {
            **{name: (lambda m=m: m.model.visual(pixels, grid_thw=GRID)) for name, m in theirs.items()},
            "Qwen2VL": lambda: own.visual(pixels, GRID),
        }),
        "decoder": (DEPTH, {
            **{name: (lambda m=m: m.model.language_model(input_ids=ids, use_cache=False)) for name, m in theirs.items()},
            "Qwen2VL": lambda: own(ids),
        }),
        "decoded token": (DEPTH, {
            name: (lambda m=m, cache=cache: decode(m, cache)) for (name, m), cache in zip(theirs.items(), caches, strict=True)
        }),
        "tower, training": (DEPTH, {
            **{name: (lambda m=m: tower_step(m)) for name, m in theirs.items()},
            "Qwen2VL": lambda: own.visual(pixels, GRID).sum().backward(),
        }),
        "decoder, training": (DEPTH, {
            name: (lambda m=m: step(m, input_ids=ids, labels=labels)) for name, m in theirs.items()
        }),
    }  # fmt: skip


def _against(found: dict[str, float]) -> str:
    return f"   {found['transformers'] / found['patched']:.2f}x" if "transformers" in found else ""


def main(argv: list[str] | None = None) -> None:
    options = parser("host", __doc__, repeats=30, peers=PEERS).parse_args(argv)
    rows = []
    with no_kernels():
        with torch.no_grad():
            for name, run in op_calls().items():
                found = microseconds({name: run}, options.repeats, 50)[name]
                rows.append({"op": name, "microseconds": found, "calls": steps(run)})
                say(options, f"{name:<20}{found:7.1f} us {rows[-1]['calls']:5d} calls")
        for what, (layers, calls) in model_calls().items():
            contenders = taking_part(options, calls, PEERS)
            with torch.set_grad_enabled("training" in what):
                found = microseconds(contenders, options.repeats, 5)
                counts = {name: steps(run) for name, run in contenders.items()}
            rows.append({"forward": what, "layers": layers, "microseconds": found, "calls": counts})
            times = "   ".join(f"{name} {value:6.0f} us {counts[name]:5d} calls" for name, value in found.items())
            say(options, f"{what:<18} {times}" + _against(found))
    publish("host", options, rows)


if __name__ == "__main__":
    main()
