"""Checkpoints on disk and in memory: both layouts, shards, sharing with transformers, what is written back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2VLForConditionalGeneration

from qwen2vl_fast import Qwen2VL, weights
from tests import models
from tests.compare import check_parity, same_bits
from tests.models import write_checkpoint

ROWS = [[("text", 3), ("image", 4, 6), ("text", 2), ("video", 2, 4, 4)], [("text", 4)]]
INDEX = "model.safetensors.index.json"


def load_peer(folder: Path) -> nn.Module:
    dtype = "torch_dtype" if models.OLD_TRANSFORMERS else "dtype"
    return Qwen2VLForConditionalGeneration.from_pretrained(folder, **{dtype: torch.float64}).eval()


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    return left.keys() == right.keys() and all(same_bits(left[name].data, right[name].data) for name in left)


def check_logits(ours: Qwen2VL, hf: nn.Module) -> None:
    inputs = models.batch(ROWS)
    real = models.real_tokens(inputs)
    with torch.no_grad():
        check_parity(ours(**inputs).logits[real], hf(**models.peer_inputs(hf, inputs)).logits[real], "released")


# Reading.


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", ["4.x", "5.x"])
@pytest.mark.parametrize("name", ["released", "untied"])
def test_layouts(tmp_path, name, layout, shards):
    hf, ours = models.pair(name)
    folder = write_checkpoint(tmp_path / "checkpoint", hf, models.CONFIGS[name], layout=layout, shards=shards)
    assert (folder / INDEX).exists() == (shards > 1)
    loaded = Qwen2VL.from_pretrained(folder, device="cpu")
    assert same_weights(loaded, ours) and not loaded.training and loaded.dtype == torch.float64
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert same_weights(Qwen2VL.from_pretrained(str(folder), device="cpu"), ours)
    check_logits(loaded, load_peer(folder))


@pytest.mark.parametrize("name", models.CONFIGS)
def test_what_transformers_saves(tmp_path, name):
    hf, ours = models.pair(name)
    hf.save_pretrained(tmp_path, max_shard_size="1MB")
    assert (tmp_path / INDEX).exists()
    loaded = Qwen2VL.from_pretrained(tmp_path, device="cpu")
    assert same_weights(loaded, ours)
    check_logits(loaded, hf)


def test_what_older_checkpoints_carry_besides(tmp_path):
    """Frequency tables as buffers, and an output head beside tied embeddings."""
    hf, ours = models.pair()
    folder = write_checkpoint(tmp_path, hf, models.CONFIGS["released"])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(64)
    tensors["visual.rotary_pos_emb.inv_freq"] = torch.ones(20)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert same_weights(Qwen2VL.from_pretrained(folder, device="cpu"), ours)


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16, torch.float16])
def test_dtype(tmp_path, dtype):
    """None: the checkpoint's own, by config.json."""
    config = models.released_config(torch_dtype="float32")
    hf = models.transformers_model(config, torch.float32)
    folder = write_checkpoint(tmp_path, hf, config)
    loaded = Qwen2VL.from_pretrained(folder, device="cpu", dtype=dtype)
    expected = Qwen2VL.from_transformers(hf.to(dtype or torch.float32))
    assert same_weights(loaded, expected) and loaded.dtype == (dtype or torch.float32)


