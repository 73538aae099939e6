"""Linear readings of visual tokens: the dense supervision of nano's vision tower."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from .tasks import CELL_COLUMNS, IGNORE, PAIR_COLUMNS, Medium, Sample

_BOX_WEIGHT = 4.0


def in_pack_order(samples: Sequence[Sample]) -> list[Medium]:
    """The media of all samples as the model packs them: images first, then videos."""
    media = [medium for sample in samples for medium in sample.media]
    return sorted(media, key=lambda medium: medium.kind == "video")


class Probe(torch.nn.Module):
    """What lies at a visual token, the box of the shape there, and number and motion from the mean of a frame pair's tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = torch.nn.Linear(width, sum(CELL_COLUMNS.values()))
        self.box = torch.nn.Linear(width, 4)
        self.pair = torch.nn.Linear(width, sum(PAIR_COLUMNS.values()))
        for parameter in self.parameters():
            torch.nn.init.zeros_(parameter)

    def _readings(self, features: torch.Tensor, media: Sequence[Medium]):
        """(name, logits [N, values], targets [N]) of every column."""
        cells = torch.from_numpy(np.concatenate([medium.cells for medium in media])).to(features.device)
        pairs = torch.from_numpy(np.concatenate([medium.pairs for medium in media])).to(features.device)
        sizes = [medium.tokens // len(medium.pairs) for medium in media for _ in range(len(medium.pairs))]
        counts = torch.tensor(sizes, device=features.device)
        owner = torch.repeat_interleave(torch.arange(len(sizes), device=features.device), counts)
        means = features.new_zeros(len(sizes), features.shape[1]).index_add(0, owner, features)
        means = means / counts[:, None].to(features.dtype)
        for columns, logits, targets in (
            (CELL_COLUMNS, self.cell(features), cells),
            (PAIR_COLUMNS, self.pair(means), pairs),
        ):
            for index, (name, values) in enumerate(zip(columns, logits.split([*columns.values()], 1), strict=True)):
                yield name, values.float(), targets[:, index]

    def loss(self, features: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
        """The sum of the columns' mean cross entropies and of the boxes' mean distance. features [T, width] in pack order."""
        media = in_pack_order(samples)
        loss = features.new_zeros((), dtype=torch.float32)
        if not media:
            return loss
        for _, logits, targets in self._readings(features, media):
            if (targets != IGNORE).any():
                loss = loss + F.cross_entropy(logits, targets, ignore_index=IGNORE)
        boxes = torch.from_numpy(np.concatenate([medium.boxes for medium in media])).to(features.device)
        known = ~boxes.isnan().any(1)
        if known.any():
            loss = loss + _BOX_WEIGHT * F.l1_loss(self.box(features[known]).float(), boxes[known])
        return loss

    @torch.no_grad()
    def accuracy(self, features: torch.Tensor, samples: Sequence[Sample], task: str) -> dict[str, float]:
        """The share of right readings where there is something to read, by "task.column", and the boxes' mean error."""
        media = in_pack_order(samples)
        result = {}
        for name, logits, targets in self._readings(features, media):
            known = (targets != IGNORE) & ((targets > 0) | (name not in CELL_COLUMNS) | (name == "index"))
            if known.any():
                result[f"{task}.{name}"] = (logits.argmax(1) == targets)[known].float().mean().item()
        boxes = torch.from_numpy(np.concatenate([medium.boxes for medium in media])).to(features.device)
        known = ~boxes.isnan().any(1)
        if known.any():
            result[f"{task}.box_error"] = (self.box(features[known]).float() - boxes[known]).abs().mean().item()
        return result
