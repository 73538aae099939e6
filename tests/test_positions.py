"""Positions against the oracle, and against transformers apart from the rule that MODEL.md overrules."""

from __future__ import annotations

import functools
import inspect
import itertools
import random
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import transformers
from torch import Tensor

from qwen2vl_fast import positions
from tests import oracle

START, IMAGE, VIDEO, PAD = 151652, 151655, 151656, 151643
OLD_TRANSFORMERS = int(transformers.__version__.split(".")[0]) < 5
PADDING = ("none", "left", "right", "scattered")


class Batch(NamedTuple):
    ids: list[list[int]]
    images: list[list[int]]
    videos: list[list[int]]
    mask: list[list[int]]

    def arguments(self, device: str = "cpu") -> dict[str, Tensor | None]:
        grids = [torch.tensor(g, device=device) if g else None for g in (self.images, self.videos)]
        return {
            "input_ids": torch.tensor(self.ids, device=device).view(len(self.ids), -1),
            "image_grid_thw": grids[0],
            "video_grid_thw": grids[1],
            "attention_mask": torch.tensor(self.mask, device=device).view(len(self.ids), -1),
        }

    def oracle(self, largest_axis: str = "all") -> tuple[Tensor, Tensor]:
        tokens = {"image_token": IMAGE, "video_token": VIDEO, "largest_axis": largest_axis}
        found, deltas = oracle.mrope_positions(self.ids, self.images, self.videos, self.mask, **tokens)
        return torch.tensor(found).view(len(self.ids), -1, 3).permute(2, 0, 1), torch.tensor(deltas)


