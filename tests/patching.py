"""Small random models of transformers, random batches and the comparisons that the tests of patch share."""

from __future__ import annotations

import copy
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.qwen2_vl import modeling_qwen2_vl as peer

import qwen2vl_fast
from tests import models
from tests.compare import PARITY, check_parity
from tests.models import labels_of, peer_inputs, real_tokens, released_config

MIXED = [
    [("text", 3), ("image", 4, 6), ("text", 5), ("video", 2, 4, 4), ("image", 2, 2), ("text", 2)],
    [("text", 7)],
    [("image", 2, 4), ("text", 3)],
]
EVERYWHERE = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|attn\.qkv|attn\.proj|fc1|fc2|mlp\.0|mlp\.2)$"


def tiny(seed: int) -> dict[str, Any]:
    """A random small config: widths, head dims from 8 on, merge sizes 1 and 2, any sections, tied or not."""
    draw = random.Random(seed)
    half = draw.choice([4, 6, 8, 12, 16])
    first = draw.randint(1, half - 2)
    second = draw.randint(1, half - first - 1)
    sections = [first, second, half - first - second]
    kv = draw.choice([1, 2])
    heads = kv * draw.choice([1, 2, 3])
    hidden = heads * 2 * half
    vision_heads = draw.choice([1, 2, 3])
    return released_config(
        vision={
            "depth": draw.randint(1, 2), "embed_dim": vision_heads * draw.choice([4, 8, 12, 20]), "num_heads": vision_heads,
            "mlp_ratio": draw.choice([1, 2, 4]), "hidden_size": hidden, "hidden_act": draw.choice(["quick_gelu", "gelu"]),
            "spatial_merge_size": draw.choice([1, 2, 2]),
        },
        hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv, intermediate_size=draw.randint(5, 70),
        num_hidden_layers=draw.randint(1, 3), rms_norm_eps=draw.choice([1e-6, 1e-5]), rope_theta=draw.choice([1e4, 1e6]),
        rope_scaling={"type": "mrope", "mrope_section": sections}, tie_word_embeddings=draw.random() < 0.5,
    )  # fmt: skip


