"""What a nano checkpoint can do: greedy answers on samples of the test range, in every dtype and through every path.

The table is measured in float32. The other ways to compute answer a part of the same samples: how many are right, and how many
are word for word what float32 said.
"""

from __future__ import annotations

import importlib.util
import inspect
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..chat import Processor
from ..model import Qwen2VL
from .data import conversation
from .state import write_json
from .tasks import TASKS, TEST_SEEDS, Sample, generate, right

BATCH = 50
MAX_NEW_TOKENS = 48
SAMPLES, COMPARED = 1000, 50
Answers = dict[str, list[str]]


def unseen(task: str, count: int, first: int = 0) -> list[Sample]:
    """`count` samples of the test of a task, from the one with index `first` on."""
    return [generate(task, seed) for seed in TEST_SEEDS[first : first + count]]


def answer(model: Any, processor: Processor, samples: Sequence[Sample]) -> list[str]:
    """Greedy answers, through the same preprocessing, template and generation as any other conversation.

    model: a Qwen2VL, or a transformers model, patched or not. Special tokens other than the end are kept: boxes need them.
    """
    answers: list[str] = []
    for start in range(0, len(samples), BATCH):
        inputs = processor([conversation(sample, answered=False) for sample in samples[start : start + BATCH]])
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # transformers 5
            inputs["mm_token_type_ids"] = token_types(inputs["input_ids"], processor)
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        for row in output[:, inputs["input_ids"].shape[1] :]:
            answers.append(processor.decode(row, False).split("<|im_end|>")[0])
    return answers


def token_types(input_ids: torch.Tensor, processor: Processor) -> torch.Tensor:
    """What transformers 5 finds the media of a prompt by: 1 where an image stands, 2 where a video does."""
    return (input_ids == processor.image_token_id).long() + 2 * (input_ids == processor.video_token_id).long()


def score(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Any]:
    """How many answers are right, and the shares by what was asked for and shown."""
    marks = [right(sample, said) for sample, said in zip(samples, answers, strict=True)]
    result: dict[str, Any] = {"samples": len(samples), "right": sum(marks), "accuracy": round(sum(marks) / len(marks), 4)}
    for fact in samples[0].facts:
        groups: dict[str, list[bool]] = {}
        for sample, good in zip(samples, marks, strict=True):
            groups.setdefault(sample.facts[fact], []).append(good)
        result[f"by_{fact}"] = {name: round(sum(group) / len(group), 4) for name, group in sorted(groups.items())}
    return result


def ways(checkpoint: Path, device: str) -> dict[str, Callable[[], Any]]:
    """The other ways to compute: name -> a function that loads the model."""

    def ours(dtype: torch.dtype, backend: str | None = None) -> Any:
        return Qwen2VL.from_pretrained(checkpoint, device=device, dtype=dtype, backend=backend)

    def transformers(patched: bool) -> Any:
        from transformers import Qwen2VLForConditionalGeneration

        model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint).float().to(device).eval()
        if patched:
            from .. import patch

            patch(model)
        return model

    found = {
        "bfloat16": lambda: ours(torch.bfloat16),
        "float16": lambda: ours(torch.float16),
        "from_transformers": lambda: Qwen2VL.from_transformers(transformers(False)),
        "transformers": lambda: transformers(False),
        "patched transformers": lambda: transformers(True),
    }
    if device == "cuda":
        found["torch backend"] = lambda: ours(torch.float32, backend="torch")
    without = ("bfloat16", "float16", "torch backend")
    return found if importlib.util.find_spec("transformers") else {name: found[name] for name in without if name in found}


def compare(model: Any, processor: Processor, data: dict[str, list[Sample]], said: Answers) -> dict[str, dict[str, int]]:
    """By task how many of the samples a model answers, gets right, and answers as in `said`."""
    result = {}
    for task, samples in data.items():
        answers = answer(model, processor, samples)
        same = sum(one == other for one, other in zip(answers, said[task], strict=False))
        result[task] = {"samples": len(samples), "right": sum(map(right, samples, answers)), "same": same}
    return result


def evaluate(
    checkpoint: Path, *, samples: int = SAMPLES, compared: int = COMPARED, backend: str | None = None, out: Path | None = None
) -> dict[str, Any]:
    """Measure every task in float32, then the other ways on the first of the samples; writes `out` or eval.json.

    Args:
        samples: of each task. compared: how many of them the other ways answer; 0 leaves them out.
        backend: of the ops in float32; None is the fastest.
    """
    if not 0 < samples <= len(TEST_SEEDS):
        raise ValueError(f"samples: expected 1 to {len(TEST_SEEDS)}, got {samples}")
    if not 0 <= compared <= samples:
        raise ValueError(f"compare: expected 0 to {samples}, got {compared}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = Processor.from_pretrained(checkpoint)
    data = {task: unseen(task, samples) for task in TASKS}
    started = time.perf_counter()
    model = Qwen2VL.from_pretrained(checkpoint, device=device, dtype=torch.float32, backend=backend)
    said = {task: answer(model, processor, shown) for task, shown in data.items()}
    tasks = {task: score(data[task], answers) for task, answers in said.items()}
    command = f"qwen2vl-fast eval nano --samples {samples} --compare {compared}"
    result: dict[str, Any] = {
        "command": command + (f" --backend {backend}" if backend else ""),
        "seeds": [TEST_SEEDS.start, TEST_SEEDS.start + samples],
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "overall": round(sum(task["right"] for task in tasks.values()) / (samples * len(tasks)), 4),
        "seconds": round(time.perf_counter() - started, 1),
        "tasks": tasks,
        "ways": {},
    }
    if compared:
        first = {task: shown[:compared] for task, shown in data.items()}
        for name, load in ways(checkpoint, device).items():
            result["ways"][name] = compare(load(), processor, first, said)
    write_json(out or checkpoint / "eval.json", result)
    return result