def random_batch(seed: int, padding: str, kinds: str = "tiv", frames: int = 3, separated: bool = True) -> Batch:
    """Sequences of text (t), images (i) and videos (v) in any order; with separated False also without tokens between media."""
    rng = random.Random(f"{seed} {padding} {kinds}")
    rows, images, videos = [], [], []
    for _ in range(rng.randint(1, 4)):
        row: list[int] = []
        for kind in (rng.choice(kinds) for _ in range(rng.randint(1, 5))):
            if kind == "t":
                row += [rng.randrange(1000) for _ in range(rng.randint(1, 6))]
                continue
            grid = [rng.randint(1, frames) if kind == "v" else 1, 2 * rng.randint(1, 4), 2 * rng.randint(1, 4)]
            (images if kind == "i" else videos).append(grid)
            row += [START] if separated or rng.random() < 0.5 else []
            row += [IMAGE if kind == "i" else VIDEO] * (grid[0] * grid[1] * grid[2] // 4)
        rows.append(row)
    ids, mask = [], []
    length = max(map(len, rows)) + (0 if padding == "none" else rng.randint(0, 3))
    for row in rows:
        gap = length - len(row)
        if padding == "none":  # sequences are filled up with text
            row, gap = row + [5] * gap, 0
        spots = {"left": [0] * gap, "right": [len(row)] * gap, "none": []}.get(padding)
        if spots is None:
            spots = sorted(rng.randint(0, len(row)) for _ in range(gap))
        real = [1] * len(row)
        for spot in reversed(spots):  # padding may hold a placeholder's id: it is no placeholder
            row = row[:spot] + [rng.choice((PAD, IMAGE))] + row[spot:]
            real = real[:spot] + [0] + real[spot:]
        ids.append(row)
        mask.append(real)
    return Batch(ids, images, videos, mask)


def check_mrope_positions(seed: int, padding: str, kinds: str = "tiv", device: str = "cpu", positions=positions) -> None:
    batch = random_batch(seed, padding, kinds, separated=False)
    found, deltas = positions.mrope_position_ids(**batch.arguments(device))
    expected, expected_deltas = batch.oracle()
    what = f"seed={seed} padding={padding!r} kinds={kinds!r}"
    assert found.dtype == deltas.dtype == torch.int64 and found.device.type == device
    assert torch.equal(found.cpu(), expected), what
    assert torch.equal(deltas.cpu(), expected_deltas), what


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kinds", ["t", "i", "v", "ti", "tv", "iv", "tiv"])
def test_mrope_positions(padding, kinds, device):
    for seed in range(6):
        check_mrope_positions(seed, padding, kinds, device)


@pytest.mark.full
def test_mrope_positions_many(device):
    for seed in range(3000):
        check_mrope_positions(seed, PADDING[seed % 4], device=device)


@functools.cache
def transformers_positions():
    """transformers' get_rope_index, which reads nothing of the model but a few numbers of its config."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    vision = SimpleNamespace(spatial_merge_size=2)
    config = SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_config=vision)
    model = SimpleNamespace(config=config)
    if not OLD_TRANSFORMERS:
        model.get_vision_position_ids = functools.partial(Qwen2VLModel.get_vision_position_ids, model)
    takes = inspect.signature(Qwen2VLModel.get_rope_index).parameters

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        arguments = batch.arguments()
        ids = arguments["input_ids"]
        types = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        extra = {"mm_token_type_ids": types} if "mm_token_type_ids" in takes else {}
        found, deltas = Qwen2VLModel.get_rope_index(model, **arguments, **extra)
        return found, deltas.flatten()

    return run


def check_transformers(seed: int, padding: str, kinds: str, frames: int) -> None:
    """transformers 4.x follows MODEL.md; 5.x follows the oracle with the advance by the larger side, and nothing else."""
    batch = random_batch(seed, padding, kinds, frames)
    real = torch.tensor(batch.mask).bool()
    theirs, their_deltas = transformers_positions()(batch)
    rule = "all" if OLD_TRANSFORMERS else "sides"
    expected, deltas = batch.oracle(rule)
    assert torch.equal(theirs[:, real], expected[:, real]), f"seed={seed}"
    if not OLD_TRANSFORMERS:  # 4.x counts padding into the delta; MODEL.md says which is right
        assert torch.equal(their_deltas, deltas), f"seed={seed}"
    ours, our_deltas = positions.mrope_position_ids(**batch.arguments())
    longest = max((t - max(h, w) // 2 for t, h, w in batch.videos), default=0)
    if longest <= 0:  # no video has more frame pairs than rows and columns: the rules agree
        assert torch.equal(ours[:, real], theirs[:, real]), f"seed={seed}"
        assert OLD_TRANSFORMERS or torch.equal(our_deltas, their_deltas), f"seed={seed}"


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kinds", ["ti", "tv", "tiv"])
def test_transformers(padding, kinds):
    for seed in range(8):
        check_transformers(seed, padding, kinds, frames=1 + seed % 4 * 2)


@pytest.mark.full
def test_transformers_many():
    for seed in range(2000):
        check_transformers(seed, PADDING[seed % 3], ("ti", "tv", "tiv")[seed // 3 % 3], frames=1 + seed % 7)


def test_the_stated_exception():
    """Grid 10 x 4 x 4 starting at 2: text follows at 12; at 4 in transformers 5.x, whose ids then overlap the video's."""
    batch = Batch([[7, START] + [VIDEO] * 40 + [8, 9]], [], [[10, 4, 4]], [[1] * 44])
    ours, deltas = positions.mrope_position_ids(**batch.arguments())
    assert ours[:, 0, 2].tolist() == [2, 2, 2] and ours[:, 0, 41].tolist() == [11, 3, 3]
    assert ours[:, 0, 42:].tolist() == [[12, 13]] * 3
    assert deltas.tolist() == [14 - 44]
    theirs, _ = transformers_positions()(batch)
    assert theirs[:, 0, 42:].tolist() == ([[12, 13]] * 3 if OLD_TRANSFORMERS else [[4, 5]] * 3)


def test_decoded_tokens_continue_at_index_plus_delta():
    """Appending text gives the ids that rope_delta promises."""
    for seed in range(10):
        batch = random_batch(seed, "none")
        arguments = batch.arguments()
        _, deltas = positions.mrope_position_ids(**arguments)
        length = arguments["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask"):
            arguments[name] = torch.cat((arguments[name], torch.ones_like(arguments[name][:, :3])), 1)
        found, _ = positions.mrope_position_ids(**arguments)
        for step in range(3):
            assert torch.equal(found[:, :, length + step], (length + step + deltas).expand(3, -1))


def test_text_only_and_empty():
    found, deltas = positions.mrope_position_ids(torch.zeros(2, 5, dtype=torch.int64))
    assert torch.equal(found, torch.arange(5).expand(3, 2, 5)) and deltas.tolist() == [0, 0]
    for size in ((0, 5), (2, 0)):
        found, deltas = positions.mrope_position_ids(torch.zeros(size, dtype=torch.int64))
        assert found.shape == (3, *size) and deltas.shape == (size[0],)
    found, deltas = positions.mrope_position_ids(torch.zeros(1, 4, dtype=torch.int64), attention_mask=torch.zeros(1, 4))
    assert not found.any() and deltas.tolist() == [0]


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_and_ids_of_any_dtype(mask_dtype):
    batch = random_batch(3, "left")
    arguments = batch.arguments()
    expected, deltas = positions.mrope_position_ids(**arguments)
    arguments["attention_mask"] = arguments["attention_mask"].to(mask_dtype)
    arguments["input_ids"] = arguments["input_ids"].int()
    found, found_deltas = positions.mrope_position_ids(**arguments)
    assert torch.equal(found, expected) and torch.equal(found_deltas, deltas)
    assert found.dtype == torch.int64


def test_other_ids_and_merge_size():
    ids = torch.tensor([[1, 9, 9, 9, 9, 2]])
    found, _ = positions.mrope_position_ids(ids, image_grid_thw=torch.tensor([[1, 6, 6]]), image_token_id=9, merge_size=3)
    assert found[:, 0].tolist() == [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]


GRIDS = [[], [[1, 2, 2]], [[1, 4, 6]], [[3, 2, 8], [1, 16, 16], [2, 6, 2]], [[1, 2, 2]] * 5 + [[5, 8, 4]]]


def check_vision(grids: list[list[int]], device: str = "cpu", positions=positions) -> None:
    grid = torch.tensor(grids, device=device, dtype=torch.int64).view(-1, 3)
    ids = positions.vision_position_ids(grid)
    assert ids.dtype == torch.int64 and ids.device.type == device
    assert list(zip(*ids.tolist(), strict=True)) == oracle.vision_positions(grids)
    bounds = positions.vision_cu_seqlens(grid)
    assert bounds.dtype == torch.int32 and bounds.device.type == device
    assert bounds.tolist() == oracle.cu_seqlens(grids)


@pytest.mark.parametrize("grids", GRIDS)
def test_vision(grids, device):
    check_vision(grids, device)


@pytest.mark.full
def test_vision_many(device):
    rng = random.Random(0)
    for _ in range(2000):
        count = rng.randint(0, 6)
        check_vision([[rng.randint(1, 4), 2 * rng.randint(1, 9), 2 * rng.randint(1, 9)] for _ in range(count)], device)


def test_vision_positions_equal_transformers():
    """transformers derives them inside the tower; the frequencies' table is replaced by one that shows the positions."""
    from transformers.models.qwen2_vl import modeling_qwen2_vl as peer

    grid = torch.tensor(GRIDS[3])
    expected = positions.vision_position_ids(grid).T
    if OLD_TRANSFORMERS:
        tower = SimpleNamespace(spatial_merge_size=2, rotary_pos_emb=lambda n: torch.arange(int(n))[:, None].float())
        found = peer.Qwen2VisionTransformerPretrainedModel.rot_pos_emb(tower, grid)
        assert torch.equal(found.long(), expected)
        return
    from transformers.vision_utils import get_vision_position_ids

    assert torch.equal(get_vision_position_ids(grid, spatial_merge_size=2), expected)


def test_merge_order_is_one_with_vision_positions():
    """Four rows in a row are one 2x2 square."""
    grid = torch.tensor(GRIDS[3])
    ids = positions.vision_position_ids(grid).view(2, -1, 4)
    assert torch.equal(ids - ids[:, :, :1], torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])[:, None].expand_as(ids))
    assert not (ids[:, :, 0] % 2).any()


