"""What a nano checkpoint can do: greedy answers on pictures of the test range, and the model card made from them."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..chat import Processor
from ..model import Qwen2VL
from .data import conversation
from .pictures import COLORS, MAX_COUNT, QUESTIONS, SHAPES, TASKS, TEST_SEEDS, Sample, generate
from .state import write_json

BATCH = 50
MAX_NEW_TOKENS = 24
DTYPES = ("float32", "bfloat16")


def unseen(task: str, count: int, first: int = 0) -> list[Sample]:
    """`count` samples of the test of a task, from the one with index `first` on."""
    return [generate(task, seed) for seed in TEST_SEEDS[first : first + count]]


def answer(model: Qwen2VL, processor: Processor, samples: Sequence[Sample]) -> list[str]:
    """Greedy answers, through the same preprocessing, template and generation as any other conversation."""
    answers: list[str] = []
    for start in range(0, len(samples), BATCH):
        inputs = processor([conversation(sample, answered=False) for sample in samples[start : start + BATCH]])
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        for row in output[:, inputs["input_ids"].shape[1] :]:
            answers.append(processor.decode(row))
    return answers


def _shares(samples: Sequence[Sample], right: Sequence[bool], key: Any) -> dict[str, float]:
    groups: dict[str, list[bool]] = {}
    for sample, good in zip(samples, right, strict=True):
        groups.setdefault(key(sample), []).append(good)
    return {name: round(sum(group) / len(group), 4) for name, group in sorted(groups.items())}


def score(task: str, samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Any]:
    """How many answers are exactly right, and the shares by what was asked and shown."""
    right = [sample.answer == said for sample, said in zip(samples, answers, strict=True)]
    result: dict[str, Any] = {"samples": len(samples), "right": sum(right), "accuracy": round(sum(right) / len(right), 4)}
    result["by_question"] = _shares(samples, right, lambda sample: sample.question)
    if task == "count":
        result["by_count"] = _shares(samples, right, lambda sample: sample.answer)
    if task == "name":
        words = [said.split() for said in answers]
        result["color_right"] = round(sum(s.shapes[0].color in w for s, w in zip(samples, words, strict=True)) / len(right), 4)
        result["shape_right"] = round(sum(s.shapes[0].shape in w for s, w in zip(samples, words, strict=True)) / len(right), 4)
    if task in ("name", "shape"):
        result["by_shape"] = _shares(samples, right, lambda sample: sample.shapes[0].shape)
    if task in ("name", "color"):
        result["by_color"] = _shares(samples, right, lambda sample: sample.shapes[0].color)
    return result


def evaluate(checkpoint: Path, *, samples: int = 1000) -> dict[str, Any]:
    """Measure every task computing in float32 and in bfloat16 (the weights are bfloat16); writes eval.json there too."""
    if not 0 < samples <= len(TEST_SEEDS):
        raise ValueError(f"samples: expected 1 to {len(TEST_SEEDS)}, got {samples}")
    processor = Processor.from_pretrained(checkpoint)
    result: dict[str, Any] = {
        "command": f"python -m qwen2vl_fast.training.nano eval CHECKPOINT --samples {samples}",
        "seeds": [TEST_SEEDS.start, TEST_SEEDS.start + samples],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tasks": {},
    }
    data = {task: unseen(task, samples) for task in TASKS}
    for dtype in DTYPES:
        model = Qwen2VL.from_pretrained(checkpoint, device="cpu", dtype=getattr(torch, dtype))
        for task, shown in data.items():
            result["tasks"].setdefault(task, {})[dtype] = score(task, shown, answer(model, processor, shown))
    write_json(checkpoint / "eval.json", result)
    return result


def write_card(checkpoint: Path) -> None:
    """README.md of a checkpoint from its training.json and eval.json."""
    facts, measured = (json.loads((checkpoint / name).read_text(encoding="utf-8")) for name in ("training.json", "eval.json"))
    (checkpoint / "README.md").write_text(_card(facts, measured), encoding="utf-8")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


_CHANGES = ("step", "steps", "tower_steps", "lr")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _card(facts: dict[str, Any], measured: dict[str, Any]) -> str:
    tasks, recipe = measured["tasks"], facts["recipe"]
    name, numbers = tasks["name"]["float32"], tasks["count"]["float32"]["by_count"]
    count = name["samples"]
    margin = f"{196 * math.sqrt(0.9 * 0.1 / count):.1f}"
    parameters, cooldown = f"{facts['parameters'] / 1e6:.2f}", f"{100 * recipe['cooldown']:.0f}"
    colors, shapes = (_percent(name[key]) for key in ("color_right", "shape_right"))
    since, tower_lr, lr = facts["whole_since"], recipe["tower_lr"], recipe["lr"]
    decay, clip, batch, warmup = (recipe[key] for key in ("weight_decay", "clip", "batch", "warmup"))
    table = [
        _row(task, " / ".join(QUESTIONS[task]), *(_percent(tasks[task][dtype]["accuracy"]) for dtype in DTYPES))
        for task in tasks
    ]
    history = [
        _row(*(str(call[key]) for key in _CHANGES), " / ".join(f"{share:.0%}" for share in call["shares"].values()))
        for call in facts["history"]
    ]
    return f"""---
