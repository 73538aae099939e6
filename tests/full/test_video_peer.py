"""Videos judged by transformers' video processor, which needs torchvision; make test-full has an environment with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen2vl_fast.video import preprocess_videos
from tests.compare import check, error
from tests.preprocessing import MEAN, STD, noise, numbered_frames

pytestmark = pytest.mark.peer_video


@pytest.fixture(scope="module")
def judge():
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    return Qwen2VLVideoProcessor()


def judged(judge, frames: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    output = judge([video], do_sample_frames=False, cap_pixels_per_frame=False, return_tensors="pt")
    return output["pixel_values_videos"], output["video_grid_thw"]


def levels(rows: torch.Tensor) -> torch.Tensor:
    """Rows back to grey levels 0..255."""
    columns = rows.double().view(-1, 3, 392)
    grey = (columns * torch.tensor(STD)[:, None] + torch.tensor(MEAN)[:, None]) * 255
    assert (grey - grey.round()).abs().max() < 1e-3
    return grey.round().int()


@pytest.mark.parametrize("count", range(1, 34))
def test_frame_padding_and_order_of_rows(judge, count):
    # Frames that keep their size: then nothing but the order of rows and float32 rounding is judged.
    frames = noise(count, count, 280, 364, 3)
    rows, grid = preprocess_videos([frames])
    expected_rows, expected_grid = judged(judge, frames)
    assert torch.equal(grid, expected_grid) and grid.tolist() == [[(count + 1) // 2, 20, 26]]
    grey = levels(expected_rows)
    assert torch.equal(levels(rows), grey)
    # transformers folds 1/255 into mean and std, so the last bits differ.
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None] for values in (MEAN, STD))
    exact = ((grey.double() / 255 - mean) / std).view_as(rows)
    check(rows, exact, [error(expected_rows, exact)])


@pytest.mark.parametrize("size", [(56, 84), (100, 150), (240, 320), (333, 77), (720, 1280), (1, 150), (30, 3000)])
def test_sizes(judge, size):
    frames = numbered_frames(4, *size)
    rows, grid = preprocess_videos([frames])
    expected_rows, expected_grid = judged(judge, frames)
    assert torch.equal(grid, expected_grid)
    # PIL's bicubic filter against torch's for bytes, whose weights have fewer bits (tests/test_video.py compares the two).
    assert (levels(rows) - levels(expected_rows)).abs().max() <= 2


def test_several_videos(judge):
    videos = [noise(0, 4, 100, 150, 3), noise(1, 2, 300, 200, 3), noise(2, 5, 100, 150, 3)]
    rows, grid = preprocess_videos(videos)
    expected = [judged(judge, frames) for frames in videos]
    assert torch.equal(grid, torch.cat([part for _, part in expected]))
    assert (levels(rows) - levels(torch.cat([part for part, _ in expected]))).abs().max() <= 2
