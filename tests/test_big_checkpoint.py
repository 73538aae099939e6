"""The real 2B configuration with random weights in bf16: mapped, not copied, and it answers on the CPU within 24 GB."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen2vl_fast import Qwen2VL
from qwen2vl_fast.config import Config
from tests.models import picture
from tests.test_config import released

GB = 10**9
PARAMETERS = 2_208_985_600  # tower and merger 665 M, decoder 1310 M, embeddings 233 M
SHARD_BYTES = 2 * GB


def write_random_checkpoint(folder: Path) -> int:
    """Random bf16 weights under the released names, a shard in memory at a time. Returns the bytes of all weights."""
    raw = released("2B")
    (folder / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Qwen2VL(Config.from_dict(raw)).named_parameters()}
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size + 2 * shape.numel() > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * shape.numel()
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            tensor = torch.empty(shapes[name], dtype=torch.bfloat16)
            if len(shapes[name]) == 1:
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                tensor.uniform_(-0.03, 0.03, generator=generator)
            tensors[name] = tensor
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(2 * shape.numel() for shape in shapes.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return total


def memory() -> dict[str, int]:
    """Bytes: the largest resident set so far, and what of the memory now is anonymous, that is, in no file."""
    lines = Path("/proc/self/status").read_text() + Path("/proc/self/smaps_rollup").read_text().partition("\n")[2]
    fields = dict(line.split(":", 1) for line in lines.splitlines())
    return {name: int(fields[key].split()[0]) * 1024 for name, key in (("peak", "VmHWM"), ("anonymous", "Anonymous"))}


def answer(folder: Path) -> dict[str, object]:
    """Loads, looks at a picture, answers a question of random ids; what that took."""
    from qwen2vl_fast.media import preprocess_images

    report: dict[str, object] = {"start": memory()}
    start = time.perf_counter()
    model = Qwen2VL.from_pretrained(folder, device="cpu")
    report["load_s"] = time.perf_counter() - start
    report["loaded"] = memory()
    report["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    report["dtype"] = str(model.dtype)
    pixels, grid = preprocess_images([picture(336, 448)])
    config = model.config
    placeholders = [config.image_token_id] * (int(grid.prod()) // 4)
    prompt = [151644, 872, 198, config.vision_start_token_id, *placeholders, config.vision_end_token_id, 3838, 374, 419, 30]
    start = time.perf_counter()
    tokens = []
    for step in model.stream(
        torch.tensor([prompt]), pixel_values=pixels, image_grid_thw=grid, max_new_tokens=5, eos_token_id=[], do_sample=False
    ):
        tokens.append(int(step))
        report.setdefault("first_token_s", time.perf_counter() - start)
    report["answer_s"] = time.perf_counter() - start
    report["tokens"], report["prompt_tokens"] = tokens, len(prompt)
    report["answered"] = memory()
    return report


@pytest.mark.full
def test_two_billion_parameters(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    if free < 6 * GB:
        pytest.fail(f"this test writes 4.4 GB of weights; {tmp_path} has {free / GB:.1f} GB free")
    start = time.perf_counter()
    try:
        size = write_random_checkpoint(tmp_path)
        written = time.perf_counter() - start
        command = [sys.executable, "-m", "tests.test_big_checkpoint", str(tmp_path)]
        # Beside other work, threads that spin at the end of each parallel region take up to a hundred times as long.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1500)
    finally:
        shutil.rmtree(tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(json.dumps({"write_s": written, **report}))
    assert report["parameters"] == PARAMETERS and report["dtype"] == "torch.bfloat16" and size == 2 * PARAMETERS
    added = report["loaded"]["anonymous"] - report["start"]["anonymous"]
    assert added < size / 20, f"copied, not mapped: {added / GB:.2f} GB of anonymous memory for {size / GB:.2f} GB of weights"
    assert report["answered"]["peak"] < 24 * GB
    assert report["answered"]["anonymous"] < size / 2, "the weights were copied while answering"
    assert len(report["tokens"]) == 5 and all(0 <= token < 151936 for token in report["tokens"])


if __name__ == "__main__":
    print(json.dumps(answer(Path(sys.argv[1]))))
