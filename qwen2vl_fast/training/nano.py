"""The run that makes the nano checkpoint.

    python -m qwen2vl_fast.training.nano train --out runs/nano --minutes 60 [--resume | --init CHECKPOINT]
    python -m qwen2vl_fast.training.nano eval CHECKPOINT
    python -m qwen2vl_fast.training.nano card CHECKPOINT

Stages, after MODEL.md section 7: "text", the decoder on text alone; "tower", the vision tower alone through linear readings of
every visual token; "whole", everything on conversations; "decoder", the decoder on conversations, the tower frozen.

Nothing is drawn from a generator that outlives a step: every batch is a function of the recipe's seed, the step and the place
in the curriculum. These are in the saved state with weights and moments, so a resumed run goes on bit for bit (same machine,
torch and number of threads). Learning rate: linear warmup, constant, linear cooldown to zero at the last step; because it is
constant in between, a resumed run may be given another number of steps.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ..config import Config
from ..media import pack_rows
from ..model import Qwen2VL
from ..tokenizer import Tokenizer
from .data import ConversationEncoder, answers, sample_batch
from .muon import Muon
from .nano_card import LOG, draw_curves, write_card
from .nano_eval import COMPARED, SAMPLES, evaluate
from .nano_files import CONFIG, GENERATION_CONFIG, TOKEN_IDS, write_files
from .probe import Probe, in_pack_order
from .state import load_state, replace_file, save_state, write_json
from .tasks import (
    MAX_LEVEL,
    PROMOTE,
    TASKS,
    TRAIN_SEEDS,
    VALIDATION_SAMPLES,
    VALIDATION_SEEDS,
    Sample,
    generate,
    right,
)

STATE = "state.safetensors"
NANO = Path(__file__).parents[1] / "assets" / "nano"

TEXT, TOWER, WHOLE, DECODER = STAGES = ("text", "tower", "whole", "decoder")
# Share of each task in a batch of a stage.
SHARES: dict[str, dict[str, float]] = {
    TEXT: {"copy": 0.75, "sum": 0.25},
    TOWER: {"read": 0.8, "name": 0.03, "count": 0.07, "box": 0.05, "relation": 0.03, "motion": 0.02},
    WHOLE: {
        "read": 0.36, "name": 0.01, "count": 0.11, "box": 0.2, "relation": 0.16, "compare": 0.03, "motion": 0.01,
        "order": 0.04, "followup": 0.03, "copy": 0.02, "sum": 0.03,
    },
}  # fmt: skip
SHARES[DECODER] = SHARES[WHOLE]
# Of the readings of the stage "tower", which need no curriculum: every character is a lesson of its own.
TOWER_LEVELS = {task: 3 if task == "read" else MAX_LEVEL[task] for task in TASKS}
# More than the samples of any step: steps draw from ranges of seeds that do not meet.
_MOST = 1024
# Weights that AdamW trains, besides vectors. Muon's products for the merger's large matrix would take too long.
_ADAMW = ("probe", "model.embed", "visual.merger.mlp.0")
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Recipe:
    """What determines a run.

    text_steps, tower_steps: of the first two stages; decoder_steps: of the last one, which ends at `steps`. batch, tower_batch:
    samples a step, of the stage "tower" and of the others. tower_lr: falls to visual_lr over the stage "tower"; the tower goes
    on with that in the stage "whole". adamw: AdamW's learning rate, a share of Muon's. probe: weight of the readings' loss in
    the stage "whole"; readings: pictures a step that are only read there, which is cheap beside a conversation.
    """

    steps: int = 6000
    text_steps: int = 500
    tower_steps: int = 3000
    decoder_steps: int = 100
    batch: int = 64
    tower_batch: int = 128
    tower_lr: float = 1e-3
    lr: float = 1e-3
    visual_lr: float = 5e-4
    adamw: float = 0.3
    warmup: int = 50
    cooldown: float = 0.3
    weight_decay: float = 0.01
    clip: float = 1.0
    probe: float = 0.3
    readings: int = 48
    dtype: str = "float32"
    seed: int = 0

    def stage(self, step: int) -> str:
        """The stage of a step."""
        if step < self.text_steps + self.tower_steps:
            return TEXT if step < self.text_steps else TOWER
        return DECODER if step >= self.steps - self.decoder_steps else WHOLE

    def size(self, stage: str) -> int:
        """Samples of a step."""
        return self.tower_batch if stage == TOWER else self.batch

    def rate(self, step: int, visual: bool = False) -> float:
        """The learning rate of a step, 0 <= step < steps, for the weights of the tower or for the others."""
        stage = self.stage(step)
        since = {TEXT: 0, TOWER: self.text_steps}.get(stage, self.text_steps + self.tower_steps)
        rise = (step - since + 1) / self.warmup
        fall = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        full = self.visual_lr if visual else self.lr
        if stage == TOWER:
            full = self.tower_lr + (self.visual_lr - self.tower_lr) * (step - since) / self.tower_steps
        return full * min(1.0, rise, fall)


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


_SCALARS = ("step", "samples_seen", "levels", "seconds", "history")


class Trainer:
    """Model, optimizers and the place in the curriculum: the number of steps done, and the level of each task."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.recipe = recipe
        self.step, self.samples_seen, self.seconds = 0, 0, 0.0
        self.levels = dict.fromkeys(TASKS, 0)
        # What each call of `train` was told, with the step that it began at.
        self.history: list[dict[str, Any]] = []
        self._tokenizer, self._encoder = tokenizer, ConversationEncoder(tokenizer)
        self.model = initial_model(recipe.seed)
        self.probe = Probe(self.model.config.text.hidden_size)
        parts = {**dict(self.model.named_parameters()), **{f"probe.{n}": p for n, p in self.probe.named_parameters()}}
        self._parts = parts
        # The optimizers work on float32; the model, where it computes in bfloat16, on rounded copies.
        self.weights = {name: part.detach().clone().to(_DEVICE).requires_grad_() for name, part in parts.items()}
        for module in (self.model, self.probe):
            module.to(device=_DEVICE, dtype=getattr(torch, recipe.dtype)).train()
        self.optimizers = (
            Muon(self._groups(True), lr=recipe.lr, weight_decay=recipe.weight_decay),
            torch.optim.AdamW(
                self._groups(False), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
            ),
        )

    def _groups(self, matrices: bool) -> list[dict[str, Any]]:
        """Muon's weights or AdamW's: those of the tower, and the others."""
        mine = {n: w for n, w in self.weights.items() if (w.dim() >= 2 and not n.startswith(_ADAMW)) == matrices}
        return [
            {"params": [w for n, w in mine.items() if n.startswith("visual") == visual], "visual": visual}
            for visual in (True, False)
        ]

    @property
    def stage(self) -> str:
        return self.recipe.stage(self.step)

    def save(self, directory: Path) -> None:
        save_state(directory / STATE, self.weights, self.optimizers, {name: getattr(self, name) for name in _SCALARS})

    def start_from(self, checkpoint: Path) -> dict[str, Any]:
        """Take the weights of a checkpoint of this shape, moments at zero, and the levels that its training reached.

        Returns its name, and the samples and minutes of its run.
        """
        model = Qwen2VL.from_pretrained(checkpoint, device="cpu", dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                self.weights[name].copy_(weight)
        self._publish()
        facts = json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))
        self.levels |= facts["levels"]
        return {"init": checkpoint.name, "init_samples": facts["samples"], "init_minutes": facts["minutes"]}

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
        return self._draw(self.stage, self.recipe.size(self.stage), 0)

    def _levels(self, stage: str) -> dict[str, int]:
        return TOWER_LEVELS if stage == TOWER else self.levels

    def _draw(self, stage: str, size: int, start: int) -> list[Sample]:
        """Samples of a stage from the seeds of this step, from the one with index `start` on; half are of lower levels."""
        rng = np.random.default_rng((self.recipe.seed, self.step, start))
        shares = SHARES[stage]
        tasks = rng.choice(len(shares), size, p=[*shares.values()])
        first = self.recipe.seed * 2**32 + self.step * _MOST + start
        samples = []
        for index, task in enumerate([*shares][task] for task in tasks):
            level = self._levels(stage)[task]
            if level and rng.random() < 1 / 2:
                level = int(rng.integers(level))
            samples.append(generate(task, TRAIN_SEEDS[first + index], level))
        # Neighbours of one size share an attention call.
        return sorted(samples, key=lambda sample: (_shapes(sample), sum(map(len, itertools.chain(*sample.turns)))))

    def train_step(self) -> tuple[float, float]:
        """One step; the batch's loss and the norm of its gradient."""
        stage, samples = self.stage, self.samples()
        self.model.visual.requires_grad_(stage != DECODER)
        if stage == TOWER:
            loss = self.probe.loss(self._features(samples), samples)
        elif stage == WHOLE:
            features, output = self._forward(samples)
            readings = self.probe.loss(features, samples)
            if self.recipe.readings:
                more = self._draw(TOWER, self.recipe.readings, len(samples))
                readings = readings + self.probe.loss(self._features(more), more)
                samples = [*samples, *more]
            loss = output.loss + self.recipe.probe * readings
        else:
            loss = self.model(**self._batch(samples), logits_to_keep=1).loss
        loss.backward()
        for name, part in self._parts.items():
            self.weights[name].grad = None if part.grad is None else part.grad.float()
            part.grad = None
        updated = [weight for weight in self.weights.values() if weight.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(updated, self.recipe.clip, error_if_nonfinite=True)
        for optimizer, share in zip(self.optimizers, (1.0, self.recipe.adamw), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = share * self.recipe.rate(self.step, group["visual"])
            optimizer.step()
        self._publish()
        self.step += 1
        self.samples_seen += len(samples)
        return loss.item(), norm.item()

    def _features(self, samples: Sequence[Sample]) -> torch.Tensor:
        """The visual tokens of all images and then of all videos, as the model packs them."""
        media = in_pack_order(samples)
        return self.model.encode_images(*(rows.to(_DEVICE) for rows in pack_rows([medium.frames for medium in media])))

    def _forward(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, Any]:
        """The visual tokens and the output of one forward of conversations."""
        seen: list[torch.Tensor] = []
        hook = self.model.visual.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            output = self.model(**self._batch(samples), logits_to_keep=1)
        finally:
            hook.remove()
        return torch.cat(seen), output

    def _batch(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        batch = sample_batch(samples, self._encoder, TOKEN_IDS["<|endoftext|>"])
        return {name: value.to(_DEVICE) for name, value in batch.items()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The share of right answers of each task of the stage at the level reached, on samples of the validation range.

        In the stage "tower" the share of readings that are right; elsewhere every token follows the right ones before it.
        """
        accuracy = {}
        for task in SHARES[self.stage]:
            samples = [generate(task, seed, self._levels(self.stage)[task]) for seed in VALIDATION_SEEDS[:VALIDATION_SAMPLES]]
            if self.stage == TOWER:
                accuracy |= self.probe.accuracy(self._features(samples), samples, task)
                continue
            batch = self._batch(samples)
            labels = batch.pop("labels")
            said = answers(self.model(**batch).logits, labels, self._decode)
            accuracy[task] = sum(map(right, samples, said)) / len(samples)
        return accuracy

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False).removesuffix("<|im_end|>")

    def promote(self, accuracy: dict[str, float]) -> None:
        """Each task that reached PROMOTE goes to its next level."""
        for task, level in self.levels.items():
            if accuracy.get(task, 0.0) >= PROMOTE and level < MAX_LEVEL[task]:
                self.levels[task] = level + 1

    def export(self, directory: Path) -> None:
        """Write the checkpoint in the released format, weights in bfloat16."""
        write_files(directory)
        tensors = {name: self.weights[name].detach().bfloat16().contiguous() for name, _ in self.model.named_parameters()}
        replace_file(
            directory / "model.safetensors", lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"})
        )


def _shapes(sample: Sample) -> list[tuple[int, ...]]:
    return [medium.frames.shape for medium in sample.media]


def keep_memory() -> None:
    """Ask glibc to keep what is freed: a step allocates the same large tensors again, and new pages cost more than the sums.

    Another C library is left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28)):
            mallopt(option, value)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


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
        "samples": trainer.samples_seen,
        "minutes": round(trainer.seconds / 60, 1),
        "levels": trainer.levels,
        "history": trainer.history,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def train(
    directory: Path, recipe: Recipe, *, minutes: float, resume: bool, init: Path | None = None, validate_every: int = 50
) -> None:
    """Train until the recipe's last step or until `minutes` of this call have passed; the state is saved in either case.

    Args:
        directory: takes state.safetensors, log.jsonl and checkpoint/.
        resume: go on from directory's state; without it an existing state is an error.
        init: the checkpoint that a new run takes its weights from; None is random weights.
        validate_every: steps between validations, at which the state is saved too.
    """
    if (directory / STATE).exists() != resume:
        raise ValueError(f"resume: {directory / STATE} {'is missing' if resume else 'exists; pass --resume or another --out'}")
    if resume and init is not None:
        raise ValueError("init: a resumed run has weights; leave --init or --resume out")
    checkpoint = directory / "checkpoint"
    write_files(checkpoint)
    trainer = Trainer(recipe, Tokenizer.from_pretrained(checkpoint))
    begun = {"init": None} if init is None else trainer.start_from(init)
    if resume:
        trainer.resume(directory)
        if recipe.seed != (seed := trainer.history[-1]["seed"]):
            raise ValueError(f"seed: the run has {seed}, got {recipe.seed}; another one would repeat or skip samples")
    trainer.history.append({"step": trainer.step, **begun, "shares": SHARES, **asdict(recipe)})
    begin, before = time.monotonic(), trainer.seconds
    losses: list[float] = []
    while trainer.step < recipe.steps:
        loss, norm = trainer.train_step()
        losses.append(loss)
        if not math.isfinite(loss):
            raise RuntimeError(f"step {trainer.step}: the loss is {loss}")
        trainer.seconds = before + time.monotonic() - begin
        over = time.monotonic() - begin >= 60 * minutes
        last = trainer.step == recipe.steps or trainer.stage != recipe.stage(trainer.step - 1)
        due = trainer.step % validate_every == 0 or last
        if due or over:
            accuracy = trainer.validate()
            _log(directory, trainer, float(np.mean(losses)), norm, accuracy)
            losses.clear()
            if due:  # else a run that is stopped and resumed would be another than one that is not
                trainer.promote(accuracy)
            trainer.save(directory)
            trainer.export(checkpoint)
            write_json(checkpoint / "training.json", _facts(trainer))
            shutil.copyfile(directory / LOG, checkpoint / LOG)
        if over:
            break


def _log(directory: Path, trainer: Trainer, loss: float, norm: float, accuracy: dict[str, float]) -> None:
    line = {
        "step": trainer.step,
        "samples": trainer.samples_seen,
        "minutes": round(trainer.seconds / 60, 2),
        "loss": round(loss, 4),
        "gradient_norm": round(norm, 3),
        "lr": trainer.recipe.rate(trainer.step - 1),
        "stage": trainer.recipe.stage(trainer.step - 1),
        "levels": {task: level for task, level in trainer.levels.items() if task in SHARES[WHOLE]},
        "accuracy": {task: round(share, 3) for task, share in accuracy.items()},
    }
    with open(directory / LOG, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qwen2vl_fast.training.nano", description="Train and measure nano.")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train from scratch, or go on")
    training.add_argument("--out", type=Path, required=True, help="folder for the state, the log and the checkpoint")
    training.add_argument("--minutes", type=float, default=60.0, help="stop and save after this time (default: 60)")
    training.add_argument("--resume", action="store_true", help="go on from the state in --out")
    training.add_argument("--init", type=Path, help="take the weights of this checkpoint, not random ones")
    for field in fields(Recipe):
        kind = {"int": int, "float": float, "str": str}[str(field.type)]
        text = f"default: {field.default}"
        training.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help=text)
    training.add_argument("--threads", type=int, default=None, help="of torch (default: torch's choice)")
    measuring = commands.add_parser("eval", help="measure a checkpoint on unseen samples; writes its eval.json")
    measuring.add_argument("checkpoint", type=Path, nargs="?", default=NANO, help="default: the embedded nano")
    measuring.add_argument("--samples", type=int, default=SAMPLES, help=f"a task (default: {SAMPLES})")
    text = f"samples a task for the other dtypes, transformers and patch (default: {COMPARED})"
    measuring.add_argument("--compare", type=int, default=COMPARED, help=text)
    measuring.add_argument("--backend", help="of the ops (default: the fastest)")
    measuring.add_argument("--out", type=Path, help="write the result there, not into the checkpoint")
    for name, text in (("card", "write the model card from training.json and eval.json"), ("plot", "draw the log's curves")):
        command = commands.add_parser(name, help=text)
        command.add_argument("checkpoint", type=Path, nargs="?", default=NANO, help="default: the embedded nano")
    arguments = parser.parse_args(argv)
    if arguments.command == "train":
        keep_memory()
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        chosen = {field.name: getattr(arguments, field.name) for field in fields(Recipe)}
        arguments.out.mkdir(parents=True, exist_ok=True)
        recipe = Recipe(**chosen)
        train(arguments.out, recipe, minutes=arguments.minutes, resume=arguments.resume, init=arguments.init)
    elif arguments.command == "eval":
        result = evaluate(
            arguments.checkpoint,
            samples=arguments.samples,
            compared=arguments.compare,
            backend=arguments.backend,
            out=arguments.out,
        )
        print(json.dumps(result, indent=2))
    elif arguments.command == "card":
        write_card(arguments.checkpoint)
    else:
        draw_curves(arguments.checkpoint)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