def mapped_file(address: int) -> str:
    """The file behind an address of this process, by its memory map."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5) if line.count(" ") > 4 else (line.split()[0], "")
        start, end = (int(bound, 16) for bound in span.split("-"))
        if start <= address < end:
            return path
    raise LookupError(f"{address:x} is not mapped")


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_are_the_mapped_file(tmp_path, shards):
    folder = write_checkpoint(tmp_path, models.pair()[0], models.CONFIGS["released"], shards=shards)
    loaded = Qwen2VL.from_pretrained(folder, device="cpu")
    for name, parameter in loaded.named_parameters():
        assert mapped_file(parameter.data_ptr()).startswith(f"{folder.resolve()}/model"), name
    cast = Qwen2VL.from_pretrained(folder, device="cpu", dtype=torch.float32)
    assert not any(mapped_file(parameter.data_ptr()).startswith(str(folder)) for parameter in cast.parameters())


# Sharing.


@pytest.mark.parametrize("name", ["released", "untied"])
def test_from_transformers_shares_every_parameter(name):
    hf = models.transformers_model(models.CONFIGS[name])
    ours = Qwen2VL.from_transformers(hf)
    theirs = {id(parameter): parameter for parameter in hf.parameters()}
    assert {id(parameter) for parameter in ours.parameters()} == theirs.keys()
    assert all(parameter.data_ptr() == theirs[id(parameter)].data_ptr() for parameter in ours.parameters())
    assert not ours.training and Qwen2VL.from_transformers(hf.train()).training
    hf.eval()
    # One optimizer's step, of either model, is a step of both.
    inputs = models.batch(ROWS)
    labels = models.labels_of(inputs)
    before = ours(**inputs, labels=labels).loss
    optimizer = torch.optim.SGD(hf.parameters(), lr=0.1)
    before.backward()
    assert all(parameter.grad is not None for parameter in hf.parameters())
    optimizer.step()
    after = ours(**inputs, labels=labels).loss
    assert after < before
    check_logits(ours, hf)


def test_from_transformers_leaves_the_model_as_it_was():
    hf = models.transformers_model(models.CONFIGS["released"])
    names, config = [name for name, _ in hf.named_parameters()], hf.config.to_dict()
    Qwen2VL.from_transformers(hf)
    assert [name for name, _ in hf.named_parameters()] == names and hf.config.to_dict() == config


# Writing.


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 10**6])
@pytest.mark.parametrize("name", models.CONFIGS)
def test_saved_checkpoints(tmp_path, monkeypatch, name, shard_bytes):
    """transformers reads what is written, and so do we, bit for bit; under the released names."""
    hf, ours = models.pair(name)
    monkeypatch.setattr(weights, "_SHARD_BYTES", shard_bytes)
    ours.save_pretrained(tmp_path / "a" / "b")
    folder = tmp_path / "a" / "b"
    again = Qwen2VL.from_pretrained(folder, device="cpu")
    assert same_weights(again, ours)
    inputs = models.batch(ROWS)
    with torch.no_grad():
        check_parity(again(**inputs).logits, ours(**inputs).logits, "lifted")  # products depend on alignment in their last bits
    check_logits(ours, load_peer(folder))
    files = sorted(folder.glob("*.safetensors"))
    stored = [key for file in files for key in safe_open(file, "pt").keys()]
    assert len(stored) == len(set(stored))
    assert {key.split(".")[0] for key in stored} == {"visual", "model"} | ({"lm_head"} if "lm_head.weight" in stored else set())
    assert ("lm_head.weight" in stored) == (not ours.config.tie_word_embeddings)
    assert not any(key.startswith(("model.visual", "model.language_model")) for key in stored)
    if shard_bytes == 10**6:
        index = json.loads((folder / INDEX).read_text())
        assert len(files) > 2 and set(index["weight_map"]) == set(stored)
        assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in ours.parameters())
    else:
        assert [file.name for file in files] == ["model.safetensors"] and not (folder / INDEX).exists()


def test_saving_over_another_checkpoint(tmp_path, monkeypatch):
    """Nothing of what was there is read afterwards: no stale index, no stale shard."""
    first, second = models.pair("released")[1], models.pair("untied")[1]
    with monkeypatch.context() as patch:
        patch.setattr(weights, "_SHARD_BYTES", 10**6)
        first.save_pretrained(tmp_path)
    many = {file.name for file in tmp_path.iterdir()}
    second.save_pretrained(tmp_path)
    assert same_weights(Qwen2VL.from_pretrained(tmp_path, device="cpu"), second)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    monkeypatch.setattr(weights, "_SHARD_BYTES", 10**6)
    first.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == many
    assert same_weights(Qwen2VL.from_pretrained(tmp_path, device="cpu"), first)


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 10**6])
def test_saving_over_its_own_file(tmp_path, monkeypatch, shard_bytes):
    """The parameters are that file; they must outlive its replacement."""
    monkeypatch.setattr(weights, "_SHARD_BYTES", shard_bytes)
    ours = models.pair()[1]
    ours.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    loaded = Qwen2VL.from_pretrained(tmp_path, device="cpu")
    loaded.save_pretrained(tmp_path)
    assert same_weights(loaded, ours)
    assert same_weights(Qwen2VL.from_pretrained(tmp_path, device="cpu"), ours)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    check_logits(loaded, models.pair()[0])


def test_files_for_chat_are_copied(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    models.pair()[1].save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.json", "preprocessor_config.json"):
        (source / name).write_text(f'"{name}"')
    (source / "notes.txt").write_text("not part of a checkpoint")
    Qwen2VL.from_pretrained(source, device="cpu").save_pretrained(target)
    assert {file.name for file in target.iterdir()} == {file.name for file in source.iterdir()} - {"notes.txt"}
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_failed_save_changes_nothing(tmp_path, monkeypatch):
    """The disk fills up at the second shard: the checkpoint that was there is whole, and nothing else is left."""
    first, second = models.pair("released")[1], models.pair("untied")[1]
    first.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(weights, "_SHARD_BYTES", 10**6)
    calls = []

    def failing(tensors, file, **options):
        calls.append(file)
        if len(calls) == 2:
            Path(file).write_bytes(b"half")
            raise OSError("No space left on device")
        save_file(tensors, file, **options)

    monkeypatch.setattr(weights, "save_file", failing)
    with pytest.raises(OSError, match="No space left"):
        second.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert same_weights(Qwen2VL.from_pretrained(tmp_path, device="cpu"), first)