def rows(seed: int, merge: int = 2) -> list[list[models.Part]]:
    """Random sequences. No clip has more frame pairs than its merged grid has rows or columns: see MODEL.md section 4."""
    draw = random.Random(seed)

    def part() -> models.Part:
        kind = draw.choice(["text", "image", "image", "video"])
        h, w = draw.randint(1, 3) * merge, draw.randint(1, 3) * merge
        if kind == "text":
            return "text", draw.randint(1, 6)
        return ("image", h, w) if kind == "image" else ("video", draw.randint(1, max(h, w) // merge), h, w)

    return [[("text", draw.randint(2, 4)), *(part() for _ in range(draw.randint(0, 4)))] for _ in range(draw.randint(1, 3))]


def batch(parts: list[list[models.Part]], merge: int = 2, **options: Any) -> dict[str, Tensor]:
    """models.batch for any merge size: one placeholder for each merge^2 patches."""
    if merge == 2:
        return models.batch(parts, **options)
    scaled = [[(kind, *size) if kind == "text" else _doubled(kind, *size) for kind, *size in row] for row in parts]
    inputs = models.batch(scaled, **options)
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if f"{kind}_grid_thw" in inputs:
            grid = inputs[f"{kind}_grid_thw"] // torch.tensor([1, 2, 2])
            inputs[f"{kind}_grid_thw"] = grid
            inputs[pixels] = inputs[pixels][: int(grid.prod(1).sum())]
    return inputs


def _doubled(kind: str, *size: int) -> models.Part:
    """The same medium with twice the sides, of which models.batch makes the number of placeholders that merge size 1 needs."""
    *frames, h, w = size
    return kind, *frames, 2 * h, 2 * w


def model_of(config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    return models.transformers_model(config, dtype, seed)


def twin(hf: nn.Module) -> nn.Module:
    """Another instance with parameters of its own."""
    return copy.deepcopy(hf)


@contextmanager
def patched(hf: nn.Module, **options: Any) -> Iterator[qwen2vl_fast.patch.PatchReport]:
    report = qwen2vl_fast.patch(hf, **options)
    try:
        yield report
    finally:
        qwen2vl_fast.unpatch(hf)


def lift_casts(monkeypatch: Any) -> None:
    """models.lift_casts for every model at once: the classes and the loss compute in the dtype of their input."""

    def rms_norm(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    def vision_rotation(q, k, cos, sin):
        cos, sin = (x.float().to(q.dtype).unsqueeze(-2) for x in (cos, sin))
        return tuple(x * cos + peer.rotate_half(x) * sin for x in (q, k))

    name = "Qwen2VLRMSNorm" if hasattr(peer, "Qwen2VLRMSNorm") else "Qwen2RMSNorm"
    monkeypatch.setattr(getattr(peer, name), "forward", rms_norm)
    monkeypatch.setattr(peer, "apply_rotary_pos_emb_vision", vision_rotation)
    for name, loss in list(LOSS_MAPPING.items()):
        if loss.__name__ == "ForCausalLMLoss":
            monkeypatch.setitem(LOSS_MAPPING, name, _wide_loss)


def _wide_loss(logits, labels, vocab_size, **_):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


_wide_loss.__name__ = "ForCausalLMLoss"  # by which patch knows it


def forward(hf: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Any:
    return hf(**peer_inputs(hf, inputs), **options)


def gradients(hf: nn.Module, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss and gradients of one training step."""
    training = hf.training
    hf.train()
    hf.zero_grad(set_to_none=True)
    loss = forward(hf, inputs, labels=labels_of(inputs), **options).loss
    loss.backward()
    hf.train(training)
    found = {name: parameter.grad for name, parameter in hf.named_parameters()}
    hf.zero_grad(set_to_none=True)
    return loss.detach().double(), found


def check_case(
    seed: int, casts: str, *, train: bool = True, device: str = "cpu", config: dict[str, Any] | None = None
) -> None:
    """One random model and batch: logits, hidden states, loss and gradients of the patched model are the unpatched one's.

    casts: "lifted" inside `lift_casts`. As released, the float32 casts are all that a cancelling gradient can be held to, so
    gradients are compared with the casts lifted alone.
    """
    config = config or tiny(seed)
    merge = config["vision_config"]["spatial_merge_size"]
    hf = model_of(config, seed).to(device)
    draw = random.Random(seed)
    inputs = batch(rows(seed, merge), merge, padding=draw.choice(["left", "right"]), seed=seed)
    inputs = {name: x.to(device) for name, x in inputs.items()}
    real = real_tokens(inputs)
    positions = draw.random() < 0.5  # without clips that are longer than wide both rules agree
    with torch.no_grad():
        before = forward(hf, inputs, output_hidden_states=True)
    expected = gradients(hf, inputs) if train else None
    with patched(hf, positions=positions) as report:
        with torch.no_grad():
            after = forward(hf, inputs, output_hidden_states=True)
        got = gradients(hf, inputs) if train else None
    for name in ("m-rope", "text norms", "swiglu"):
        assert report.parts[name].calls, f"seed {seed}: {name} did not run"
    check_parity(after.logits[real], before.logits[real], casts, name=f"seed {seed} logits")
    assert len(after.hidden_states) == len(before.hidden_states)
    for index, (ours, theirs) in enumerate(zip(after.hidden_states, before.hidden_states, strict=True)):
        check_parity(ours[real], theirs[real], casts, name=f"seed {seed} hidden state {index}")
    if train:
        check_parity(got[0], expected[0], casts, name=f"seed {seed} loss")
        if casts == "lifted":
            check_gradients(got[1], expected[1], f"seed {seed}")


def check_gradients(got: dict[str, Tensor | None], expected: dict[str, Tensor | None], name: str) -> None:
    """By parity of the largest difference; a gradient that cancels to nothing is held against the largest of all."""
    top = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for parameter, gradient in expected.items():
        what = f"{name} gradient of {parameter}"
        assert (gradient is None) == (got[parameter] is None), f"{what}: {gradient}, patched {got[parameter]}"
        if gradient is None:
            continue
        if float(gradient.abs().max()) > 1e-4 * top:
            check_parity(got[parameter], gradient, "lifted", name=what)
        else:
            assert float((got[parameter] - gradient).abs().max()) <= PARITY["lifted"] * top, what


def snapshot(*roots: nn.Module) -> dict[tuple[int, str], dict]:
    """Every attribute of every module, by identity."""
    return {(i, n): dict(vars(m)) for i, root in enumerate(roots) for n, m in root.named_modules()}


def same(before: dict, after: dict) -> bool:
    return before.keys() == after.keys() and all(
        before[k].keys() == after[k].keys() and all(before[k][n] is after[k][n] for n in before[k]) for k in before
    )


def classes() -> dict[str, dict]:
    return {name: dict(vars(value)) for name, value in vars(peer).items() if isinstance(value, type)} | {
        "module": dict(vars(peer)), "linear": dict(vars(nn.Linear)), "norm": dict(vars(nn.LayerNorm)),
    }  # fmt: skip


def compare(hf: nn.Module, inputs: dict, *, unpatched: nn.Module | None = None, **options) -> qwen2vl_fast.patch.PatchReport:
    """Logits of real tokens with and without patch, by parity as released; returns the report."""
    real = real_tokens(inputs)
    with torch.no_grad():
        expected = forward(unpatched or hf, inputs).logits
        with patched(hf, **options) as report:
            got = forward(hf, inputs).logits
    check_parity(got[real], expected[real], "released")
    return report


def with_lora(hf: nn.Module, seed: int = 0) -> nn.Module:
    """Adapters on every Linear of tower and decoder, none of which is zero."""
    import peft  # not among what a machine with a GPU alone must have

    torch.manual_seed(seed)
    model = peft.get_peft_model(hf, peft.LoraConfig(r=2, target_modules=EVERYWHERE, lora_dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model


def step(model: nn.Module, hf: nn.Module, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Loss and gradients of what is trained."""
    model.train()
    model.zero_grad(set_to_none=True)
    loss = model(**peer_inputs(hf, inputs), labels=labels_of(inputs)).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach().double(), found


def run_ranks(kind: str, folder: Path) -> list[dict]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parent.parent
    commands = [[sys.executable, "-m", "tests.ranks", kind, str(rank), "2", str(port), str(folder)] for rank in range(2)]
    processes = [subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
