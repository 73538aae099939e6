"""A training step of the 2B model, forward and backward of one packed sequence with labels: time, and memory above the weights.

qwen2vl-fast bench train [--peers NAME ...] [--depth N] [--repeats 5] [--json] [--save]

transformers with sdpa and with flash-attn, the same model after qwen2vl_fast.patch, and our own model over the same weights.
Before anything is timed, losses and the gradients of three weights are compared. On a CPU the 2B widths at depth 2 in float32,
with a smaller picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import qwen2vl_fast
from bench.patch import ALLOWED, IMAGE, TRAIN, batch, build, cuda, relative, twin
from bench.timing import ceilings, chosen, measure, parser, peak, publish, say
from qwen2vl_fast.ops.backends import unusable

THEIRS, FLASH, PATCHED, OURS = "transformers sdpa", "transformers flash-attn", "transformers, patched", "qwen2vl_fast"
PEERS = (THEIRS, FLASH)
JUDGED = ("visual.blocks.0.attn.qkv.weight", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.down_proj.weight")


def contenders(model: nn.Module, wanted: list[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Models over the same parameters, and why a peer has none."""
    found: dict[str, nn.Module] = {THEIRS: model}
    missing: dict[str, str] = {}
    if FLASH in wanted:
        if not cuda():
            missing[FLASH] = "needs a CUDA device"
        elif reason := unusable("varlen_attention", "flash", "cuda"):
            missing[FLASH] = reason
        else:
            try:
                other = twin(model)
                other.set_attn_implementation("flash_attention_2")
                found[FLASH] = other
            except (ImportError, ValueError, AttributeError) as error:
                missing[FLASH] = " ".join(str(error).split())[:160]
    patched = twin(model)
    qwen2vl_fast.patch(patched)
    found |= {PATCHED: patched, OURS: qwen2vl_fast.Qwen2VL.from_transformers(model)}
    return {name: one.train() for name, one in found.items()}, missing


def steps(models: dict[str, nn.Module], inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Callable[[], Tensor]]:
    """{contender: a call that leaves gradients and returns the loss}."""

    def step(name: str) -> Tensor:
        model = models[name]
        model.zero_grad(set_to_none=True)
        if name == OURS:
            own = {key: x.cpu() if key == "image_grid_thw" else x for key, x in inputs.items()}
            loss = model(**own, labels=labels).loss
        else:
            loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return {name: (lambda name=name: step(name)) for name in models}


def gradients(model: nn.Module) -> list[Tensor]:
    """Of the judged weights, by the ends of their names, which all of the models share."""
    named = list(model.named_parameters())
    return [next(p.grad for name, p in named if name.endswith(end)).clone() for end in JUDGED]


def judged(
    model: nn.Module, inputs: dict[str, Tensor], wanted: list[str]
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, dict[str, Any]]]:
    """The contenders' steps, and what is known of each: why it takes no part, or its loss and the errors of its gradients."""
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    models, missing = contenders(model, wanted)
    runs = steps(models, inputs, labels)
    facts: dict[str, dict[str, Any]] = {name: {"missing": reason} for name, reason in missing.items()}
    exact = None
    for name, run in runs.items():
        loss = float(run())
        found = gradients(models[name])
        exact = exact or (loss, found)  # of transformers, which judges even where it is not timed
        errors = [relative(x, y) for x, y in zip(found, exact[1], strict=True)]
        # Two roundings of their own apart: in bfloat16 each of the two differs from the truth.
        if not max(abs(loss / exact[0] - 1), *errors) < 4 * ALLOWED[inputs["pixel_values"].dtype]:
            raise RuntimeError(f"{name}: loss {loss} against {exact[0]}, relative errors of the gradients {errors}")
        facts[name] = {"loss": loss, "gradient_errors": errors}
        if cuda():
            models[name].zero_grad(set_to_none=True)
            facts[name]["peak_bytes"] = peak(run)
    if THEIRS not in wanted:
        del runs[THEIRS], facts[THEIRS]
    return runs, facts


def race(model: nn.Module, grids: list[tuple[int, int]], text: int, wanted: list[str], repeats: int) -> dict[str, Any]:
    inputs = batch(grids, text, next(model.parameters()).dtype)
    runs, facts = judged(model, inputs, wanted)
    seconds = measure(runs, repeats=repeats, device="cuda" if cuda() else "cpu", graph=False)
    for name, value in seconds.items():
        facts[name]["seconds"] = value
    model.zero_grad(set_to_none=True)
    return {
        "case": "training step",
        "patches": inputs["pixel_values"].shape[0],
        "tokens": inputs["input_ids"].shape[1],
        "dtype": str(inputs["pixel_values"].dtype).removeprefix("torch."),
        "contenders": facts,
    }


def lines(row: dict[str, Any]) -> list[str]:
    text = [f"{row['case']}, {row['patches']} patches, {row['tokens']} tokens"]
    base = next(facts["seconds"]["median"] for facts in row["contenders"].values() if "seconds" in facts)
    for name, facts in row["contenders"].items():
        if "missing" in facts:
            text.append(f"  {name:<26} {facts['missing']}")
            continue
        memory = f"   peak {facts['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in facts else ""
        median = facts["seconds"]["median"]
        text.append(f"  {name:<26} {median * 1e3:9.1f} ms {base / median:5.2f}x   loss {facts['loss']:.4f}{memory}")
    return text


def main(argv: list[str] | None = None) -> None:
    arguments = parser("train", __doc__, repeats=5 if cuda() else 2, peers=PEERS)
    arguments.add_argument(
        "--depth", type=int, default=None if cuda() else 2, help="of tower and decoder (default: all, on the CPU 2)"
    )
    arguments.add_argument("--text", type=int, default=TRAIN[1] if cuda() else 128, help="tokens of text around the pictures")
    options = arguments.parse_args(argv)
    grids = TRAIN[0] if cuda() else TRAIN[0][:1]
    model = build(options.depth)
    row = race(model, grids, options.text, chosen(options, PEERS), options.repeats)
    for line in lines(row):
        say(options, line)
    publish(f"train_{'cuda' if cuda() else 'cpu'}", options, [row], ceilings=ceilings())


if __name__ == "__main__":
    main()
