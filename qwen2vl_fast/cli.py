"""qwen2vl-fast demo | chat | bench | doctor | train | eval"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from . import demo as demonstration
from . import doctor
from .chat import Processor, chat
from .model import Qwen2VL

NANO = Path(__file__).parent / "assets" / "nano"
CHECKOUT = Path(__file__).resolve().parent.parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Files of bench/ that measure nothing by themselves, or are no part of a run of everything.
NO_SUBJECTS = frozenset((
    "__init__", "timing", "peers", "passes", "report", "plots", "sanitize", "micro", "sweep", "variants", "profile",
))  # fmt: skip
IMAGES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"))
VIDEOS = frozenset((".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".flv"))

HELP = """\
  /image FILE   attach a picture to the next question
  /video FILE   attach a video, or a folder of frames
  /reset        forget the conversation
  /quit         leave (Ctrl-D does too; Ctrl-C stops an answer)"""


def say(text: str, end: str = "\n", file: Any = None) -> None:
    """Prints text that a model or a file may have written, with control characters spelled out: none reaches the terminal."""
    print("".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text), end=end, file=file, flush=True)


class _Waiting:
    """Shows on a terminal's standard error that something goes on, and for how long."""

    def __init__(self, what: str) -> None:
        self._what, self._over = what, threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> None:
        if sys.stderr.isatty():
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _tick(self) -> None:
        start = time.perf_counter()
        while not self._over.wait(0.2):
            print(f"\r{self._what} ... {time.perf_counter() - start:.0f} s", end="", file=sys.stderr, flush=True)


def load(arguments: argparse.Namespace) -> tuple[Qwen2VL, Processor]:
    """The model that the arguments name, and its processor; says on standard error what was loaded."""
    start = time.perf_counter()
    name = "nano" if arguments.model == str(NANO) else arguments.model
    # A download shows its own progress.
    with _Waiting(f"loading {name}") if os.path.isdir(arguments.model) else nullcontext():
        model = Qwen2VL.from_pretrained(
            arguments.model, device=arguments.device, dtype=DTYPES.get(arguments.dtype), backend=arguments.backend
        )
        processor = Processor.from_pretrained(model.source)
    count = sum(parameter.numel() for parameter in model.parameters())
    size = f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"
    dtype = str(model.dtype).removeprefix("torch.")
    seconds = demonstration.duration(time.perf_counter() - start)
    say(f"{name}: {size} parameters, {dtype} on {model.device}, loaded in {seconds}", file=sys.stderr)
    return model, processor


def run_demo(arguments: argparse.Namespace) -> int:
    model, processor = load(arguments)
    nano = arguments.model == str(NANO)
    demonstration.show(model, processor, nano=nano, max_new_tokens=arguments.max_new_tokens, write=say)
    return 0


