"""The run that makes the nano checkpoint.

    python -m qwen2vl_fast.training.nano train --out runs/nano --minutes 60 [--resume]
    python -m qwen2vl_fast.training.nano eval CHECKPOINT
    python -m qwen2vl_fast.training.nano card CHECKPOINT

Nothing is drawn from a generator that outlives a step: every batch is a function of the recipe's seed, the step and the place
in the curriculum. These are in the saved state with weights and moments, so a resumed run goes on bit for bit (same machine,
torch and number of threads). Learning rate: linear warmup, constant, linear cooldown to zero at the last step; because it is
constant in between, a resumed run may be given another number of steps.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ..config import Config
from ..media import pack_rows
from ..model import Qwen2VL
from ..tokenizer import Tokenizer
from .data import IGNORE_INDEX, ConversationEncoder, answers_right, sample_batch
from .nano_files import CONFIG, GENERATION_CONFIG, TOKEN_IDS, write_files
from .pictures import COLORS, MAX_COUNT, MAX_LEVEL, SHAPES, TASKS, TRAIN_SEEDS, VALIDATION_SEEDS, Sample, generate
from .state import load_state, replace_file, save_state, write_json

STATE = "state.safetensors"
LOG = "log.jsonl"

# Share of each task in a batch. color and shape ask for one word of what name asks for, and so bring it along.
SHARES = {"count": 0.7, "name": 0.18, "color": 0.04, "shape": 0.08}
# The curriculum goes to the next level, and at the last one from the tower to the whole model, at these validation accuracies.
PROMOTE = {"count": 0.6, "color": 0.9, "shape": 0.85}
VALIDATION_SAMPLES = 64
TOWER, WHOLE = "tower", "whole"


@dataclass(frozen=True)
class Recipe:
    """What determines a run. dtype: of forward and backward; weights and moments are float32 in either case."""

    steps: int = 4800
    tower_steps: int = 2200
    batch: int = 64
    tower_lr: float = 2e-3
    lr: float = 1e-3
    warmup: int = 100
    cooldown: float = 0.2
    weight_decay: float = 0.01
    clip: float = 1.0
    dtype: str = "bfloat16"
    seed: int = 0

    def rate(self, stage: str, step: int, since: int) -> float:
        """The learning rate of a step, 0 <= step < steps, of a stage that began at step `since`."""
        rise = (step - since + 1) / self.warmup
        fall = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        return (self.tower_lr if stage == TOWER else self.lr) * min(1.0, rise, fall)


def initial_model(seed: int) -> Qwen2VL:
    """nano with random float32 weights: normal with variance 1 / fan-in (the usual 0.02 is a third of that at this width); the
    last layer of every residual branch is divided by the square root of their number, the embedding keeps 0.02, biases are 0.
    """
    model = Qwen2VL(Config.from_dict(CONFIG, GENERATION_CONFIG))
    random = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            continue
        std = 0.02 if "embed_tokens" in name else weight[0].numel() ** -0.5
        if name.startswith("visual.blocks.") and name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
            std /= math.sqrt(2 * model.config.vision.depth)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * model.config.text.num_hidden_layers)
        torch.nn.init.normal_(weight, std=std, generator=random)
    return model


_SCALARS = ("stage", "step", "since", "level", "seconds", "history")


class Probe(torch.nn.Module):
    """Linear readings of a picture's mean visual token: number, color and shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleDict({task: torch.nn.Linear(width, len(words)) for task, words in _WORDS.items()})
        for parameter in self.parameters():
            torch.nn.init.zeros_(parameter)

    def loss(self, features: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
        """The sum of three cross entropies. features: [B, width]. Color and shape count where all shapes share theirs."""
        loss = features.new_zeros((), dtype=torch.float32)
        for task, head in self.heads.items():
            targets = torch.tensor([_target(task, sample) for sample in samples])
            loss = loss + torch.nn.functional.cross_entropy(head(features).float(), targets, ignore_index=IGNORE_INDEX)
        return loss

    def right(self, features: torch.Tensor, samples: Sequence[Sample], task: str) -> torch.Tensor:
        """bool [B]: whether the reading for a task is right."""
        return self.heads[task](features).argmax(1) == torch.tensor([_target(task, sample) for sample in samples])


_WORDS = {"count": [str(n) for n in range(1, MAX_COUNT + 1)], "color": [*COLORS], "shape": [*SHAPES]}


def _target(task: str, sample: Sample) -> int:
    """Index into _WORDS[task], or IGNORE_INDEX where the shapes of the sample differ."""
    said = {str(len(sample.shapes))} if task == "count" else {getattr(placed, task) for placed in sample.shapes}
    return _WORDS[task].index(said.pop()) if len(said) == 1 else IGNORE_INDEX


class Trainer:
    """Model, optimizers and the place in the curriculum; `step` is the number of steps done, `since` the first of the stage.

    The stage "tower" trains the vision tower alone, through a linear probe of the mean of a picture's visual tokens that tells
    number, color and shape; a step takes a third of the time of one of the stage "whole", which trains the whole model.
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.recipe = recipe
        self.stage = TOWER
        self.step, self.since, self.level, self.seconds = 0, 0, 0, 0.0
        # What each call of `train` was told, with the step that it began at.
        self.history: list[dict[str, Any]] = []
        self._encoder = ConversationEncoder(tokenizer)
        self.model = initial_model(recipe.seed)
        self.probe = Probe(self.model.config.text.hidden_size)
        parts = {**dict(self.model.named_parameters()), **{f"probe.{n}": p for n, p in self.probe.named_parameters()}}
        self._parts = parts
        # The optimizers work on float32; the model, where it computes in bfloat16, on rounded copies.
        self.weights = {name: part.detach().clone().requires_grad_() for name, part in parts.items()}
        for module in (self.model, self.probe):
            module.to(getattr(torch, recipe.dtype)).train()
        matrices = [w for name, w in self.weights.items() if w.dim() == 2 and not name.startswith(("probe", "model.embed"))]
        chosen = {id(weight) for weight in matrices}
        others = [weight for weight in self.weights.values() if id(weight) not in chosen]
        decay = recipe.weight_decay
        self.optimizers = (
            torch.optim.Muon(matrices, lr=recipe.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=decay, fused=True),
        )

    def save(self, directory: Path) -> None:
        save_state(directory / STATE, self.weights, self.optimizers, {name: getattr(self, name) for name in _SCALARS})

    def resume(self, directory: Path) -> None:
        scalars = load_state(directory / STATE, self.weights, self.optimizers)
        for name in _SCALARS:
            setattr(self, name, scalars[name])
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, part in self._parts.items():
            part.copy_(self.weights[name])

    def samples(self) -> list[Sample]:
        """The training samples of the current step."""
        recipe = self.recipe
        rng = np.random.default_rng((recipe.seed, self.step))
        tasks = rng.choice(len(TASKS), recipe.batch, p=[SHARES[task] for task in TASKS])
        first = recipe.seed * 2**32 + self.step * recipe.batch
        samples = [generate(TASKS[task], TRAIN_SEEDS[first + index], self.level) for index, task in enumerate(tasks)]
        # Neighbours of one size share an attention call.
        return sorted(samples, key=lambda sample: (sample.picture.shape, len(sample.question) + len(sample.answer)))

    def train_step(self) -> tuple[float, float]:
        """One step; the batch's loss and the norm of its gradient."""
        samples = self.samples()
        if self.stage == TOWER:
            loss = self.probe.loss(self._features(samples), samples)
        else:
            loss = self.model(**self._batch(samples), logits_to_keep=1).loss
        loss.backward()
        for name, part in self._parts.items():
            self.weights[name].grad = None if part.grad is None else part.grad.float()
            part.grad = None
        updated = [weight for weight in self.weights.values() if weight.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(updated, self.recipe.clip, error_if_nonfinite=True)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.rate(self.stage, self.step, self.since)
            optimizer.step()
        self._publish()
        self.step += 1
        return loss.item(), norm.item()

    def _features(self, samples: Sequence[Sample]) -> torch.Tensor:
        """[B, hidden]: the mean of each picture's visual tokens."""
        pixel_values, grids = pack_rows([sample.picture[None] for sample in samples])
        tokens = self.model.encode_images(pixel_values, grids)
        counts = grids.prod(1) // 4
        owner = torch.repeat_interleave(torch.arange(len(samples)), counts)
        return tokens.new_zeros(len(samples), tokens.shape[1]).index_add(0, owner, tokens) / counts[:, None].to(tokens.dtype)

    def _batch(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        return sample_batch(samples, self._encoder, TOKEN_IDS["<|endoftext|>"])

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The share of right answers of each task at the level reached, on pictures of the validation range."""
        accuracy = {}
        for task in TASKS if self.stage == WHOLE else PROMOTE:
            samples = [generate(task, seed, self.level) for seed in VALIDATION_SEEDS[:VALIDATION_SAMPLES]]
            if self.stage == TOWER:
                right = self.probe.right(self._features(samples), samples, task)
            else:
                batch = self._batch(samples)
                labels = batch.pop("labels")
                right = answers_right(self.model(**batch).logits, labels)
            accuracy[task] = right.float().mean().item()
        return accuracy

    def promote(self, accuracy: dict[str, float]) -> None:
        """To the next level or stage, if the accuracies of PROMOTE are reached or the steps of the stage are used up."""
        reached = all(accuracy[task] >= share for task, share in PROMOTE.items())
        if reached and self.level < MAX_LEVEL:
            self.level += 1
        elif self.stage == TOWER and (reached or self.step >= self.recipe.tower_steps):
            self.stage, self.since = WHOLE, self.step

    def export(self, directory: Path) -> None:
        """Write the checkpoint in the released format, weights in bfloat16."""
        write_files(directory)
        tensors = {
            name: self.weights[name].detach().bfloat16().contiguous() for name, _ in self.model.named_parameters()
        }
        replace_file(
            directory / "model.safetensors", lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"})
        )


def processor_name() -> str:
    """The CPU as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _facts(trainer: Trainer) -> dict[str, Any]:
    return {
        "recipe": asdict(trainer.recipe),
        "step": trainer.step,
        "pictures": trainer.step * trainer.recipe.batch,
        "minutes": round(trainer.seconds / 60, 1),
        "stage": trainer.stage,
        "whole_since": trainer.since,
        "level": trainer.level,
        "history": trainer.history,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def train(directory: Path, recipe: Recipe, *, minutes: float, resume: bool, validate_every: int = 50) -> None:
    """Train until the recipe's last step or until `minutes` of this call have passed; the state is saved in either case.

    Args:
        directory: takes state.safetensors, log.jsonl and checkpoint/.
        resume: go on from directory's state; without it an existing state is an error.
        validate_every: steps between validations, at which the state is saved too.
    """
    if (directory / STATE).exists() != resume:
        raise ValueError(f"resume: {directory / STATE} {'is missing' if resume else 'exists; pass --resume or another --out'}")
    checkpoint = directory / "checkpoint"
    write_files(checkpoint)
    trainer = Trainer(recipe, Tokenizer.from_pretrained(checkpoint))
    if resume:
        trainer.resume(directory)
    trainer.history.append({"step": trainer.step, "shares": SHARES, **asdict(recipe)})
    begin, before = time.monotonic(), trainer.seconds
    losses: list[float] = []
    while trainer.step < recipe.steps:
        loss, norm = trainer.train_step()
        losses.append(loss)
        if not math.isfinite(loss):
            raise RuntimeError(f"step {trainer.step}: the loss is {loss}")
        trainer.seconds = before + time.monotonic() - begin
        over = time.monotonic() - begin >= 60 * minutes
        if trainer.step % validate_every == 0 or trainer.step == recipe.steps or over:
            accuracy = trainer.validate()
            _log(directory, trainer, float(np.mean(losses)), norm, accuracy)
            losses.clear()
            trainer.promote(accuracy)
            trainer.save(directory)
        if over:
            break
    trainer.export(checkpoint)
    write_json(checkpoint / "training.json", _facts(trainer))


def _log(directory: Path, trainer: Trainer, loss: float, norm: float, accuracy: dict[str, float]) -> None:
    line = {
        "step": trainer.step,
        "pictures": trainer.step * trainer.recipe.batch,
        "minutes": round(trainer.seconds / 60, 2),
        "loss": round(loss, 4),
        "gradient_norm": round(norm, 3),
        "lr": trainer.recipe.rate(trainer.stage, trainer.step - 1, trainer.since),
        "stage": trainer.stage,
        "level": trainer.level,
        "accuracy": {task: round(share, 3) for task, share in accuracy.items()},
    }
    with open(directory / LOG, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    from .nano_eval import evaluate, write_card

    defaults = Recipe()
    parser = argparse.ArgumentParser(prog="python -m qwen2vl_fast.training.nano", description="Train and measure nano.")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train from scratch, or go on")
    training.add_argument("--out", type=Path, required=True, help="folder for the state, the log and the checkpoint")
    training.add_argument("--minutes", type=float, default=60.0, help="stop and save after this time (default: 60)")
    training.add_argument("--resume", action="store_true", help="go on from the state in --out")
    training.add_argument("--steps", type=int, default=defaults.steps, help=f"last step (default: {defaults.steps})")
    help = f"most steps of the tower alone (default: {defaults.tower_steps})"
    training.add_argument("--tower-steps", type=int, default=defaults.tower_steps, help=help)
    training.add_argument("--lr", type=float, default=defaults.lr, help=f"learning rate (default: {defaults.lr})")
    training.add_argument("--dtype", choices=("float32", "bfloat16"), default=defaults.dtype, help="of forward and backward")
    training.add_argument("--seed", type=int, default=defaults.seed)
    training.add_argument("--threads", type=int, default=None, help="of torch (default: torch's choice)")
    measuring = commands.add_parser("eval", help="measure a checkpoint on unseen pictures; writes eval.json into it")
    measuring.add_argument("checkpoint", type=Path)
    measuring.add_argument("--samples", type=int, default=1000, help="pictures a task (default: 1000)")
    card = commands.add_parser("card", help="write the model card from training.json and eval.json")
    card.add_argument("checkpoint", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.command == "train":
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        chosen = {name: getattr(arguments, name) for name in ("steps", "tower_steps", "lr", "dtype", "seed")}
        arguments.out.mkdir(parents=True, exist_ok=True)
        train(arguments.out, Recipe(**chosen), minutes=arguments.minutes, resume=arguments.resume)
    elif arguments.command == "eval":
        print(json.dumps(evaluate(arguments.checkpoint, samples=arguments.samples), indent=2))
    else:
        write_card(arguments.checkpoint)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
