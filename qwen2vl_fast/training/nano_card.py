"""The model card of a nano checkpoint and the curves of its training, from training.json, eval.json and log.jsonl."""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import Any

from .lettering import ALPHABET, FONTS
from .shapes import COLORS, SHAPES
from .tasks import (
    BOX_STEP,
    LARGEST_TYPE,
    MAX_COUNT,
    MAX_LEVEL,
    PROMOTE,
    SMALLEST_TYPE,
    TASKS,
    TEST_SEEDS,
    VALIDATION_SAMPLES,
    generate,
)

LOG = "log.jsonl"
GOAL = 0.75
WHAT = {
    "read": "read 1 to 6 characters, in a quarter of the pictures two lines of up to 4",
    "name": "name colour and shape, or one of them",
    "count": f"count 1 to {MAX_COUNT} shapes",
    "box": "point at one of up to three shapes (IoU of at least 0.5)",
    "relation": "what stands beside, above or below a shape",
    "compare": "which of two pictures has more shapes (chance: half)",
    "motion": "the direction in a clip of 4 to 16 frames (chance: a quarter)",
    "order": "what comes first or last in such a clip",
    "followup": "a second question about the same picture",
    "copy": "repeat 1 to 12 characters, text alone",
    "sum": "add two numbers of 0 to 20, text alone",
}


def examples() -> dict[str, tuple[str, str]]:
    """Question and answer of the first sample of the test, by task."""
    return {task: generate(task, TEST_SEEDS[0]).turns[-1] for task in TASKS}


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [row(*head), row(*["---"] * len(head)), *(row(*cells) for cells in rows)]


def accuracy_table(measured: dict[str, Any]) -> list[str]:
    rows = [[task, WHAT[task], percent(found["accuracy"])] for task, found in measured["tasks"].items()]
    return table(["task", "what", "right"], [*rows, ["all", "", percent(measured["overall"])]])


def ways_table(measured: dict[str, Any]) -> list[str]:
    """How the other ways to compute answer: right, and word for word as float32, over all tasks; and where they differ most."""
    rows = []
    for name, tasks in measured["ways"].items():
        samples, correct, same = (sum(task[key] for task in tasks.values()) for key in ("samples", "right", "same"))
        worst = min(tasks, key=lambda task: tasks[task]["same"] / tasks[task]["samples"])
        least = f"{worst} {percent(tasks[worst]['same'] / tasks[worst]['samples'])}"
        rows.append([name, str(samples), percent(correct / samples), percent(same / samples), least])
    return table(["computed in, by", "samples", "right", "same answer as float32", "least same"], rows)


def read_log(checkpoint: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (checkpoint / LOG).read_text(encoding="utf-8").splitlines()]