def medium(path: str) -> dict[str, Any]:
    """The part of a message for a file: an image or a video by its extension; a folder is the frames of a video."""
    if not path:
        raise ValueError("expected the name of a file, got none")
    file = Path(path).expanduser()
    if file.is_dir():
        frames = sorted(frame for frame in file.iterdir() if frame.suffix.lower() in IMAGES)
        if not frames:
            raise ValueError(f"{path}: expected a folder of frames ({', '.join(sorted(IMAGES))}), found none in it")
        return {"type": "video", "video": frames}
    if not file.exists():
        raise FileNotFoundError(f"{path}: no such file")
    kind = {**dict.fromkeys(IMAGES, "image"), **dict.fromkeys(VIDEOS, "video")}.get(file.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: expected a file ending in {', '.join(sorted(IMAGES | VIDEOS))}")
    return {"type": kind, kind: file}


def split(items: Sequence[str]) -> tuple[list[str], str]:
    """Files and the question, which is what follows the last leading item that exists or is spelled like a file.

    "compare it with b.png" after a file is a question unless there is a file of that name.
    """

    def is_file(index: int, item: str) -> bool:
        spelled = Path(item).suffix.lower() in IMAGES | VIDEOS and (index == 0 or " " not in item)
        return spelled or os.path.exists(os.path.expanduser(item))

    count = next((i for i, item in enumerate(items) if not is_file(i, item)), len(items))
    return list(items[:count]), " ".join(items[count:])


class Conversation:
    """A conversation at the terminal. A question that fails leaves no trace, nor do the files that came with it."""

    def __init__(self, model: Any, processor: Processor, arguments: argparse.Namespace) -> None:
        self._model, self._processor, self._arguments = model, processor, arguments
        self.messages: list[dict[str, Any]] = []
        self.attached: list[dict[str, Any]] = []

    def attach(self, path: str, kind: str | None = None) -> None:
        """`kind` is what the user called it."""
        part = medium(path)
        if kind not in (None, part["type"]):
            raise ValueError(f"{path}: this is no {kind}; attach it with /{part['type']}")
        if self._arguments.max_pixels is not None:
            part["max_pixels"] = self._arguments.max_pixels
        self.attached.append(part)

    def ask(self, question: str) -> None:
        """Prints the answer while it comes. Ctrl-C ends it there, and what was said so far stays in the conversation."""
        turn = {"role": "user", "content": [*self.attached, {"type": "text", "text": question}]}
        self.attached = []
        answer = ""
        try:
            for piece in self._pieces([*self.messages, turn]):
                say(piece, end="")
                answer += piece
        except KeyboardInterrupt:
            if not answer:
                raise
            say(" [stopped]", end="")
        finally:
            if answer:
                print()
        if not answer:
            say("(no text)", file=sys.stderr)
        self.messages += [turn, {"role": "assistant", "content": answer}]

    def reset(self) -> None:
        self.messages, self.attached = [], []

    def _pieces(self, messages: list[dict[str, Any]]) -> Iterator[str]:
        arguments = self._arguments
        sampling = {} if arguments.temperature is None else _sampling(arguments.temperature)
        pieces = chat(
            self._model,
            self._processor,
            messages,
            max_new_tokens=arguments.max_new_tokens,
            stream=True,
            seed=arguments.seed,
            **sampling,
        )
        # The first piece comes after preprocessing, tower and prefill.
        with _Waiting("reading"):
            first = next(pieces, "")
        yield first
        yield from pieces


def _sampling(temperature: float) -> dict[str, Any]:
    return {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}


def run_chat(arguments: argparse.Namespace) -> int:
    files, question = split(arguments.items)
    # Wrong names are told before minutes of loading.
    for file in files:
        medium(file)
    conversation = Conversation(*load(arguments), arguments)
    for file in files:
        conversation.attach(file)
    if question:
        conversation.ask(question)
        return 0
    return _interact(conversation)


def _interact(conversation: Conversation) -> int:
    """Questions from standard input until it ends; errors are told and the conversation goes on."""
    terminal = sys.stdin.isatty()
    if terminal:
        say(f"Ask a question, or:\n{HELP}")
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            print()
            break
        command, _, rest = line.partition(" ")
        rest = rest.strip().strip("'\"")
        try:
            if command in ("/quit", "/exit"):
                break
            elif command == "/reset":
                conversation.reset()
            elif command == "/help":
                say(HELP)
            elif command in ("/image", "/video"):
                conversation.attach(rest, command[1:])
                say(f"attached {rest}; {len(conversation.attached)} with the next question")
            elif command.startswith("/"):
                say(f"{command} is no command; the commands are\n{HELP}")
            elif line:
                conversation.ask(line)
        except KeyboardInterrupt:
            print()
        except Exception as error:
            if not _is_expected(error):
                raise
            say(f"error: {_reason(error)}")
    return 0


def subjects() -> list[str]:
    """What there is to measure in a checkout."""
    names = (path.stem for path in (CHECKOUT / "bench").glob("*.py"))
    return sorted(name for name in names if name not in NO_SUBJECTS and not name.startswith("test_"))


def run_bench(arguments: argparse.Namespace) -> int:
    """The benchmarks of a checkout, one subject or all, each in a process of its own."""
    known = subjects()
    if not known:
        raise FileNotFoundError("benchmarks live in the repository; install a checkout with pip install -e and run this again")
    if arguments.list:
        say("\n".join(known))
        return 0
    wanted = known if arguments.subject == "all" else [arguments.subject]
    if wanted[0] not in known:
        raise ValueError(f"bench: expected one of {', '.join(known)}, or all, got {arguments.subject!r}")
    commands = [[sys.executable, "-m", f"bench.{name}", *arguments.rest] for name in wanted]
    if len(wanted) == 1 or "--json" not in arguments.rest:
        return max(subprocess.run(command, cwd=CHECKOUT).returncode for command in commands)
    runs = [subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE) for command in commands]
    results = [json.loads(run.stdout) for run in runs if not run.returncode]
    say(json.dumps({result["name"]: result for result in results}, indent=2))
    return max(run.returncode for run in runs)