def test_more_than_65535_segments():
    grid = torch.tensor([[70000, 2, 2], [1, 4, 4]])
    bounds = positions.vision_cu_seqlens(grid)
    assert bounds.shape == (70002,) and bounds[70000] == 280000 and bounds[-1] == 280016
    assert torch.equal(positions.vision_position_ids(grid)[:, -20:-16], torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]]))
    assert positions.attention_schedule(grid, heads=16, device="cpu").max_seqlen == 16


def check_boundaries_fit_int32(positions=positions) -> None:
    """The last pack that fits, and the first that doesn't: boundaries never wrap, and nothing is built before the refusal."""
    side = 32768  # 2^30 patches a frame pair
    assert positions.vision_cu_seqlens(torch.tensor([[1, side, side]])).tolist() == [0, 2**30]
    with pytest.raises(ValueError, match="2147483648 patches.*max_pack_patches"):
        positions.vision_cu_seqlens(torch.tensor([[1, side, side]] * 2))
    for row in ([2, side, side], [1, 2**33, 2**33], [10**9, 2, 2]):  # the second wraps to 0 in int64
        with pytest.raises(ValueError, match=r"grid_thw\[1\]: expected at most 2147483647 patches, got .*, that is \d{10}"):
            positions.vision_cu_seqlens(torch.tensor([[1, 2, 2], row]))


