"""A transformers Qwen2-VL model with random weights, as it is and patched: whole forward, part by part, training step, memory.

    qwen2vl-fast bench patch [--cases a f] [--peers NAME ...] [--repeats 5] [--parts] [--train] [--json] [--save]

On a CUDA device the 2B model in bfloat16 on the cases of KERNELS.md; on a CPU its widths at depth 4 in float32, every side of
an image quartered. Errors are against the unpatched model in the next wider dtype.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import qwen2vl_fast
from bench.timing import ceilings, keep, measure, parser, peak, publish, say, speedup, taking_part, times

CASES = {
    "a": [(32, 32)],
    "b": [(32, 32)] * 4,
    "c": [(16, 16)] * 64,
    "d": [(64, 64)] * 4,
    "e": [(128, 128)],
    "f": [(72, 72)] + [(36, 36)] * 3 + [(20, 32)] * 8 + [(16, 16)] * 16,
}
WIDTHS = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
TOWER: dict[str, int] = {}  # what of the tower is not as released
TEXT = 64  # tokens of text around the images
IMAGE, VIDEO = 3001, 3002
TRAIN = [(36, 36)] * 4, 2048  # images and text tokens of the training step
THEIRS = "transformers sdpa"
PEERS = (THEIRS,)
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative error past which nothing is timed


def cuda() -> bool:
    return torch.cuda.is_available()


def name_of() -> str:
    return f"patch_{'cuda' if cuda() else 'cpu'}"


def build(depth: int | None) -> nn.Module:
    """The 2B model; depth: layers of each tower on a CPU, where the vocabulary is small too."""
    text = {
        **WIDTHS, "num_hidden_layers": depth or 28, "vocab_size": 4096 if depth else 151936, "max_position_embeddings": 32768,
        "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    config = transformers.Qwen2VLConfig(
        **text, vision_config={"depth": depth or 32, "hidden_size": WIDTHS["hidden_size"], **TOWER},
        image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=3003, vision_end_token_id=3004, vision_token_id=3005,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if cuda() else torch.float32)
    try:
        with torch.device("cuda" if cuda() else "cpu"):
            model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():  # else every attention is uniform and every position alike
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "qkv.weight")):
                parameter.mul_(2)
    return model


def twin(model: nn.Module) -> nn.Module:
    """Another instance over the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def batch(grids: list[tuple[int, int]], text: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """One sequence of all the images and some text."""
    generator = torch.Generator().manual_seed(0)
    if not cuda():
        grids = [(h // 8 * 2, w // 8 * 2) for h, w in grids]
    ids = torch.randint(10, 3000, (text,), generator=generator).tolist()
    for h, w in reversed(grids):
        ids[:0] = [3003, *([IMAGE] * (h * w // 4)), 3004]
    input_ids = torch.tensor([ids])
    grid = torch.tensor([(1, h, w) for h, w in grids])
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE).int(),
        "image_grid_thw": grid,
        "pixel_values": torch.randn(int(grid.prod(1).sum()), 1176, generator=generator).to(dtype),
    }
    return {name: x.cuda() if cuda() else x for name, x in inputs.items()}


def relative(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def contenders(
    model: nn.Module, patched: nn.Module, own: nn.Module, inputs: dict[str, Tensor]
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float], bool]:
    """(calls that give the last token's logits, their relative errors, whether all choose the same token)."""
    theirs = {**inputs, "use_cache": False, "logits_to_keep": 1}
    ours = {key: value.cpu() if key == "image_grid_thw" else value for key, value in inputs.items()}
    runs = {
        THEIRS: lambda: model(**theirs).logits,
        "patched": lambda: patched(**theirs).logits,
        "Qwen2VL": lambda: own(**ours, logits_to_keep=1).logits,
    }
    found = {name: run().flatten() for name, run in runs.items()}
    exact = _exact(model, theirs)
    errors = {name: relative(x, exact) for name, x in found.items()}
    if not all(error < ALLOWED[inputs["pixel_values"].dtype] for error in errors.values()):
        raise RuntimeError(f"{inputs['pixel_values'].shape[0]} patches: relative errors {errors}")
    return runs, errors, len({int(x.argmax()) for x in found.values()}) == 1


def forwards(
    model: nn.Module, patched: nn.Module, own: nn.Module, report: Any, options: argparse.Namespace
) -> list[dict[str, Any]]:
    dtype = next(model.parameters()).dtype
    rows = []
    for name in options.cases:
        inputs = batch(CASES[name], TEXT, dtype)
        with torch.no_grad():
            runs, errors, same_token = contenders(model, patched, own, inputs)
            runs = taking_part(options, runs, PEERS)
            seconds = measure(runs, repeats=options.repeats, device="cuda" if cuda() else "cpu", graph=False)
        row = {
            "case": name, "patches": int(inputs["image_grid_thw"].prod(1).sum()), "tokens": inputs["input_ids"].shape[1],
            "errors": errors, "same_token": same_token, "seconds": seconds,
            "speedup": speedup(seconds, THEIRS, "patched"),
        }  # fmt: skip
        rows.append(row)
        found = ", ".join(f"{key} {value['median'] * 1e3:.1f} ms (error {errors[key]:.1e})" for key, value in seconds.items())
        say(options, f"({name}) {row['patches']} patches, {row['tokens']} tokens: {found}, {times(row['speedup'])}, "
                     f"tokens equal: {row['same_token']}")  # fmt: skip
        keep(name_of(), options, rows, report=report.rows())
    return rows


def _exact(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The unpatched model in the next wider dtype."""
    wide = torch.float32 if cuda() else torch.float64
    reference = copy.deepcopy(model)
    tables = {module: module.inv_freq for module in reference.modules() if hasattr(module, "inv_freq")}
    reference.to(wide)
    for module, table in tables.items():  # .to() casts the frequencies too
        module.inv_freq = table
    out = reference(**{k: x.to(wide) if k == "pixel_values" else x for k, x in inputs.items()}).logits.flatten()
    del reference
    gc.collect()
    return out


def training(model: nn.Module, patched: nn.Module, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward and backward of one sequence with labels; on CUDA the peak memory above what was there before."""
    grids, text = TRAIN
    if not cuda():
        grids, text = grids[:1], 256
    inputs = batch(grids, text, next(model.parameters()).dtype)
    labels = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] != 0, -100)

    def step(one: nn.Module) -> Tensor:
        one.zero_grad(set_to_none=True)
        loss = one(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach()

    models = {THEIRS: model.train(), "patched": patched.train()}
    losses = {name: float(step(one)) for name, one in models.items()}
    if not abs(losses["patched"] / losses[THEIRS] - 1) < ALLOWED[inputs["pixel_values"].dtype]:
        raise RuntimeError(f"training step: losses {losses}")
    peaks = {}
    for name, one in models.items() if cuda() else ():
        one.zero_grad(set_to_none=True)
        peaks[name] = peak(lambda one=one: step(one))
    runs = {name: (lambda one=one: step(one)) for name, one in models.items()}
    runs = taking_part(options, runs, PEERS)
    seconds = measure(runs, repeats=options.repeats, device="cuda" if cuda() else "cpu", graph=False)
    model.zero_grad(set_to_none=True)
    model.eval(), patched.eval()
    row = {
        "case": "training step", "patches": inputs["pixel_values"].shape[0], "tokens": inputs["input_ids"].shape[1],
        "losses": losses, "peak_bytes": peaks, "seconds": seconds,
        "speedup": speedup(seconds, THEIRS, "patched"),
    }  # fmt: skip
    found = ", ".join(f"{key} {value['median'] * 1e3:.0f} ms" for key, value in seconds.items())
    say(options, f"training step, {row['patches']} patches, {row['tokens']} tokens: {found}, {times(row['speedup'])}, losses "
                 f"{losses}, peak {({k: f'{v / 2**30:.2f} GiB' for k, v in peaks.items()})}")  # fmt: skip
    return [row]


def main(argv: list[str] | None = None) -> None:
    arguments = parser("patch", __doc__, repeats=10 if cuda() else 3, peers=PEERS)
    arguments.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    arguments.add_argument("--depth", type=int, default=None if cuda() else 4, help="layers of each tower (on the CPU 4)")
    arguments.add_argument("--parts", action="store_true", help="each part alone, on the last case (always on a CUDA device)")
    arguments.add_argument("--train", action="store_true", help="a training step too (always on a CUDA device)")
    options = arguments.parse_args(argv)
    model = build(options.depth)
    patched = twin(model)
    report = qwen2vl_fast.patch(patched)
    own = qwen2vl_fast.Qwen2VL.from_transformers(model)
    rows = forwards(model, patched, own, report, options)
    say(options, str(report))
    parts = []
    if options.parts or cuda():
        inputs = batch(CASES[options.cases[-1]], TEXT, next(model.parameters()).dtype)
        with contextlib.redirect_stdout(sys.stderr if options.json else sys.stdout):
            parts = report.verify({**inputs, "use_cache": False, "logits_to_keep": 1}, repeats=options.repeats)
    if options.train or cuda():
        rows += training(model, patched, options)
    publish(name_of(), options, rows, ceilings=ceilings(), parts=parts, report=report.rows())


if __name__ == "__main__":
    main()
