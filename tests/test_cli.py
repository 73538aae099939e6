"""The command line: what it prints, how it fails, and that the demo's numbers are what they say."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl_fast import cli, demo, doctor
from qwen2vl_fast.chat import Processor
from qwen2vl_fast.config import Config
from qwen2vl_fast.model import Qwen2VL
from qwen2vl_fast.training import nano, tasks
from tests.chatting import FakeModel

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of nano's shape with random weights."""
    torch.manual_seed(0)
    model = Qwen2VL(Config.from_pretrained(cli.NANO))
    model.source = cli.NANO
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder) -> Qwen2VL:
    return Qwen2VL.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def processor(folder) -> Processor:
    return Processor.from_pretrained(folder)


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.full((56, 84, 3), 200, dtype=np.uint8)).save(path)
    return path


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# The pictures of the demo.


def test_samples_on_show_are_the_generators_and_of_its_test_seeds():
    entries = [entry for entry in json.loads((demo.PICTURES / "pictures.json").read_text()) if entry["nano"]]
    shown = [picture for picture in demo.pictures() if picture.nano]
    assert {entry["task"] for entry in entries} == {*tasks.TASKS} - {"copy", "sum"}
    twice = {}
    for entry, picture in zip(entries, shown, strict=True):
        assert entry["seed"] in tasks.TEST_SEEDS
        sample = tasks.generate(entry["task"], entry["seed"])
        assert sample.turns == (*picture.before, (picture.question, picture.answer))
        for source, medium in zip(picture.sources, sample.media, strict=True):
            frames = source if isinstance(source, list) else [source]
            assert np.array_equal(np.stack([np.asarray(Image.open(frame)) for frame in frames]), medium.frames)
        twice.setdefault(picture.name, []).append(picture.options)
    # One picture is asked about at two resolutions.
    assert sorted(len(options) for options in twice.values())[-2:] == [1, 2]


def test_pictures_beyond_nano_are_there_and_small():
    shown = {picture.name: picture for picture in demo.pictures()}
    beyond = {name: picture for name, picture in shown.items() if not picture.nano}
    assert set(beyond) == {"photo.jpg", "page.png", "clip"}
    assert [path.name for path in shown["clip"].sources[0]] == [f"{i:02}.png" for i in range(8)]
    assert sum(path.stat().st_size for path in demo.PICTURES.rglob("*.*")) < 400_000


# demo.


def test_a_run_is_timed_without_overlap_and_runs_the_tower_once(model, processor):
    calls = []
    handle = model.visual.register_forward_hook(lambda *_: calls.append(1))
    picture = demo.pictures()[0]
    start = time.perf_counter()
    run = demo.ask(model, processor, picture.messages, max_new_tokens=5)
    wall = time.perf_counter() - start
    handle.remove()
    assert calls == [1]
    assert not model.visual._forward_hooks and not model.visual._forward_pre_hooks
    stages = (run.preprocess, run.tower, run.prefill, run.decode)
    assert min(stages) > 0 and sum(stages) <= wall
    inputs = processor(picture.messages)
    assert (run.prompt, run.patches) == (inputs["input_ids"].shape[1], inputs["pixel_values"].shape[0])
    answer = model.generate(**inputs, max_new_tokens=5, seed=0)[0, run.prompt :]
    assert run.text == processor.decode(answer, False) and 1 <= run.tokens == len(answer)


def test_demo_shows_every_picture_with_its_size_and_tokens(capsys, folder):
    code, out, err = run(capsys, "demo", "--model", folder, "--max-new-tokens", 2, "--device", "cpu")
    assert code == 0 and "4.83 million parameters, float32 on cpu" in err
    assert "photo.jpg: 896 x 672 px, 3072 patches, 768 visual tokens" in out
    assert "page.png: 644 x 868 px, 2852 patches, 713 visual tokens" in out
    assert "clip: 8 frames of 196 x 140 px, " in out
    for picture in demo.pictures():
        assert f"{picture.name}: " in out and f"question    {picture.question}" in out
    count = len(demo.pictures())
    for stage in ("preprocess ", "tower ", "prefill "):
        assert out.count(stage) == count
    # Another model is not measured by nano's tasks, nor by exact words.
    assert out.count("(expected: ") == count and "beyond" not in out and "right\n" not in out


