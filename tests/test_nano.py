"""The nano checkpoint does what its card says, and the code that made it goes on where it stopped."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qwen2vl_fast import Qwen2VL
from qwen2vl_fast.chat import Processor
from qwen2vl_fast.tokenizer import Tokenizer
from qwen2vl_fast.training import nano, nano_card, nano_eval
from qwen2vl_fast.training.data import conversation
from qwen2vl_fast.training.muon import Muon, orthogonal
from qwen2vl_fast.training.nano_files import SPECIAL_TOKENS, TOKEN_IDS, write_files
from qwen2vl_fast.training.tasks import TASKS
from tests.models import peer_inputs

NANO = nano.NANO
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
    logs = [math.lgamma(samples + 1) - math.lgamma(k + 1) - math.lgamma(samples - k + 1) for k in range(samples + 1)]
    chances = [math.exp(log + k * math.log(accuracy) + (samples - k) * math.log1p(-accuracy)) for k, log in enumerate(logs)]
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
    for name in ("training.json", "eval.json", "log.jsonl"):
        (tmp_path / name).write_bytes((NANO / name).read_bytes())
    nano_card.write_card(tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") == (NANO / "README.md").read_text("utf-8")


def test_the_card_rests_on_enough_samples(measured: dict) -> None:
    assert list(measured["tasks"]) == [*TASKS] and measured["seeds"][1] - measured["seeds"][0] >= 1000
    assert all(found["samples"] >= 1000 for found in measured["tasks"].values())
    shares = [found["right"] / found["samples"] for found in measured["tasks"].values()]
    assert measured["overall"] == pytest.approx(sum(shares) / len(shares), abs=1e-4)


def test_other_ways_to_compute_answer_alike(measured: dict) -> None:
    """In half precision and through transformers: within noise as many right answers as in float32."""
    assert set(measured["ways"]) == {"bfloat16", "float16", "from_transformers", "transformers", "patched transformers"}
    for name, tasks in measured["ways"].items():
        for task, found in tasks.items():
            if name == "transformers" and task in ("motion", "order"):
                continue  # Its positions after a clip are others: the card says so.
            expected = measured["tasks"][task]["accuracy"]
            assert tail(found["right"], found["samples"], min(max(expected, 0.005), 0.995)) > 1e-4, (name, task)
            # A box has a score of digits, and one other digit of them makes another answer.
            assert found["same"] >= (0.6 if task == "box" else 0.8) * found["samples"], (name, task)


@pytest.fixture(scope="module")
def model() -> Qwen2VL:
    return Qwen2VL.from_pretrained(NANO, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def beyond(model: Qwen2VL, processor: Processor, measured: dict) -> Callable[[str], tuple[list, list[str]]]:
    """SAMPLES samples of a task beyond those of the card, and the answers in float32."""

    @functools.cache
    def answered(task: str) -> tuple[list, list[str]]:
        samples = nano_eval.unseen(task, SAMPLES, first=measured["tasks"][task]["samples"])
        return samples, nano_eval.answer(model, processor, samples)

    return answered


def check_accuracy(found: int, samples: int, promised: float, measured: int) -> None:
    """A checkpoint as good as it says fails once in 5000 times.

    The card's figure is itself an estimate; the kindest value within two standard errors of it is compared.
    """
    error = 2 * math.sqrt(max(promised * (1 - promised), 1 / measured) / measured)
    kindest = min(max(found / samples, promised - error), promised + error, 1 - 1e-6)
    assert tail(found, samples, kindest) > 1e-4, (found, samples, promised)


@pytest.mark.parametrize("task", TASKS)
def test_accuracy_on_unseen_samples_is_that_of_the_card(task: str, beyond: Callable, measured: dict) -> None:
    promised = measured["tasks"][task]
    result = nano_eval.score(*beyond(task))
    check_accuracy(result["right"], SAMPLES, promised["accuracy"], promised["samples"])


def test_accuracy_over_all_tasks_is_that_of_the_card(beyond: Callable, measured: dict) -> None:
    """The tasks' own bounds let each of them lose several points; all together may lose little."""
    found = sum(nano_eval.score(*beyond(task))["right"] for task in TASKS)
    check_accuracy(found, len(TASKS) * SAMPLES, measured["overall"], sum(t["samples"] for t in measured["tasks"].values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_answers_alike(dtype: torch.dtype, processor: Processor, beyond: Callable) -> None:
    """The first samples of every task, all together: nearly all answers are those of float32, and as many are right."""
    half = Qwen2VL.from_pretrained(NANO, device="cpu", dtype=dtype)
    same = changed = count = 0
    for task in TASKS:
        samples, said = (part[:20] for part in beyond(task))
        answers = nano_eval.answer(half, processor, samples)
        count += len(samples)
        same += sum(map(str.__eq__, said, answers))
        changed += nano_eval.score(samples, answers)["right"] - nano_eval.score(samples, said)["right"]
    assert same >= 0.9 * count and abs(changed) <= 0.03 * count, (same, changed, count)


def test_transformers_gives_the_same_answers(model: Qwen2VL, processor: Processor) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    theirs = Qwen2VLForConditionalGeneration.from_pretrained(NANO).float().eval()
    for task in TASKS:
        # transformers 5 has positions of its own after a clip with more frame pairs than rows and columns (MODEL.md section 4).
        many = nano_eval.unseen(task, 40)
        samples = [s for s in many if all(len(m.frames) <= 4 for m in s.media)][:8]
        assert samples
        inputs = processor([conversation(sample, answered=False) for sample in samples])
        start = inputs["input_ids"].shape[1]
        types = nano_eval.token_types(inputs["input_ids"], processor)
        prompt = peer_inputs(theirs, {**inputs, "mm_token_type_ids": types})
        expected = theirs.generate(**prompt, max_new_tokens=nano_eval.MAX_NEW_TOKENS, do_sample=False)[:, start:]
        got = nano_eval.answer(model, processor, samples)
        assert got == [processor.decode(row, False).split("<|im_end|>")[0] for row in expected], task


def test_a_large_video_and_a_greeting_are_answered(model: Qwen2VL) -> None:
    frames = [np.full((112, 112, 3), 60 * i, dtype=np.uint8) for i in range(4)]
    clip = [{"type": "video", "video": frames}, {"type": "text", "text": "What is this?"}]
    assert isinstance(model.chat([{"role": "user", "content": clip}], max_new_tokens=8), str)
    assert isinstance(model.chat([{"role": "user", "content": "Hello"}], max_new_tokens=8), str)


def trainer(stage: str, **changes) -> nano.Trainer:
    """A run whose first step is of a stage."""
    lengths = {
        nano.TEXT: {"text_steps": 50},
        nano.TOWER: {"text_steps": 0},
        nano.WHOLE: {"text_steps": 0, "tower_steps": 0, "decoder_steps": 0},
        nano.DECODER: {"text_steps": 0, "tower_steps": 0, "decoder_steps": 100},
    }[stage]
    recipe = nano.Recipe(**{"batch": 8, "tower_batch": 8, "readings": 0, "warmup": 1, "steps": 100, **lengths, **changes})
    run = nano.Trainer(recipe, Tokenizer.from_pretrained(NANO))
    assert run.stage == stage
    return run


@pytest.mark.parametrize("stage", nano.STAGES)
def test_steps_on_one_batch_reduce_its_loss(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(stage, tower_lr=5e-4, lr=5e-4)
    samples = run.samples()
    monkeypatch.setattr(run, "samples", lambda: samples)
    losses = [run.train_step()[0] for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("stage", [nano.TOWER, nano.WHOLE])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_resumed_run_repeats_the_bits(stage: str, dtype: str, tmp_path: Path) -> None:
    first = trainer(stage, dtype=dtype)
    for _ in range(2):
        first.train_step()
    first.levels["read"] = 1
    first.save(tmp_path)
    expected = [first.train_step() for _ in range(2)]
    second = trainer(stage, dtype=dtype)
    second.resume(tmp_path)
    assert (second.step, second.stage, second.levels["read"], second.samples_seen) == (2, stage, 1, 16)
    assert [second.train_step() for _ in range(2)] == expected
    assert all(torch.equal(weight, second.weights[name]) for name, weight in first.weights.items())


def test_a_stop_between_validations_raises_no_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano.Trainer, "validate", lambda run: dict.fromkeys(TASKS, 1.0))
    recipe = nano.Recipe(batch=2, tower_batch=2, readings=0, steps=100)
    for resume in (False, True, True):
        nano.train(tmp_path, recipe, minutes=0, resume=resume, validate_every=2)
    facts = json.loads((tmp_path / "checkpoint" / "training.json").read_text("utf-8"))
    assert facts["step"] == 3 and set(facts["levels"].values()) == {1}  # by the validation that was due at step 2


@pytest.mark.gpu
@pytest.mark.parametrize("stage", nano.STAGES)
def test_training_and_resuming_on_a_device(stage: str, tmp_path: Path) -> None:
    first = trainer(stage)
    assert all(weight.is_cuda for weight in first.weights.values())
    first.train_step()
    first.save(tmp_path)
    second = trainer(stage)
    second.resume(tmp_path)
    for run in (first, second):
        run.train_step()
    for name, weight in first.weights.items():
        torch.testing.assert_close(second.weights[name], weight, rtol=1e-3, atol=1e-4)


def test_readings_beside_conversations_change_the_tower_alone() -> None:
    """The loss is that of the conversations and the readings' share; the decoder's gradient is that of the conversations."""
    seen = []
    for readings in (0, 8):
        run = trainer(nano.WHOLE, readings=readings, clip=1e9)
        # A probe begins at zero, and then passes no gradient on.
        for parameter in run.probe.parameters():
            torch.nn.init.constant_(parameter, 0.01).data[::2] *= -1
        losses = [run.train_step()[0]]
        seen.append((losses[0], {name: weight.grad for name, weight in run.weights.items()}, run.samples_seen))
    (alone, before, few), (together, after, many) = seen
    assert together > alone and (few, many) == (8, 16)
    for name, grad in before.items():
        assert torch.equal(grad, after[name]) == name.startswith("model"), name


@pytest.mark.parametrize(
    ("stage", "trained"),
    [
        (nano.TEXT, {"model"}),
        (nano.TOWER, {"visual", "probe"}),
        (nano.WHOLE, {"visual", "probe", "model"}),
        (nano.DECODER, {"model"}),
    ],
)
def test_a_stage_trains_its_part_and_nothing_else(stage: str, trained: set[str]) -> None:
    run = trainer(stage, batch=32, tower_batch=32)
    before = {name: weight.detach().clone() for name, weight in run.weights.items()}
    run.train_step()
    changed = {name for name, weight in run.weights.items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[0] for name in changed} == trained
    if stage == nano.WHOLE:
        assert changed == set(before)


def test_stages_and_rates() -> None:
    recipe = nano.Recipe(
        steps=1000, text_steps=100, tower_steps=200, decoder_steps=50, tower_lr=2e-3, visual_lr=1e-3, warmup=50, cooldown=0.2
    )
    stages = [recipe.stage(step) for step in (0, 99, 100, 299, 300, 949, 950, 999)]
    assert stages == [s for s in nano.STAGES for _ in range(2)]
    rates = [recipe.rate(step) for step in (0, 49, 99, 100, 149, 300, 349, 800, 900, 999)]
    assert rates == pytest.approx([2e-5, 1e-3, 1e-3, 4e-5, 1.755e-3, 2e-5, 1e-3, 1e-3, 5e-4, 5e-6])
    assert recipe.rate(299) == pytest.approx(1.005e-3) and recipe.rate(900, visual=True) == pytest.approx(5e-4)


def test_levels_rise_with_accuracy_alone() -> None:
    run = trainer(nano.WHOLE)
    run.promote({"read": nano.PROMOTE, "count": nano.PROMOTE - 0.01})
    assert run.levels == {task: int(task == "read") for task in TASKS}
    for _ in range(9):
        run.promote(dict.fromkeys(TASKS, 1.0))
    assert run.levels == nano.MAX_LEVEL


def test_shares_are_shares_of_known_tasks() -> None:
    for shares in nano.SHARES.values():
        assert set(shares) <= set(TASKS) and sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_muon_steps_are_orthogonal_and_of_the_promised_size(shape: tuple[int, int]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    values = torch.linalg.svdvals(orthogonal(gradient))
    # A square random matrix has some values too small for five steps.
    assert values.max() < 1.3 and values.median() > 0.6 and (shape[0] == shape[1] or values.min() > 0.6)
    assert torch.nn.functional.cosine_similarity(orthogonal(gradient).flatten(), (u @ v).flatten(), 0) > 0.9
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = gradient
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5)
    optimizer.step()
    expected = -0.1 * 0.2 * math.sqrt(max(shape)) * orthogonal(gradient + 0.95 * gradient)
    torch.testing.assert_close(weight.detach(), expected)
    assert 0.01 < weight.square().mean().sqrt() < 0.03


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano, "VALIDATION_SAMPLES", 2)
    monkeypatch.setattr(nano, "keep_memory", lambda: None)
    out = tmp_path / "run"
    short = [
        "--minutes",
        "0",
        "--batch",
        "2",
        "--tower-batch",
        "2",
        "--readings",
        "0",
        "--text-steps",
        "1",
        "--tower-steps",
        "1",
    ]
    assert nano.main(["train", "--out", str(out), "--init", str(NANO), *short]) == 0
    with pytest.raises(ValueError, match="--resume"):
        nano.main(["train", "--out", str(out), *short])
    for other in (["--seed", "1"], ["--init", str(NANO)]):
        with pytest.raises(ValueError, match=f"{other[0][2:]}: "):
            nano.main(["train", "--out", str(out), "--resume", *short, *other])
    for _ in range(2):
        assert nano.main(["train", "--out", str(out), "--resume", *short]) == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    assert [(line["step"], line["stage"], line["samples"]) for line in lines] == [
        (1, "text", 2),
        (2, "tower", 4),
        (3, "whole", 6),
    ]
    assert set(lines[2]["accuracy"]) == {*TASKS} and not list(out.glob("**/*.tmp"))
    checkpoint = out / "checkpoint"
    facts = json.loads((checkpoint / "training.json").read_text("utf-8"))
    assert [call["init"] for call in facts["history"]] == ["nano", None, None] and facts["samples"] == 6
    before = json.loads((NANO / "training.json").read_text("utf-8"))
    assert facts["history"][0]["init_samples"] == before["samples"] and facts["levels"] == before["levels"]
    assert nano.main(["eval", str(checkpoint), "--samples", "2", "--compare", "1"]) == 0
    found = json.loads((checkpoint / "eval.json").read_text("utf-8"))
    assert found["tasks"]["count"]["samples"] == 2 and found["ways"]["bfloat16"]["read"]["samples"] == 1
    other = tmp_path / "other.json"
    arguments = ["eval", str(checkpoint), "--samples", "1", "--compare", "0", "--backend", "torch", "--out", str(other)]
    assert nano.main(arguments) == 0 and json.loads(other.read_text("utf-8"))["command"].endswith("--backend torch")
    assert nano.main(["card", str(checkpoint)]) == 0 and nano.main(["plot", str(checkpoint)]) == 0
    assert (checkpoint / "README.md").read_text("utf-8").startswith("---\nlicense")
    assert (checkpoint / "curves.png").stat().st_size > 5000
    assert capsys.readouterr().out
    with pytest.raises(ValueError, match="is missing"):
        nano.main(["train", "--out", str(tmp_path / "none"), "--resume"])
    for arguments in (["--samples", "0"], ["--samples", "2", "--compare", "3"]):
        with pytest.raises(ValueError, match="expected"):
            nano.main(["eval", str(checkpoint), *arguments])


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    run = trainer(nano.TEXT)
    run.save(tmp_path)
    state = tmp_path / nano.STATE
    with pytest.raises(ValueError, match="parameters"):
        nano.load_state(state, {"other": torch.zeros(1)}, run.optimizers)
    name = "visual.merger.ln_q.weight"
    with pytest.raises(ValueError, match="shape"):
        nano.load_state(state, {**run.weights, name: torch.zeros(3)}, run.optimizers)
