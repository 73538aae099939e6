"""What nano learns: a seeded generator of conversations about small pictures and clips, each with one right answer.

A sample is a function of (task, seed, level) alone. Training, validation and test draw their seeds from three disjoint ranges,
so that no picture of the test was ever trained on. Sides are multiples of 28 px: nothing is resized on the way to the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import lettering, shapes
from .shapes import COLORS, SHAPES, Placed

TRAIN_SEEDS = range(2**40)
VALIDATION_SEEDS = range(2**40, 2**40 + 2**20)
TEST_SEEDS = range(2**41, 2**41 + 2**20)

MAX_COUNT = 9
# A task goes to its next level of difficulty at this validation accuracy.
PROMOTE = 0.4
VALIDATION_SAMPLES = 32
IGNORE = -100
DIRECTIONS = ("left", "right", "up", "down")
# What is known of each visual token (a cell of 28 x 28 px of a frame pair), and of each frame pair as a whole: the number
# of values of each column. char: the characters centred in the cell, from the left, 0 for none; index: the place of the
# first of them in the text; kind, color: of the shape there, 0 for none; centers: how many shapes are centred there.
CELL_COLUMNS = {"char0": 33, "char1": 33, "char2": 33, "index": 12, "kind": 7, "color": 10, "centers": 4}
PAIR_COLUMNS = {"count": MAX_COUNT + 1, "direction": len(DIRECTIONS)}


@dataclass(frozen=True)
class Medium:
    """An image uint8 [1,H,W,3] or a clip [N,H,W,3], N even, and what is known of its cells and frame pairs.

    cells: int64 [P * H/28 * W/28, len(CELL_COLUMNS)]. boxes: float32 [.., 4], left, top, right, bottom of the shape at the
    cell as shares of the sides, NaN for none. pairs: int64 [P, len(PAIR_COLUMNS)]. IGNORE where nothing is known.
    """

    frames: np.ndarray
    cells: np.ndarray
    boxes: np.ndarray
    pairs: np.ndarray

    @property
    def kind(self) -> str:
        return "image" if len(self.frames) == 1 else "video"

    @property
    def tokens(self) -> int:
        return len(self.cells)


@dataclass(frozen=True)
class Sample:
    """A conversation about media: turns are (question, answer); the last answer is the one that is judged."""

    task: str
    media: tuple[Medium, ...]
    turns: tuple[tuple[str, str], ...]
    # The judged box in thousandths, for IoU.
    box: tuple[int, int, int, int] | None = None
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def question(self) -> str:
        return self.turns[-1][0]

    @property
    def answer(self) -> str:
        return self.turns[-1][1]


def _pick(rng: np.random.Generator, items: Sequence) -> object:
    return items[int(rng.integers(len(items)))]


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _name(placed: Placed) -> str:
    return f"{placed.color} {placed.shape}"


# Scenes of shapes


def _medium(frames: np.ndarray, found: Sequence[Sequence[tuple[Placed, tuple[float, ...]]]], direction: int = IGNORE) -> Medium:
    """A medium of shapes; found: for each frame pair the shapes in it and their boxes in pixels."""
    rows, columns = frames.shape[1] // 28, frames.shape[2] // 28
    cells = np.full((len(found), rows, columns, len(CELL_COLUMNS)), IGNORE, dtype=np.int64)
    cells[..., 4:] = 0
    boxes = np.full((len(found), rows, columns, 4), np.nan, dtype=np.float32)
    pairs = np.full((len(found), len(PAIR_COLUMNS)), direction, dtype=np.int64)
    scale = np.array([frames.shape[2], frames.shape[1]] * 2, dtype=np.float32)
    middle_x, middle_y = np.arange(columns) * 28 + 14, (np.arange(rows) * 28 + 14)[:, None]
    for pair, shown in enumerate(found):
        pairs[pair, 0] = min(len(shown), MAX_COUNT)
        # A cell belongs to the shape that covers its middle, or else to the one that is centred in it.
        for by_center in (False, True):
            for placed, box in shown:
                row, column = min(int(placed.y) // 28, rows - 1), min(int(placed.x) // 28, columns - 1)
                if by_center:
                    place: object = (row, column)
                    cells[pair, row, column, 6] = min(3, cells[pair, row, column, 6] + 1)
                else:
                    place = np.hypot(middle_x - placed.x, middle_y - placed.y) < placed.radius
                cells[pair, ..., 4][place] = 1 + _KINDS.index(placed.shape)
                cells[pair, ..., 5][place] = 1 + _PAINTS.index(placed.color)
                boxes[pair][place] = np.array(box, dtype=np.float32) / scale
    return Medium(frames, cells.reshape(-1, len(CELL_COLUMNS)), boxes.reshape(-1, 4), pairs)


_KINDS, _PAINTS = [*SHAPES], [*COLORS]


# Small pictures are cheap lessons: half of the sides are 56 px.
_SIDES = (56, 56, 56, 84, 84, 112)


def _side(rng: np.random.Generator, level: int, sides: Sequence[int] = _SIDES) -> tuple[int, int]:
    """Height and width: one picture of 16 is larger at level 2, one of 96 much larger."""
    chance = rng.random() if level == 2 else 1.0
    if chance < 1 / 96:
        sides = (224, 280, 336)
    elif chance < 1 / 16:
        sides = (112, 140, 168)
    return int(_pick(rng, sides)), int(_pick(rng, sides))


def _scene(
    rng: np.random.Generator, level: int, names: Sequence[tuple[str, str]], places: Sequence[tuple[float, float, float]],
    size: tuple[int, int],
) -> tuple[Medium, list[Placed], list[tuple[int, int, int, int]]]:  # fmt: skip
    """A picture of shapes (color, kind) at places (x, y, radius)."""
    shades = {color: shapes.shade(rng, color) for color, _ in names}
    canvas = shapes.background(rng, *size, list(shades.values()), level)
    turns = (rng.random(len(names)) - 0.5) * 0.8
    found = [
        Placed(kind, color, shades[color], x, y, radius, float(turn))
        for (color, kind), (x, y, radius), turn in zip(names, places, turns, strict=True)
    ]
    boxes = [shapes.draw(canvas, placed) for placed in found]
    picture = shapes.finish(rng, canvas, level)[None]
    return _medium(picture, [list(zip(found, boxes, strict=True))]), found, boxes


def _names(rng: np.random.Generator, count: int, *, different: bool = False) -> list[tuple[str, str]]:
    """Colours and kinds: all different, or half of the time of one kind and half of the time of one or two colours."""
    if different:
        order = rng.permutation(len(_KINDS) * len(_PAINTS))[:count]
        return [(_PAINTS[i // len(_KINDS)], _KINDS[i % len(_KINDS)]) for i in order]
    one_kind, one_color = rng.random(2) < 0.5
    kinds = [_KINDS[i] for i in rng.integers(0, len(_KINDS), count)]
    paints = [_PAINTS[i] for i in rng.integers(0, len(_PAINTS), count)]
    return [(paints[0 if one_color else i % 2 if count > 1 else 0], kinds[0 if one_kind else i]) for i in range(count)]


def _random_scene(rng: np.random.Generator, level: int, count: int, *, different: bool = False, sides: Sequence[int] = _SIDES):
    size = _side(rng, level, sides)
    names = _names(rng, count, different=different)
    return _scene(rng, level, names, shapes.place(rng, count, *size), size)


def _count(rng: np.random.Generator, level: int) -> Sample:
    count = int(rng.integers(1, (4, 6, MAX_COUNT)[level] + 1))
    medium, _, _ = _random_scene(rng, level, count, sides=(84, 112) if count > 6 else _SIDES)
    return Sample("count", (medium,), ((_pick(rng, QUESTIONS["count"]), str(count)),), facts={"count": str(count)})


def _name_one(rng: np.random.Generator, level: int) -> Sample:
    medium, (first,), _ = _random_scene(rng, level, 1)
    question = _pick(rng, QUESTIONS["name"])
    answer = first.color if "color" in question else first.shape if "shape" in question else _article(_name(first))
    return Sample("name", (medium,), ((question, answer),), facts={"color": first.color, "shape": first.shape})


def grounding(name: str, box: Sequence[int]) -> str:
    """A name and its box, thousandths of the sides, in the grounding format of MODEL.md section 6."""
    left, top, right, bottom = box
    return f"<|object_ref_start|>{name}<|object_ref_end|><|box_start|>({left},{top}),({right},{bottom})<|box_end|>"


# Answers round to a pixel of the smallest pictures: digits below that can't be learned, and their noise drowns the rest.
BOX_STEP = 20


def _box(rng: np.random.Generator, level: int) -> Sample:
    count = int(rng.integers(1, (1, 2, 3)[level] + 1))
    medium, found, boxes = _random_scene(rng, level, count, different=True)
    height, width = medium.frames.shape[1:3]
    left, top, right, bottom = boxes[0]
    box = tuple(
        min(999, round(1000 * value / side)) for value, side in ((left, width), (top, height), (right, width), (bottom, height))
    )
    name = _name(found[0])
    said = tuple(min(1000 - BOX_STEP, BOX_STEP * round(value / BOX_STEP)) for value in box)
    return Sample("box", (medium,), ((f"Find the {name}.", grounding(name, said)),), box=box)


_BESIDE = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


def _relation(rng: np.random.Generator, level: int) -> Sample:
    """Shapes on two rows of two places: the neighbour of one in a direction, the only shape on that side of it.

    Two shapes, at the last level a third one; a fourth, or a third across the corner, would be a second answer.
    """
    height, width = (int(_pick(rng, _SIDES)) for _ in range(2))
    word = str(_pick(rng, [*_BESIDE]))
    down, across = _BESIDE[word]
    # The place asked about is such that its neighbour lies inside.
    row = int(rng.integers(2)) if down == 0 else (1 if down < 0 else 0)
    column = int(rng.integers(2)) if across == 0 else (1 if across < 0 else 0)
    taken = [(row, column), (row + down, column + across)]
    beside = (1 - row, column) if down == 0 else (row, 1 - column)
    taken += [beside] * int(rng.integers((0, 0, 1)[level], (1, 2, 2)[level]))
    places = []
    for y, x in taken:
        radius = min(height, width) / 4 * (0.6 + 0.3 * rng.random())
        slack_x, slack_y = width / 4 - radius, height / 4 - radius
        places.append((
            width * (x + 0.5) / 2 + slack_x * (rng.random() - 0.5),
            height * (y + 0.5) / 2 + slack_y * (rng.random() - 0.5),
            radius,
        ))  # fmt: skip
    medium, found, _ = _scene(rng, level, _names(rng, len(taken), different=True), places, (height, width))
    return Sample("relation", (medium,), ((f"What is {word} the {_name(found[0])}?", _article(_name(found[1]))),))


def _compare(rng: np.random.Generator, level: int) -> Sample:
    most = (4, 6, 6)[level]
    first = int(rng.integers(1, most + 1))
    second = int(rng.integers(1, most))
    second += second >= first
    media = tuple(_random_scene(rng, level, count, sides=(56, 84))[0] for count in (first, second))
    return Sample("compare", media, (("Which has more?", "first" if first > second else "second"),))


def _followup(rng: np.random.Generator, level: int) -> Sample:
    """Equal shapes: how many, what colour, what shape, in two turns."""
    count = int(rng.integers(1, (3, 5, 5)[level] + 1))
    size = _side(rng, level)
    name = (str(_pick(rng, _PAINTS)), str(_pick(rng, _KINDS)))
    medium, _, _ = _scene(rng, level, [name] * count, shapes.place(rng, count, *size), size)
    turns = {"How many shapes?": str(count), "What color?": name[0], "What shape?": name[1]}
    order = rng.permutation(3)[:2]
    return Sample("followup", (medium,), tuple([*turns.items()][i] for i in order))


# Text


def _string(rng: np.random.Generator, length: int) -> str:
    return "".join(lettering.ALPHABET[i] for i in rng.integers(0, len(lettering.ALPHABET), length))


SMALLEST_TYPE, LARGEST_TYPE = 18, 32
_LINE_SIZES = ((28, 112), (28, 112), (28, 112), (28, 140), (28, 168), (56, 56), (56, 84), (56, 112))


def _read(rng: np.random.Generator, level: int) -> Sample:
    """Levels 0 to 3: up to 2, 3, 4, 6 characters; level 4 two lines too, and larger pictures."""
    two = level == 4 and rng.random() < 0.25
    most = (2, 3, 4, 6, 6)[level]
    lines = [_string(rng, int(rng.integers(1, (4 if two else most) + 1))) for _ in range(1 + two)]
    chance = rng.random() if level == 4 else 1.0
    if chance < 1 / 96:
        height, width = (int(_pick(rng, (168, 224, 280, 336))) for _ in range(2))
    elif chance < 1 / 16:
        height, width = (int(_pick(rng, (84, 112, 140))) for _ in range(2))
    else:
        sizes = [size for size in _LINE_SIZES if not two or size[0] == 56]
        height, width = sizes[int(rng.integers(len(sizes)))]
    name = str(_pick(rng, lettering.FONTS))
    spacing = float(rng.integers(0, 3))
    room = height / len(lines)
    lines = [_fitting(line, name, spacing, width) for line in lines]
    largest = min(_largest(line, name, spacing, width, room) for line in lines)
    size = int(rng.integers(min(SMALLEST_TYPE, largest), largest + 1))
    color = None
    style = min(2, max(0, level - 1))
    while color is None:
        ink = rng.random(3).astype(np.float32) * 255 if level > 1 else np.full(3, rng.random() * 255, dtype=np.float32)
        if not 90 < ink @ _LUMA < 165:
            color = ink
    canvas = shapes.background(rng, height, width, [color], style)
    if abs(canvas.mean((0, 1)) @ _LUMA - color @ _LUMA) < 80:
        # Readable by brightness, not by hue alone.
        canvas = (
            255 - canvas
            if abs(255 - canvas.mean((0, 1)) @ _LUMA - color @ _LUMA) >= 80
            else np.full_like(canvas, 245 if color @ _LUMA < 128 else 10)
        )
    centers = []
    for number, line in enumerate(lines):
        w, top, bottom = lettering.extent(name, size, line, spacing)
        x = 1 + (width - w - 2) * rng.random()
        y = number * room + 1 + max(0.0, room - (bottom - top) - 2) * rng.random() - top
        centers += lettering.write(canvas, line, name, size, x, y, color, spacing)
    picture = shapes.finish(rng, canvas, style)
    medium = _lettered(picture[None], "".join(lines), centers, lines)
    return Sample(
        "read", (medium,), ((_pick(rng, QUESTIONS["read"]), "\n".join(lines)),), facts={"length": str(len("".join(lines)))}
    )


def _fits(line: str, name: str, size: int, spacing: float, width: int, room: float) -> bool:
    w, top, bottom = lettering.extent(name, size, line, spacing)
    return w + 4 <= width and bottom - top + 3 <= room


def _fitting(line: str, name: str, spacing: float, width: int) -> str:
    """The line, cut where the smallest type would leave the picture."""
    while not _fits(line, name, SMALLEST_TYPE, spacing, width, np.inf):
        line = line[:-1]
    return line


def _largest(line: str, name: str, spacing: float, width: int, room: float) -> int:
    """The largest size of type at which a line fits into width and room."""
    w, top, bottom = lettering.extent(name, 32, line, 0.0)
    size = min(int(32 * min(width / w, room / (bottom - top))) + 2, LARGEST_TYPE)
    while size > SMALLEST_TYPE and not _fits(line, name, size, spacing, width, room):
        size -= 1
    return size


_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def _lettered(frames: np.ndarray, text: str, centers: Sequence[tuple[float, float]], lines: Sequence[str]) -> Medium:
    rows, columns = frames.shape[1] // 28, frames.shape[2] // 28
    cells = np.full((rows, columns, len(CELL_COLUMNS)), IGNORE, dtype=np.int64)
    cells[..., :3] = 0
    taken = np.zeros((rows, columns), dtype=int)
    for index, (character, (x, y)) in enumerate(zip(text, centers, strict=True)):
        row, column = min(rows - 1, max(0, int(y) // 28)), min(columns - 1, max(0, int(x) // 28))
        slot = taken[row, column]
        if slot == 0:
            cells[row, column, 3] = index
        if slot < 3:
            cells[row, column, slot] = 1 + lettering.ALPHABET.index(character)
        taken[row, column] += 1
    boxes = np.full((rows * columns, 4), np.nan, dtype=np.float32)
    return Medium(frames, cells.reshape(-1, len(CELL_COLUMNS)), boxes, np.full((1, len(PAIR_COLUMNS)), IGNORE, dtype=np.int64))


# Clips


def _frames(rng: np.random.Generator, level: int) -> tuple[int, int, int]:
    """Number of frames, height and width: 4 to 16 frames, the longer the smaller."""
    count = int(2 * rng.integers(2, (4, 6, 9)[level]))
    sides = (56, 84) if count <= 8 else (56,)
    return count, int(_pick(rng, sides)), int(_pick(rng, sides))


def _motion(rng: np.random.Generator, level: int) -> Sample:
    """One shape that crosses the picture."""
    count, height, width = _frames(rng, level)
    ((color, kind),) = _names(rng, 1)
    rgb = shapes.shade(rng, color)
    canvas = shapes.background(rng, height, width, [rgb], level)
    radius = 8 + 7 * rng.random()
    way = int(rng.integers(4))
    long, short = (width, height) if way < 2 else (height, width)
    start, end = radius + 1, long - radius - 1
    travel = (end - start) * (0.6 + 0.4 * rng.random())
    start += (end - start - travel) * rng.random()
    across = radius + 1 + (short - 2 * radius - 2) * rng.random()
    along = start + travel * np.arange(count) / (count - 1)
    if DIRECTIONS[way] in ("left", "up"):
        along = along[::-1]
    frames, found = [], []
    for place in along:
        x, y = (place, across) if way < 2 else (across, place)
        frame = canvas.copy()
        placed = Placed(kind, color, rgb, float(x), float(y), radius, 0.0)
        found.append([(placed, shapes.draw(frame, placed))])
        frames.append(shapes.finish(rng, frame, level))
    medium = _medium(np.stack(frames), found[::2], way)
    return Sample("motion", (medium,), (("Which way does it move?", DIRECTIONS[way]),))


def _order(rng: np.random.Generator, level: int) -> Sample:
    """Two shapes, one after the other, for at least two frames each: which comes first, which last."""
    count, height, width = _frames(rng, level)
    names = _names(rng, 2, different=True)
    shades = {color: shapes.shade(rng, color) for color, _ in names}
    canvas = shapes.background(rng, height, width, list(shades.values()), level)
    change = 2 * int(rng.integers(1, count // 2))
    frames, found = [], []
    for which, (color, kind) in enumerate(names):
        ((x, y, radius),) = shapes.place(rng, 1, height, width)
        placed = Placed(kind, color, shades[color], x, y, radius, float(rng.random() - 0.5))
        for _ in range(change if which == 0 else count - change):
            frame = canvas.copy()
            found.append([(placed, shapes.draw(frame, placed))])
            frames.append(shapes.finish(rng, frame, level))
    last = int(rng.integers(2))
    color, kind = names[last]
    question = "What comes last?" if last else "What comes first?"
    return Sample("order", (_medium(np.stack(frames), found[::2]),), ((question, _article(f"{color} {kind}")),))


# Text alone


def _copy(rng: np.random.Generator, level: int) -> Sample:
    text = _string(rng, int(rng.integers(1, (4, 8, 12)[level] + 1)))
    return Sample("copy", (), ((f"Repeat: {text}", text),))


def _sum(rng: np.random.Generator, level: int) -> Sample:
    first, second = (int(n) for n in rng.integers(0, (6, 10, 20)[level] + 1, 2))
    return Sample("sum", (), ((f"{first}+{second}=", str(first + second)),))


QUESTIONS = {
    "read": ("Read the text.", "Read the text.", "Read the text.", "What does it say?"),
    "name": (
        "What is this?",
        "What do you see?",
        "What is this?",
        "What do you see?",
        "What color is it?",
        "What shape is it?",
    ),
    "count": ("How many shapes?", "Count the shapes."),
}
_GENERATORS: dict[str, Callable[[np.random.Generator, int], Sample]] = {
    "read": _read,
    "name": _name_one,
    "count": _count,
    "box": _box,
    "relation": _relation,
    "compare": _compare,
    "motion": _motion,
    "order": _order,
    "followup": _followup,
    "copy": _copy,
    "sum": _sum,
}
TASKS = tuple(_GENERATORS)
MAX_LEVEL = {task: 4 if task == "read" else 2 for task in TASKS}


def generate(task: str, seed: int, level: int | None = None) -> Sample:
    """The sample of a task for a seed.

    Args:
        task: one of TASKS.
        seed: a non-negative integer; the sample depends on nothing else but task and level.
        level: of difficulty, 0 to MAX_LEVEL[task]; None is the highest, at which the test is made.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {TASKS}, got {task!r}")
    level = MAX_LEVEL[task] if level is None else level
    if not 0 <= level <= MAX_LEVEL[task]:
        raise ValueError(f"level: expected 0 to {MAX_LEVEL[task]}, got {level}")
    return _GENERATORS[task](np.random.default_rng((seed, TASKS.index(task))), level)


_BOX = re.compile(r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>")


def overlap(said: str, box: Sequence[int]) -> float:
    """Intersection over union of the first box of a text and a box; 0 where the text has none."""
    found = _BOX.search(said)
    if found is None:
        return 0.0
    left, top, right, bottom = map(int, found.groups())
    inner = max(0, min(right, box[2]) - max(left, box[0])) * max(0, min(bottom, box[3]) - max(top, box[1]))
    areas = max(0, right - left) * max(0, bottom - top) + (box[2] - box[0]) * (box[3] - box[1])
    return inner / (areas - inner) if areas > inner else 0.0


def right(sample: Sample, said: str) -> bool:
    """Whether an answer is right: every character, or for a box the name, one box with an IoU of at least 0.5, no more."""
    if sample.box is None:
        return said == sample.answer
    name = sample.answer.split("<|box_start|>")[0]
    alone = said.startswith(name) and _BOX.fullmatch(said, len(name)) is not None
    return alone and overlap(said, sample.box) >= 0.5