def test_demo_of_nano_marks_its_tasks_and_labels_the_others(capsys, folder, monkeypatch):
    monkeypatch.setattr(cli, "NANO", folder)
    own = [picture for picture in demo.pictures() if picture.nano]

    def answer(model, processor, messages, *, max_new_tokens):
        # The first of nano's own questions is answered wrongly, everything else rightly.
        question = messages[-1]["content"][-1]["text"]
        known = {picture.question: picture.answer for picture in demo.pictures()}
        source = next(value for key, value in messages[0]["content"][0].items() if key != "type")
        text = "x" if source == own[0].sources[0] else next((p.answer for p in own if p.sources[0] == source), known[question])
        return demo.Run(text, 9, 3, 16, 0.1, 0.2, 0.3, 0.4)

    monkeypatch.setattr(demo, "ask", answer)
    code, out, _ = run(capsys, "demo", "--model", folder)
    assert code == 0
    assert f"nano's own tasks: {len(own) - 1} of {len(own)} right" in out
    assert f"wrong (expected: {own[0].answer})" in out
    assert out.count("beyond nano's training") == len(demo.pictures()) - len(own)
    assert "preprocess 100 ms, tower 200 ms, prefill 300 ms for 9 tokens, decode 400 ms for 2 more, 5 tokens/s" in out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0000123, "0.01 ms"),
        (0.00123, "1.23 ms"),
        (0.0123, "12.3 ms"),
        (0.123, "123 ms"),
        (1.234, "1.23 s"),
        (61.26, "61.3 s"),
    ],
)
def test_duration(seconds, text):
    assert demo.duration(seconds) == text


# chat.


def test_chat_prints_what_the_model_says(capsys, folder, model, picture):
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]}]
    expected = model.chat(messages, max_new_tokens=8)
    for question in (["What is this?"], ["What", "is", "this?"]):
        code, out, _ = run(capsys, "chat", "--model", folder, "--max-new-tokens", 8, "--device", "cpu", picture, *question)
        assert code == 0
        spelled = "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in expected)
        assert out == spelled + "\n" * bool(spelled)


def fake_loading(monkeypatch, processor, rows) -> FakeModel:
    model = FakeModel(processor, rows)
    model.prompts = []
    stream = model.stream

    def recorded(input_ids, **arguments):
        model.prompts.append(processor.decode(input_ids[0], skip_special_tokens=False))
        return stream(input_ids, **arguments)

    model.stream = recorded
    monkeypatch.setattr(cli, "load", lambda arguments: (model, processor))
    return model


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def test_a_conversation_keeps_its_turns_and_resets(capsys, monkeypatch, processor, picture):
    model = fake_loading(monkeypatch, processor, [processor.tokenizer.encode("yes")])
    lines = [
        f"/image '{picture}'",
        "what?",
        "/image nothing.png",
        "and now?",
        "",
        "/foo",
        "/help",
        "/reset",
        "again",
        "/quit",
        "no",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    code, out, err = run(capsys, "chat", "--max-pixels", 3136)
    assert code == 0 and err == ""
    seen = "<|vision_start|>" + "<|image_pad|>" * 2 + "<|vision_end|>"
    opening = "<|im_start|>assistant\n"
    first = turn("user", f"{seen}what?")
    assert model.prompts == [
        first + opening,
        first + turn("assistant", "yes") + turn("user", "and now?") + opening,
        turn("user", "again") + opening,
    ]
    assert out.splitlines()[:4] == [
        f"attached {picture}; 1 with the next question",
        "yes",
        "error: nothing.png: no such file",
        "yes",
    ]
    assert "/foo is no command" in out and out.splitlines()[-1] == "yes"


def test_an_error_in_a_conversation_leaves_no_trace(capsys, monkeypatch, processor, picture):
    model = fake_loading(monkeypatch, processor, [processor.tokenizer.encode("ok")])
    damaged = picture.with_name("damaged.png")
    damaged.write_bytes(b"\x89PNG\r\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {damaged}\nwhat?\nhello\n"))
    code, out, _ = run(capsys, "chat")
    assert code == 0
    assert out.splitlines()[1].startswith("error: conversation 0, message 0, part 0: ") and out.splitlines()[2:] == ["ok"]
    assert model.prompts == [turn("user", "hello") + "<|im_start|>assistant\n"]


