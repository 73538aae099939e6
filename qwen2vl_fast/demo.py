"""The demo: questions about the pictures that ship with the package, answers, and where the time went."""

from __future__ import annotations

import json
import re
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .chat import Processor
from .media import load_image
from .tokenizer import TextStream

PICTURES = Path(__file__).parent / "assets" / "pictures"


@dataclass(frozen=True)
class Picture:
    """A question of the demo: `sources` are paths of images, or lists of the paths of a clip's frames.

    `before` are earlier questions with their answers, `options` those of the media (min_pixels). `answer` is the right one.
    `nano` says whether nano was trained on pictures and questions of this kind.
    """

    name: str
    sources: tuple[Path | list[Path], ...]
    question: str
    answer: str
    nano: bool
    before: tuple[tuple[str, str], ...] = ()
    options: dict[str, int] = field(default_factory=dict)

    @property
    def messages(self) -> list[dict[str, Any]]:
        kinds = ["video" if isinstance(source, list) else "image" for source in self.sources]
        parts = [{"type": kind, kind: source, **self.options} for kind, source in zip(kinds, self.sources, strict=True)]
        messages: list[dict[str, Any]] = []
        for question, answer in (*self.before, (self.question, None)):
            content = [*([] if messages else parts), {"type": "text", "text": question}]
            messages.append({"role": "user", "content": content})
            messages += [] if answer is None else [{"role": "assistant", "content": answer}]
        return messages


@dataclass
class Run:
    """One answer, and the seconds of each stage; the stages do not overlap and sum to the whole.

    preprocess: files and text to patch rows and token ids. tower: patch rows to visual tokens. prefill: the rest of the
    time to the first token. decode: all further tokens.
    """

    text: str
    prompt: int
    tokens: int
    patches: int
    preprocess: float
    tower: float
    prefill: float
    decode: float


class _TowerTimer:
    """Counts the seconds inside a vision tower while it is entered, whoever calls it and however often."""

    def __init__(self, tower: torch.nn.Module, clock: Callable[[], float]) -> None:
        self.seconds, self._tower, self._clock = 0.0, tower, clock

    def __enter__(self) -> _TowerTimer:
        self._hooks = [self._tower.register_forward_pre_hook(self._before), self._tower.register_forward_hook(self._after)]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, *_: object) -> None:
        self.seconds -= self._clock()

    def _after(self, *_: object) -> None:
        self.seconds += self._clock()


def pictures(folder: Path = PICTURES) -> list[Picture]:
    """The pictures that pictures.json lists."""
    result = []
    for entry in json.loads((folder / "pictures.json").read_text(encoding="utf-8")):
        paths = [folder / file for file in entry["files"]]
        sources = tuple(sorted(path.glob("*.png")) if path.is_dir() else path for path in paths)
        before = tuple(map(tuple, entry.get("before", ())))
        name, options = " and ".join(entry["files"]), entry.get("options", {})
        result.append(Picture(name, sources, entry["question"], entry["answer"], entry["nano"], before, options))
    return result


def ask(model: Any, processor: Processor, messages: list[dict[str, Any]], *, max_new_tokens: int) -> Run:
    """The answer to a conversation, each stage timed."""

    def clock() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter()

    start = clock()
    inputs = processor(messages, max_length=model.config.text.max_position_embeddings)
    text, ids = TextStream(processor.tokenizer, skip_special_tokens=False), []
    ready = first = last = clock()
    with _TowerTimer(model.visual, clock) as tower:
        for token in model.stream(
            **{name: value.to(model.device) for name, value in inputs.items()}, max_new_tokens=max_new_tokens, seed=0
        ):
            ids.append(int(token))
            last = clock()
            first = last if len(ids) == 1 else first
    grids = [inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs]
    return Run(
        text="".join([*(text.push(i) for i in ids if i not in model.config.generation.eos_token_id), text.finish()]),
        prompt=inputs["input_ids"].shape[1],
        tokens=len(ids),
        patches=sum(int(grid.prod(1).sum()) for grid in grids),
        preprocess=ready - start,
        tower=tower.seconds,
        prefill=first - ready - tower.seconds,
        decode=last - first,
    )


def duration(seconds: float) -> str:
    """0.0123 -> '12.3 ms', 3.21 -> '3.21 s': three digits."""
    value, unit = (seconds, "s") if seconds >= 0.9995 else (seconds * 1e3, "ms")
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"


def size(source: Path | list[Path]) -> str:
    """'width x height px' of a picture, with the number of frames of a clip."""
    image = load_image(source[0] if isinstance(source, list) else source)
    frames = f"{len(source)} frames of " if isinstance(source, list) else ""
    return f"{frames}{image.width} x {image.height} px"


def agrees(said: str, answer: str) -> bool:
    """Whether an answer of nano is right: every character, or for a box the name and an overlap of at least half (IoU)."""
    from .training.tasks import overlap

    name, box, corners = answer.partition("<|box_start|>")
    if not box:
        return said.strip() == answer
    return said.startswith(name + box) and overlap(said, [int(n) for n in re.findall(r"\d+", corners)]) >= 0.5


def timings(run: Run) -> str:
    """The line of times: preprocessing, tower, prefill, decode."""
    decode = "no further token"
    if run.tokens > 1:
        rate = (run.tokens - 1) / run.decode
        decode = f"decode {duration(run.decode)} for {run.tokens - 1} more, {rate:.3g} tokens/s"
    return (
        f"preprocess {duration(run.preprocess)}, tower {duration(run.tower)}, "
        f"prefill {duration(run.prefill)} for {run.prompt} tokens, {decode}"
    )


def show(model: Any, processor: Processor, *, nano: bool, max_new_tokens: int, write: Callable[[str], None]) -> None:
    """Asks every question and writes what came.

    Args:
        nano: the model is the embedded one: its own tasks are marked right or wrong, other pictures as beyond its training.
        write: prints a line.
    """
    shown = pictures()
    # The first run of a process pays for lazy initialisation, which is no stage of the model.
    ask(model, processor, shown[0].messages, max_new_tokens=2)
    write("One run each, after a warm-up. The four stages of a run do not overlap.")
    marks = []
    for picture in shown:
        run = ask(model, processor, picture.messages, max_new_tokens=max_new_tokens)
        verdict = f"(expected: {picture.answer})"
        if nano and picture.nano:
            marks.append(agrees(run.text, picture.answer))
            verdict = "right" if marks[-1] else f"wrong {verdict}"
        elif nano:
            verdict = f"(beyond nano's training: only tokens and times mean something; expected: {picture.answer})"
        write("")
        sizes = " and ".join(map(size, picture.sources))
        write(f"{picture.name}: {sizes}, {run.patches} patches, {run.patches // 4} visual tokens")
        for question, answer in picture.before:
            write(f"  before      {question} {answer}")
        write(f"  question    {picture.question}")
        lines = textwrap.wrap(" ".join(run.text.split()), 100) or ["(no text)"]
        for i, line in enumerate(lines):
            write(f"  {'' if i else 'answer':<10}  {line}")
        write(f"  {'':<10}  {verdict}")
        write(f"  time        {timings(run)}")
    if marks:
        write("")
        write(f"nano's own tasks: {sum(marks)} of {len(marks)} right")