license: apache-2.0
---
# nano

A Qwen2-VL of {parameters} million parameters in the released checkpoint format, trained from random weights by
qwen2vl_fast on pictures that qwen2vl_fast draws. It exists so that the package can be tried and tested without a download.
It knows the tasks below and nothing else: any other picture or question gets an answer in their form that means nothing.

## What it does

Accuracy on {count} unseen pictures a task. An answer counts when every character is right; decoding is greedy.

{_row("task", "questions", *DTYPES)}
{_row(*["---"] * (2 + len(DTYPES)))}
{chr(10).join(table)}

Counting (float32) by the number of shapes in the picture:

{_row("shapes", *numbers)}
{_row(*["---"] * (1 + len(numbers)))}
{_row("right", *map(_percent, numbers.values()))}

Naming (float32): the color is right in {colors} of the answers, the shape in {shapes}.
With {count} pictures chance alone moves a figure near 90 % by up to {margin} points (95 % interval).

Measured by `{measured["command"]}`
(torch {measured["torch"]}, CPU). All figures, also by question, color and shape, are in eval.json.

## Data

`qwen2vl_fast/training/pictures.py` draws them from a seed:
{", ".join(SHAPES)} in {", ".join(COLORS)},
in many shades, sizes, angles and places, over plain or graded backgrounds with noise and faint lines. Sides are 56, 84 or
112 px each; in one picture of sixteen one side may be 140 or 168 px. For counting there are 1 to {MAX_COUNT} shapes that do not
touch; for the other tasks there is one. Training, validation and test have disjoint ranges of seeds.

## Training

Two stages: the vision tower alone, with linear readings of number, color and shape from the mean of a picture's visual
tokens, up to step {since}; then the whole model on conversations, where the loss counts only what the assistant says and
its `<|im_end|>`. A curriculum goes from few shapes on plain grey to the whole range. Muon for the matrices and AdamW for
the rest, weight decay {decay}, gradient norm clipped at {clip}, batches of {batch} pictures. Learning rate {tower_lr}
for the tower and {lr} for the whole, after {warmup} steps of warmup, falling to zero over the last {cooldown} % of the
steps; compute in {recipe["dtype"]}, weights and moments in float32.

| steps | pictures | minutes | hardware |
| --- | --- | --- | --- |
| {facts["step"]} | {facts["pictures"]} | {facts["minutes"]} | {facts["threads"]} thread of a 2-core {facts["processor"]} |

The minutes are wall-clock time on a machine that did other work too; the weights are stored in bfloat16. To train another:
`python -m qwen2vl_fast.training.nano train --out runs/nano`. The run of this checkpoint was stopped and resumed with other
settings where this table has more than one row (shares are those of {", ".join(facts["history"][0]["shares"])} in a batch):

{_row("from step", "last step", "tower steps", "learning rate", "shares")}
{_row(*["---"] * 5)}
{chr(10).join(history)}

## Tokens and template

Token ids 0 to 255 are the bytes of UTF-8; the special tokens of Qwen2-VL follow. The chat template adds no default system
turn, which would cost 48 tokens here; nano was trained without one.
"""