def run_doctor(arguments: argparse.Namespace) -> int:
    return doctor.main([])


def run_training(arguments: argparse.Namespace) -> int:
    from .training import nano

    return nano.main([arguments.command, *arguments.rest])


def parser() -> argparse.ArgumentParser:
    main_parser = argparse.ArgumentParser(prog="qwen2vl-fast", description="Qwen2-VL, fast.")
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    models = argparse.ArgumentParser(add_help=False)
    models.add_argument(
        "--model", default=str(NANO), metavar="MODEL", help="a checkpoint's folder or repository id (default: nano)"
    )
    models.add_argument("--device", type=_device, help="cpu, cuda, cuda:1, ... (default: CUDA if there is one)")
    models.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    models.add_argument("--backend", help="prefer this backend for every op that has it (see doctor)")

    demo = commands.add_parser("demo", parents=[models], help="ask about pictures that ship with the package, with timings")
    demo.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of each answer (default: 64)")
    demo.set_defaults(run=run_demo)

    talk = commands.add_parser(
        "chat",
        parents=[models],
        help="ask about your own pictures and videos, or talk",
        description="Files and a question; without a question, a conversation:\n" + HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    talk.add_argument("items", nargs="*", metavar="ITEM", help="pictures, videos, folders of frames; then the question")
    talk.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of each answer (default: 512)")
    talk.add_argument("--max-pixels", type=int, metavar="N", help="lower the resolution of pictures and frames to this area")
    talk.add_argument("--temperature", type=_temperature, help="of sampling; 0 is greedy (default: the checkpoint's)")
    talk.add_argument("--seed", type=int, help="of sampling")
    talk.set_defaults(run=run_chat)

    bench = commands.add_parser("bench", help="timings on this machine (in a checkout)")
    bench.add_argument("subject", nargs="?", default="all", help="one file of bench/ (default: all)")
    bench.add_argument("--list", action="store_true", help="name the subjects")
    bench.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="handed to it")
    bench.set_defaults(run=run_bench)

    commands.add_parser("doctor", help="versions, devices, backends and what each lacks").set_defaults(run=run_doctor)

    for name, text in (("train", "train a model"), ("eval", "measure a trained model")):
        training = commands.add_parser(name, help=text)
        training.add_argument("what", choices=("nano",))
        training.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help=f"see: qwen2vl-fast {name} nano --help")
        training.set_defaults(run=run_training)
    return main_parser


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, got {text!r}")
    return value


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected cpu, cuda, cuda:1, ..., got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{name}: {torch.cuda.device_count()} CUDA devices found; see qwen2vl-fast doctor")
    return device


def _is_expected(error: Exception) -> bool:
    """Whether an error is about what was given, and its message is meant for the user; others show where they came from."""
    kinds = (ValueError, TypeError, OSError, ImportError, RuntimeError)
    return isinstance(error, kinds) or type(error).__module__.startswith(("huggingface_hub", "httpx"))


def _reason(error: Exception) -> str:
    """One line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns 0, or 2 after an error that was told in one line, or 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["bench"] and words[1:2] not in ([], ["--list"], ["--help"], ["-h"]) and words[1].startswith("-"):
        words.insert(1, "all")
    arguments = parser().parse_args(words)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output left (`| head`); what Python flushes at exit must not fail on it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if not _is_expected(error):
            raise
        say(f"qwen2vl-fast: error: {_reason(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
