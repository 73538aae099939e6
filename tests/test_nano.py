"""The nano checkpoint does what its card says, and the code that made it goes on where it stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qwen2vl_fast import Qwen2VL
from qwen2vl_fast.chat import Processor
from qwen2vl_fast.tokenizer import Tokenizer
from qwen2vl_fast.training import nano, nano_eval
from qwen2vl_fast.training.data import conversation
from qwen2vl_fast.training.nano_files import SPECIAL_TOKENS, TOKEN_IDS, write_files
from qwen2vl_fast.training.pictures import TASKS
from tests.models import peer_inputs

NANO = Path(nano.__file__).parent.parent / "assets" / "nano"
SAMPLES = 200


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small batches: more threads only wait for each other, and a run's bits belong to its number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(NANO)


@pytest.fixture(scope="module")
def measured() -> dict:
    return json.loads((NANO / "eval.json").read_text(encoding="utf-8"))


def tail(right: int, samples: int, accuracy: float) -> float:
    """The chance of a result at least as far from the accuracy on its side: the smaller tail of the binomial distribution."""
    chances = [math.comb(samples, k) * accuracy**k * (1 - accuracy) ** (samples - k) for k in range(samples + 1)]
    return min(sum(chances[: right + 1]), sum(chances[right:]))


def test_size_and_format() -> None:
    weights = load_file(NANO / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert sum(weight.numel() for weight in weights.values()) <= 5_000_000
    assert (NANO / "model.safetensors").stat().st_size <= 10_000_000
    model = Qwen2VL.from_pretrained(NANO, device="cpu")
    config = model.config
    assert config.vision.head_dim == 80 and config.text.head_dim == 128 and config.text.mrope_section == (16, 24, 24)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_tokens_are_bytes_and_then_the_special_tokens(processor: Processor) -> None:
    text = "".join(map(chr, range(0x800))) + "漢字 🙂"
    assert processor.tokenizer.encode(text) == list(text.encode())
    assert processor.decode(list(text.encode())) == text
    assert [TOKEN_IDS[token] for token in SPECIAL_TOKENS] == list(range(256, 270))
    assert dict(processor.tokenizer.added) == TOKEN_IDS


def test_shipped_files_are_what_the_code_writes(tmp_path: Path, measured: dict) -> None:
    write_files(tmp_path)
    for file in tmp_path.iterdir():
        assert json.loads(file.read_text("utf-8")) == json.loads((NANO / file.name).read_text("utf-8")), file.name
    for name in ("training.json", "eval.json"):
        (tmp_path / name).write_bytes((NANO / name).read_bytes())
    nano_eval.write_card(tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") == (NANO / "README.md").read_text("utf-8")


def test_the_card_promises_enough(measured: dict) -> None:
    for task in ("count", "name"):
        for dtype in nano_eval.DTYPES:
            assert measured["tasks"][task][dtype]["samples"] >= 1000
            assert measured["tasks"][task][dtype]["accuracy"] >= 0.9


@pytest.mark.parametrize("task", TASKS)
def test_accuracy_on_unseen_pictures_is_that_of_the_card(task: str, processor: Processor, measured: dict) -> None:
    """On pictures beyond those of the card. A checkpoint as good as it says fails once in 5000 such tests."""
    model = Qwen2VL.from_pretrained(NANO, device="cpu", dtype=torch.float32)
    promised = measured["tasks"][task]["float32"]
    samples = nano_eval.unseen(task, SAMPLES, first=promised["samples"])
    result = nano_eval.score(task, samples, nano_eval.answer(model, processor, samples))
    # The card's figure is itself an estimate; the kindest value within two standard errors of it is compared.
    share, error = promised["accuracy"], math.sqrt(0.25 / promised["samples"])
    error = min(error, 2 * math.sqrt(max(share * (1 - share), 1 / promised["samples"]) / promised["samples"]))
    kindest = min(max(result["right"] / SAMPLES, share - error), share + error, 1 - 1e-6)
    assert tail(result["right"], SAMPLES, kindest) > 1e-4, result


def test_transformers_gives_the_same_answers(processor: Processor) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    ours = Qwen2VL.from_pretrained(NANO, device="cpu", dtype=torch.float32)
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(NANO).float().eval()
    for task in TASKS:
        samples = nano_eval.unseen(task, 8)
        inputs = processor([conversation(sample, answered=False) for sample in samples])
        start = inputs["input_ids"].shape[1]
        # transformers finds the pictures of a prompt by the type of its tokens.
        types = (inputs["input_ids"] == TOKEN_IDS["<|image_pad|>"]).long()
        prompt = peer_inputs(theirs, {**inputs, "mm_token_type_ids": types})
        expected = theirs.generate(**prompt, max_new_tokens=24, do_sample=False)[:, start:]
        got = nano_eval.answer(ours, processor, samples)
        assert got == [processor.decode(row) for row in expected]


def test_a_video_and_text_alone_are_answered(processor: Processor) -> None:
    model = Qwen2VL.from_pretrained(NANO, device="cpu")
    frames = [np.full((112, 112, 3), 60 * i, dtype=np.uint8) for i in range(4)]
    clip = [{"type": "video", "video": frames}, {"type": "text", "text": "What is this?"}]
    assert isinstance(model.chat([{"role": "user", "content": clip}], max_new_tokens=8), str)
    assert isinstance(model.chat([{"role": "user", "content": "Hello"}], max_new_tokens=8), str)


def trainer(**changes) -> nano.Trainer:
    recipe = nano.Recipe(**{"batch": 8, "warmup": 1, "steps": 100, **changes})
    return nano.Trainer(recipe, Tokenizer.from_pretrained(NANO))


@pytest.mark.parametrize("stage", [nano.TOWER, nano.WHOLE])
def test_steps_on_one_batch_reduce_its_loss(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tower_lr=5e-4, lr=5e-4)
    run.stage = stage
    samples = run.samples()
    monkeypatch.setattr(run, "samples", lambda: samples)
    losses = [run.train_step()[0] for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("stage", [nano.TOWER, nano.WHOLE])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_resumed_run_repeats_the_bits(stage: str, dtype: str, tmp_path: Path) -> None:
    first = trainer(dtype=dtype)
    first.stage = stage
    for _ in range(3):
        first.train_step()
    first.save(tmp_path)
    expected = [first.train_step() for _ in range(2)]
    second = trainer(dtype=dtype)
    second.resume(tmp_path)
    assert (second.step, second.stage) == (3, stage)
    assert [second.train_step() for _ in range(2)] == expected
    assert all(torch.equal(weight, second.weights[name]) for name, weight in first.weights.items())


def test_every_weight_is_trained() -> None:
    both = trainer()
    before = {name: weight.detach().clone() for name, weight in both.weights.items()}
    both.train_step()
    assert {name.split(".")[0] for name, weight in both.weights.items() if not torch.equal(weight, before[name])} == {
        "visual",
        "probe",
    }
    both.stage = nano.WHOLE
    both.train_step()
    assert all(not torch.equal(weight, before[name]) for name, weight in both.weights.items())


def test_curriculum(tmp_path: Path) -> None:
    run = trainer(tower_steps=50)
    reached = dict.fromkeys(nano.PROMOTE, 1.0)
    for level in (0, 1, 2):
        assert (run.stage, run.level) == (nano.TOWER, level)
        run.promote({**reached, "shape": 0.0})
        assert (run.stage, run.level) == (nano.TOWER, level)
        run.promote(reached)
    assert (run.stage, run.level, run.since) == (nano.WHOLE, 2, 0)
    late = trainer(tower_steps=50)
    late.step = 50
    late.promote(dict.fromkeys(nano.PROMOTE, 0.0))
    assert (late.stage, late.level, late.since) == (nano.WHOLE, 0, 50)
    recipe = nano.Recipe(steps=1000, lr=1e-3)
    rates = [recipe.rate(nano.WHOLE, step, 500) for step in (500, 599, 700, 900, 999)]
    assert rates == pytest.approx([1e-5, 1e-3, 1e-3, 5e-4, 5e-6])


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano, "VALIDATION_SAMPLES", 4)
    out = tmp_path / "run"
    assert nano.main(["train", "--out", str(out), "--minutes", "0"]) == 0
    with pytest.raises(ValueError, match="--resume"):
        nano.main(["train", "--out", str(out), "--minutes", "0"])
    assert nano.main(["train", "--out", str(out), "--minutes", "0", "--resume"]) == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and set(lines[0]["accuracy"]) == {"count", "color", "shape"}
    assert not list(out.glob("**/*.tmp"))
    checkpoint = out / "checkpoint"
    assert nano.main(["eval", str(checkpoint), "--samples", "2"]) == 0
    assert json.loads((checkpoint / "eval.json").read_text("utf-8"))["tasks"]["count"]["bfloat16"]["samples"] == 2
    assert nano.main(["card", str(checkpoint)]) == 0
    assert (checkpoint / "README.md").read_text("utf-8").startswith("---\nlicense")
    assert capsys.readouterr().out
    with pytest.raises(ValueError, match="is missing"):
        nano.main(["train", "--out", str(tmp_path / "none"), "--resume"])


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    run = trainer()
    run.save(tmp_path)
    state = tmp_path / nano.STATE
    with pytest.raises(ValueError, match="parameters"):
        nano.load_state(state, {"other": torch.zeros(1)}, run.optimizers)
    name = "visual.merger.ln_q.weight"
    with pytest.raises(ValueError, match="shape"):
        nano.load_state(state, {**run.weights, name: torch.zeros(3)}, run.optimizers)