def test_boundaries_fit_int32():
    check_boundaries_fit_int32()


def test_long_sequences_stay_exact():
    """Ids up to 128k and beyond are integers all the way."""
    ids = torch.full((1, 140_000), 5)
    ids[0, 1:65_537] = VIDEO
    found, deltas = positions.mrope_position_ids(ids, video_grid_thw=torch.tensor([[65_536, 2, 2]]))
    assert found[:, 0, -1].tolist() == [139_999] * 3 and deltas.tolist() == [0]
    assert torch.equal(found[0, 0], torch.arange(140_000))


def test_schedule():
    bounds = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
    schedule = positions.attention_schedule(bounds, heads=2, device="cpu")
    assert torch.equal(schedule.cu_seqlens, bounds)
    assert (schedule.lengths, schedule.max_seqlen, schedule.total) == ((3, 0, 7), 7, 10)
    grid = torch.tensor([[2, 2, 4], [1, 4, 4]])
    schedule = positions.attention_schedule(grid, heads=2, device="cpu")
    assert (schedule.lengths, schedule.max_seqlen, schedule.total) == ((8, 8, 16), 16, 32)
    assert torch.equal(schedule.cu_seqlens, positions.vision_cu_seqlens(grid))
    empty = positions.attention_schedule(torch.zeros(1, dtype=torch.int32), heads=2, device="cpu")
    assert (empty.lengths, empty.max_seqlen, empty.total) == ((), 0, 0)


def busiest(lengths, heads_k: int, rows: int, processors: int, causal: bool) -> float:
    """Steps of the busiest multiprocessor, block by block."""
    found = []
    for length, _ in itertools.product(lengths, range(heads_k)):
        for first in range(0, length, rows):
            found.append(len(range(0, length - first if causal else length, 32 if rows == 128 else 64)))
    held = [0] * processors
    for i in range(found.count(max(found, default=0))):
        held[i % processors] += 1
    pairs, alone = divmod(max(held), 2)
    return max(sum(found) / processors, (2 * pairs + 1.4 * alone) * max(found, default=0))


def check_backward_rows(positions=positions) -> None:
    """The choice is that of brute force at every edge of a block and a step, in few and in many blocks."""
    packs = [(), (0, 0), (1024, 1), (900, 900, 0, 1024), *((length,) * count for length in LENGTHS for count in (1, 3, 40))]
    found = set()
    for lengths, processors, causal in itertools.product(packs, (1, 7, 108), (False, True)):
        large, small = (busiest(lengths, 2, rows, processors, causal) for rows in (128, 64))
        for rows, steps in ((128, large), (64, small)):
            assert positions.backward_steps(lengths, 2, rows, processors, causal) == pytest.approx(steps, abs=1e-9)
        chosen = positions.backward_rows(lengths, 2, 80, processors, causal)
        assert chosen == (64 if 1.14 * small < large else 128), (lengths, processors, causal)
        assert positions.backward_rows(lengths, 2, 128, processors, causal) == 64
        found.add((chosen, processors, causal))
    assert len(found) == 12


LENGTHS = [edge + i for edge in (32, 64, 128, 160, 192, 256, 320, 448, 512) for i in (-1, 0, 1)]


def test_backward_rows():
    check_backward_rows()


@pytest.mark.parametrize("processors", [108, 132])
def test_blocks_of_the_cases(processors):
    """What docs/attention.md says of them, at the tower's 16 heads."""
    for lengths, rows in (
        ((1024,), 64), ((1024,) * 4, 128), ((256,) * 64, 128), ((16384,), 128), ((1008,) * 32, 128),
        ((64,) * 600, 64), ((33,) * 600, 64), ((32,) * 600, 128), ((160,) * 600, 128), ((161,) * 600, 64), ((192,) * 600, 64),
        ((193,) * 600, 128), ((320,) * 600, 64), ((448,) * 600, 64), ((512,) * 600, 128),
    ):  # fmt: skip
        assert positions.backward_rows(lengths, 16, 80, processors, False) == rows, lengths


@pytest.mark.gpu
def test_no_device_sync():
    """Positions of the decoder never wait for the device, nor do those of the tower when grids are on the host."""
    arguments = random_batch(0, "left").arguments("cuda")
    grid = torch.tensor(GRIDS[3])
    positions.mrope_position_ids(**arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        positions.mrope_position_ids(**arguments)
        positions.vision_position_ids(grid)
        positions.attention_schedule(grid, heads=16, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