def interrupted(model: FakeModel, processor: Processor, after: int) -> None:
    tokens = processor.tokenizer.encode("abcdef")

    def stream(input_ids, **arguments):
        model.prompts.append(processor.decode(input_ids[0], skip_special_tokens=False))
        for token in tokens[:after]:
            yield torch.tensor([token])
        raise KeyboardInterrupt

    model.stream = stream


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(capsys, monkeypatch, processor):
    model = fake_loading(monkeypatch, processor, [[0]])
    interrupted(model, processor, after=2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    code, out, _ = run(capsys, "chat")
    assert code == 0 and out == "ab [stopped]\nab [stopped]\n"
    assert model.prompts[1] == turn("user", "one") + turn("assistant", "ab") + turn("user", "two") + "<|im_start|>assistant\n"


def test_ctrl_c_before_an_answer_ends_the_command_without_a_traceback(capsys, monkeypatch, processor):
    model = fake_loading(monkeypatch, processor, [[0]])
    interrupted(model, processor, after=0)
    assert run(capsys, "chat", "hello") == (130, "", "\n")


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(None, {}), ("0.7", {"do_sample": True, "temperature": 0.7}), ("0", {"do_sample": False})],
)
def test_temperature(capsys, monkeypatch, processor, temperature, expected):
    model = fake_loading(monkeypatch, processor, [[65]])
    assert run(capsys, "chat", *(["--temperature", temperature] if temperature else []), "--seed", 3, "hi")[1] == "A\n"
    chosen = {key: model.arguments[key] for key in ("do_sample", "temperature") if key in model.arguments}
    assert chosen == expected and model.arguments["seed"] == 3


def test_media_by_extension(tmp_path, picture):
    (tmp_path / "frames").mkdir()
    for i in (1, 0):
        Image.new("RGB", (56, 56)).save(tmp_path / "frames" / f"{i}.png")
    (tmp_path / "frames" / "notes.txt").touch()
    (tmp_path / "a.MP4").touch()
    assert cli.medium(str(picture)) == {"type": "image", "image": picture}
    assert cli.medium(str(tmp_path / "a.MP4")) == {"type": "video", "video": tmp_path / "a.MP4"}
    frames = [tmp_path / "frames" / "0.png", tmp_path / "frames" / "1.png"]
    assert cli.medium(str(tmp_path / "frames")) == {"type": "video", "video": frames}


def test_files_come_before_the_question(picture, monkeypatch):
    monkeypatch.chdir(picture.parent)
    assert cli.split([]) == ([], "")
    assert cli.split(["What", "is", "it?"]) == ([], "What is it?")
    assert cli.split(["picture.png", "missing.jpg", "What is it?"]) == (["picture.png", "missing.jpg"], "What is it?")
    assert cli.split(["picture.png", "compare it with b.png"]) == (["picture.png"], "compare it with b.png")
    assert cli.split(["my picture.png"]) == (["my picture.png"], "")


def test_nothing_of_a_model_controls_the_terminal(capsys):
    cli.say("a\x1b[2Jb\x07\x9b\u202e\tc\n")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\x07\\x9b\\x202e\tc\n\n"


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "no.png", "hi"], "no.png: no such file"),
        (["chat", "--model", "no/such/model", "hi"], "no/such/model: expected a checkpoint folder or a repository id"),
        (["demo", "--model", "EMPTY"], "config.json"),
        (["chat", "EMPTY", "hi"], "expected a folder of frames"),
        (["chat", "EMPTY/notes.txt", "hi"], "notes.txt: expected a file ending in "),
        (["chat", "--model", "MODEL", "--device", "cpu", "EMPTY/damaged.png", "hi"], "conversation 0, message 0, part 0: "),
        (["chat", "--model", "MODEL", "--device", "cpu", "--backend", "abacus", "hi"], "backend"),
        (["chat", "--model", "MODEL", "--device", "cpu", "--max-new-tokens", "-1", "hi"], "max_new_tokens: "),
        (["bench", "nothing"], "bench: expected one of "),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(capsys, tmp_path, folder, arguments, message):
    arguments = [a.replace("EMPTY", str(tmp_path)).replace("MODEL", str(folder)) for a in arguments]
    if arguments[-2].endswith("notes.txt"):
        (tmp_path / "notes.txt").touch()
    if arguments[-2].endswith("damaged.png"):
        (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n")
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("qwen2vl-fast: error: ") and message in last
    assert "Traceback" not in err and len(err.splitlines()) <= 2


def test_a_bug_shows_where_it_is(monkeypatch):
    def broken(arguments):
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "load", broken)
    with pytest.raises(KeyError):
        cli.main(["demo"])


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "warm"])
def test_a_temperature_is_not_negative(capsys, value):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["chat", "--temperature", value, "hi"])
    assert stopped.value.code == 2 and f"expected a number of 0 or more, got '{value}'" in capsys.readouterr().err