def slopes(log: list[dict[str, Any]], measured: dict[str, Any]) -> list[list[str]]:
    """For each task short of GOAL the validation accuracy of the earlier and the later half of the points at its last level."""
    rows = []
    for task, found in measured["tasks"].items():
        points = [line for line in log if task in line["accuracy"] and line["levels"][task] == MAX_LEVEL[task]]
        if found["accuracy"] >= GOAL or len(points) < 2:
            continue
        cells = []
        for half in (points[: len(points) // 2], points[len(points) // 2 :]):
            share = sum(point["accuracy"][task] for point in half) / len(half)
            cells.append(f"{percent(share)} ({half[0]['samples']} to {half[-1]['samples']})")
        rows.append([task, *cells, percent(found["accuracy"])])
    return rows


def write_card(checkpoint: Path) -> None:
    """README.md of a checkpoint from its training.json, eval.json and log.jsonl."""
    facts, measured = (json.loads((checkpoint / name).read_text(encoding="utf-8")) for name in ("training.json", "eval.json"))
    (checkpoint / "README.md").write_text(_card(facts, measured, read_log(checkpoint)), encoding="utf-8")


_CHANGES = (
    "step", "steps", "text_steps", "tower_steps", "decoder_steps", "batch", "tower_batch", "readings", "tower_lr", "visual_lr",
    "lr", "adamw", "cooldown",
)  # fmt: skip


def _settings(call: dict[str, Any]) -> list[str]:
    shares = " ".join(f"{task} {100 * share:.0f}" for task, share in call["shares"]["whole"].items())
    return [*(str(call.get(key, "")) for key in _CHANGES), call["init"] or "", shares]


def _card(facts: dict[str, Any], measured: dict[str, Any], log: list[dict[str, Any]]) -> str:
    recipe, count = facts["recipe"], next(iter(measured["tasks"].values()))["samples"]
    margin = f"{196 * math.sqrt(0.8 * 0.2 / count):.1f}"
    lengths, numbers = measured["tasks"]["read"]["by_length"], measured["tasks"]["count"]["by_count"]
    first = facts["history"][0]
    begin = "with random weights"
    if first["init"]:
        begin = f"""not at random but with the weights of a {first["init"]} whose own run took {first["init_samples"]} samples
        and {first["init_minutes"]} minutes"""
    hardware = f"{facts['threads']} thread of a 2-core {facts['processor']}"
    short = slopes(log, measured)
    missed = [
        f"""The goal was 90 % over all and no task under {100 * GOAL:.0f} %. Where that is missed, this is how far it came and
        how it moved: validation answers ({VALIDATION_SAMPLES} a point, each token given the right ones before it, which the
        test does not give) at the task's last level of difficulty, earlier and later, with the training samples seen:""",
        table(["task", "earlier", "later", "test"], short),
    ]
    parts: list[str | list[str]] = [
        f"""A Qwen2-VL of {facts["parameters"] / 1e6:.2f} million parameters in the released checkpoint format, trained by
        qwen2vl_fast on pictures, clips and texts that it draws itself. It exists so that the package can be tried and tested
        without a download. It knows the tasks below and nothing else: anything else gets an answer in their form that means
        nothing.""",
        ["## What it does"],
        f"""Greedy answers to {count} unseen samples a task, in float32. An answer counts when every character is right; a box
        when the name is and the intersection over union is at least 0.5 (its numbers are taught
        in steps of {BOX_STEP} thousandths).""",
        accuracy_table(measured),
        f"""With {count} samples chance alone moves a figure near 80 % by up to {margin} points (95 % interval). Measured by
        `{measured["command"]}` (torch {measured["torch"]}, {measured["device"]}); eval.json has all figures.""",
        *(missed if short else []),
        "Reading by the number of characters, and counting by the number of shapes:",
        table(["characters", *lengths], [["right", *map(percent, lengths.values())]]),
        table(["shapes", *numbers], [["right", *map(percent, numbers.values())]]),
        "The first samples of each task, computed in other ways:",
        ways_table(measured),
        """transformers 5 gives what follows a clip with more frame pairs than rows and columns lower positions than the
        released models were trained with; patched by this package it does not.""",
        ["## What it is asked"],
        "The first sample of each task's test:",
        table(
            ["task", "question", "answer"], [[task, *(repr(text)[1:-1] for text in turn)] for task, turn in examples().items()]
        ),
        """Clips keep their size: give `min_pixels=784` with a small clip, for the default of 128 visual tokens a frame pair
        would enlarge it beyond what nano was trained on.""",
        ["## Data"],
        f"""`qwen2vl_fast/training/tasks.py` makes it from a seed; training, validation and test have disjoint ranges of seeds.
        Shapes are {", ".join(SHAPES)} in {", ".join(COLORS)}, in many shades, sizes, angles and places, over plain or graded
        backgrounds with noise and faint lines. Text is of the characters {ALPHABET}, {SMALLEST_TYPE} to {LARGEST_TYPE} px
        high, in {len(FONTS)} fonts that matplotlib ships ({", ".join(FONTS)}). Half of the sides are 56 px, the others 84 or
        112 (text also 28 px high and up to 168 wide); one picture of sixteen is up to 168 px, one of a hundred up to 336 px.
        The sums and the shortest texts of the test are so few that training has seen them.""",
        ["## Training"],
        f"""Four stages. Text: the decoder alone on copying and sums. Tower: the vision tower alone, the decoder frozen; the
        loss is that of linear readings of every visual token (the characters, the shape, colour and box at its place) and of
        the mean of a picture's tokens (number, motion). Whole: everything on conversations, where the loss counts what the
        assistant says and its `<|im_end|>`, and {recipe["probe"]} times the readings' loss, with {recipe["readings"]} further
        pictures a step that are only read. Decoder: the decoder alone, the
        tower frozen. The difficulty of a task rises when {100 * PROMOTE:.0f} % of its validation answers are right.
        Muon for the matrices and AdamW for the rest, weight decay {recipe["weight_decay"]}, gradient norm clipped at
        {recipe["clip"]}; learning rates after {recipe["warmup"]} steps of warmup, falling to zero over the last
        {100 * recipe["cooldown"]:.0f} % of the steps; AdamW's
        is {recipe["adamw"]} of Muon's; {recipe["dtype"]}.""",
        table(
            ["steps", "samples", "minutes", "hardware"], [[*(str(facts[k]) for k in ("step", "samples", "minutes")), hardware]]
        ),
        f"""The minutes are wall-clock time on a machine that did other work too; weights are stored in bfloat16. From scratch:
        `qwen2vl-fast train nano --out runs/nano --minutes 300 --threads 1`, which has not been run in one go. This checkpoint's
        run began {begin}, and was stopped and resumed with other settings (and easier or harder data) where this table has more
        than one row; a setting that did not exist yet is blank, shares are percent of the samples in the stage "whole".""",
        table([*map(_spaced, _CHANGES), "weights from", "shares"], [_settings(call) for call in facts["history"]]),
        "![accuracy by task](curves.png)",
        f"""Levels of difficulty reached in training, of the highest, at which the test is made:
        {", ".join(f"{task} {level} of {MAX_LEVEL[task]}" for task, level in facts["levels"].items())}.""",
        ["## Tokens and template"],
        """Token ids 0 to 255 are the bytes of UTF-8; the special tokens of Qwen2-VL follow. The chat template adds no default
        system turn, which would cost 48 tokens here; nano was trained without one.""",
    ]
    blocks = [textwrap.fill(" ".join(part.split()), 120) if isinstance(part, str) else "\n".join(part) for part in parts]
    return "---\nlicense: apache-2.0\n---\n# nano\n\n" + "\n\n".join(blocks) + "\n"


def _spaced(name: str) -> str:
    return {"step": "from step", "steps": "last step", "lr": "learning rate", "tower_lr": "tower rate"}.get(
        name, name.replace("_", " ")
    )


def draw_curves(checkpoint: Path) -> None:
    """curves.png: the accuracy of every task and reading over the run, from log.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    log = read_log(checkpoint)
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 7), dpi=75, sharex=True, layout="constrained")
    colors = pyplot.get_cmap("tab20").colors
    readings = {
        "read.char0": "1st character",
        "read.char1": "2nd",
        "count.count": "number",
        "name.kind": "shape",
        "motion.direction": "motion",
    }
    for axes, names, title in (
        (above, {task: task for task in TASKS}, "validation answers, at the level reached"),
        (below, readings, "readings of visual tokens in the stage tower"),
    ):
        for color, (key, label) in zip(colors, names.items(), strict=False):
            points = [(line["minutes"], line["accuracy"][key]) for line in log if key in line["accuracy"]]
            axes.plot(*zip(*points, strict=True), label=label, color=color) if points else None
        axes.set(ylim=(0, 1.02), title=title, ylabel="share right")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    begin = {}
    for line in log:
        begin.setdefault(line["stage"], line["minutes"])
    for stage, minutes in begin.items():
        above.axvline(minutes, color="0.8", zorder=0)
        above.annotate(stage, (minutes, 1.0), fontsize=8, rotation=90, va="top")
    below.set_xlabel("minutes")
    figure.savefig(checkpoint / "curves.png")
    pyplot.close(figure)