def test_what_is_attached_is_what_it_was_called(capsys, monkeypatch, processor, picture):
    model = fake_loading(monkeypatch, processor, [processor.tokenizer.encode("ok")])
    lines = ["/image", "/video", f"/video {picture}", f"/image {demo.PICTURES / 'clip'}", "hello"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    monkeypatch.chdir(picture.parent)
    code, out, _ = run(capsys, "chat")
    assert code == 0 and out.splitlines() == [
        *["error: expected the name of a file, got none"] * 2,
        f"error: {picture}: this is no video; attach it with /image",
        f"error: {demo.PICTURES / 'clip'}: this is no image; attach it with /video",
        "ok",
    ]
    assert model.prompts == [turn("user", "hello") + "<|im_start|>assistant\n"]


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["demo", "--device", "gramophone"], ["demo", "--device", "cuda:99"], ["train", "72b"]]
)
def test_wrong_usage(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2 and "usage: qwen2vl-fast" in capsys.readouterr().err


# Dispatch.


def test_doctor_train_and_eval_go_where_they_belong(monkeypatch):
    monkeypatch.setattr(doctor, "main", lambda argv: ("doctor", argv))
    monkeypatch.setattr(nano, "main", lambda argv: ("nano", argv))
    assert cli.main(["doctor"]) == ("doctor", [])
    assert cli.main(["train", "nano", "--out", "runs/a", "--resume"]) == ("nano", ["train", "--out", "runs/a", "--resume"])
    assert cli.main(["eval", "nano", "runs/a", "--samples", "5"]) == ("nano", ["eval", "runs/a", "--samples", "5"])


def test_bench_runs_the_subjects_of_the_checkout(capfd, monkeypatch, tmp_path):
    (tmp_path / "bench").mkdir()
    for name in ("__init__", "timing", "report", "one", "two"):
        (tmp_path / "bench" / f"{name}.py").write_text(
            f"import sys; print('{{\"name\": \"{name}\", \"words\":', len(sys.argv), '}}'); sys.exit({int(name == 'two')})"
        )
    (tmp_path / "bench" / "__init__.py").write_text("")
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    assert cli.main(["bench", "one", "--repeats", "2"]) == 0
    one = {"name": "one", "words": 3}
    assert json.loads(capfd.readouterr().out) == one
    assert cli.main(["bench"]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [{"name": name, "words": 1} for name in ("one", "two")]
    for words in (["all", "--json"], ["--json"]):
        assert cli.main(["bench", *words]) == 1
        assert json.loads(capfd.readouterr().out) == {"one": one | {"words": 2}}, "one object, without those that failed"


def test_bench_without_a_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    code, _, err = run(capsys, "bench")
    assert code == 2 and "benchmarks live in the repository" in err


def test_the_module_runs_as_a_command(folder):
    command = [
        sys.executable,
        "-m",
        "qwen2vl_fast.cli",
        "chat",
        "--model",
        str(folder),
        "--device",
        "cpu",
        "--max-new-tokens",
        "4",
    ]
    result = subprocess.run([*command, "hi"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "million parameters" in result.stderr
    result = subprocess.run([*command, "no.png", "hi"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "qwen2vl-fast: error: no.png: no such file\n")


def test_a_reader_that_leaves_early_is_no_error(folder):
    command = f"{sys.executable} -m qwen2vl_fast.cli demo --model {folder} --device cpu --max-new-tokens 1 | head -1"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in result.stderr and "error" not in result.stderr


def test_waiting_writes_to_a_terminal_alone(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, expected in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        with cli._Waiting("loading"):
            time.sleep(0.3)
        assert ("loading ... 0 s" in stream.getvalue()) is expected
        assert stream.getvalue().endswith("\r\x1b[K") is expected


def test_reasons_are_one_line():
    assert cli._reason(ValueError("a\n  b")) == "a b"
    assert cli._reason(FileNotFoundError(2, "No such file", "x")) == "No such file: x"
    assert cli._reason(ValueError()) == "ValueError"
