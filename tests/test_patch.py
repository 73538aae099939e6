"""patch: equality with the unpatched model, what is bound and reported, and that one instance alone changes."""

from __future__ import annotations

import inspect
import sys
import warnings

import pytest
import torch
import transformers
from torch import nn

import qwen2vl_fast
from qwen2vl_fast import ops, positions
from qwen2vl_fast.patch import vision
from tests import matrix, models, patching
from tests.compare import check, check_parity, error
from tests.models import CONFIGS, OLD_TRANSFORMERS, peer_inputs, real_tokens
from tests.patching import MIXED, compare, forward, model_of, patched, twin

NEW = pytest.mark.skipif(OLD_TRANSFORMERS, reason="something that transformers 4.52 does not have")
PARTS = [
    "one tower pass", "position ids", "packing", "patch embedding", "vision attention", "vision rope", "vision norms",
    "vision activations", "m-rope", "text norms", "swiglu", "loss",
]  # fmt: skip


# Equality.


@pytest.mark.parametrize("block", range(4))
def test_random_models(monkeypatch, block):
    """`patching.check_case(seed, casts)` reproduces a failure."""
    for seed in range(15 * block, 15 * block + 15):
        patching.check_case(seed, "released", train=False)
    patching.lift_casts(monkeypatch)
    for seed in range(15 * block, 15 * block + 15):
        patching.check_case(seed, "lifted")


@pytest.mark.full
@pytest.mark.parametrize("block", range(50))
def test_random_models_at_length(monkeypatch, block):
    patching.lift_casts(monkeypatch)
    for seed in range(100 * block, 100 * block + 100):
        patching.check_case(seed, "lifted")


def test_head_dim_8_sections_2_1_1_and_merge_size_1(monkeypatch):
    """The smallest that the classes accept: no kernel has these widths, and every patch is a visual token."""
    config = models.released_config(
        vision={"embed_dim": 16, "num_heads": 2, "hidden_size": 32, "spatial_merge_size": 1},
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]},
    )  # fmt: skip
    for seed in range(3):
        patching.check_case(seed, "released", train=False, config=config)
    patching.lift_casts(monkeypatch)
    for seed in range(3):
        patching.check_case(seed, "lifted", config=config)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("config", CONFIGS)
def test_real_head_dims(config, padding):
    """Head dims 80 and 128, sections 16/24/24, YaRN: as the released models have them."""
    report = compare(model_of(CONFIGS[config]), models.batch(MIXED, padding=padding))
    assert list(report.parts) == PARTS
    for part in report.parts.values():
        assert part.status == "fused" and not part.passed and (part.calls or part.name == "loss"), part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype):
    """Patched logits err no more than unpatched ones in the same dtype; the judge of both is the float64 model."""
    hf, wide = model_of(CONFIGS["released"], dtype=dtype), model_of(CONFIGS["released"])
    wide.load_state_dict(hf.state_dict())
    inputs = models.batch(MIXED, dtype=dtype)
    real = real_tokens(inputs)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad():
        reference = qwen2vl_fast.Qwen2VL.from_transformers(wide)(**exact).logits[real]
        unpatched = forward(hf, inputs).logits[real]
        with patched(hf):
            check(forward(hf, inputs).logits[real], reference, [error(unpatched, reference)])


@pytest.mark.parametrize("train", [False, True])
def test_autocast(train):
    """As a trainer with bf16=True runs a float32 model."""
    hf = model_of(CONFIGS["released"], dtype=torch.float32)
    inputs = models.batch(MIXED, dtype=torch.float32)
    real = real_tokens(inputs)
    labels = models.labels_of(inputs) if train else None
    hf.train(train)
    results = []
    for patch in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            if patch:
                report = qwen2vl_fast.patch(hf)
            output = forward(hf, inputs, labels=labels)
            results.append(output.loss[None] if train else output.logits[real])
    reference = forward(model_of(CONFIGS["released"]), inputs, labels=labels)
    reference = (reference.loss[None] if train else reference.logits[real]).detach().double()
    check(results[1].float(), reference, [error(results[0].float(), reference), reference.abs() / 256], rms=False)
    assert report.parts["text norms"].passed["autocast"]


def test_long_clip(hf):
    """More frame pairs than merged rows and columns: with positions=True MODEL.md's rule, with False the library's."""
    ours = qwen2vl_fast.Qwen2VL.from_transformers(hf)
    inputs = models.batch([[("text", 1), ("video", 10, 4, 4), ("text", 5), ("image", 2, 2), ("text", 2)]])
    with torch.no_grad():
        before = forward(hf, inputs).logits
        with patched(hf, positions=False) as report:
            check_parity(forward(hf, inputs).logits, before, "released")
        assert report.parts["position ids"].status == "not fused: positions=False"
        with patched(hf):
            got = forward(hf, inputs).logits
    check_parity(got, ours(**inputs).logits.detach(), "lifted")
    apart = float((got - before).abs().max() / before.abs().max())
    assert apart < 1e-6 if OLD_TRANSFORMERS else apart > 1e-3


def test_parts_of_a_model_alone(shared):
    """The tower, the decoder, the model without its head."""
    inputs = models.batch(MIXED)
    grid, pixels = inputs["image_grid_thw"], inputs["pixel_values"]
    for take, names in (
        (lambda hf: hf.model.visual, PARTS[2:8]),
        (lambda hf: hf.model.language_model, PARTS[8:11]),
        (lambda hf: hf.model, PARTS[:11]),
    ):
        one = take(twin(shared))

        def run(module=one):
            if hasattr(module, "merger"):
                output = module(pixels, grid_thw=grid)
            elif hasattr(module, "visual"):
                output = module(**peer_inputs(shared, inputs)).last_hidden_state[real_tokens(inputs)]
            else:
                output = module(input_ids=inputs["input_ids"][1:2, -7:]).last_hidden_state
            return getattr(output, "pooler_output", output)

        with torch.no_grad():
            expected = run()
            with patched(one) as report:
                check_parity(run(), expected, "released")
        assert list(report.parts) == names
        assert all(part.calls for part in report.parts.values()), report


@pytest.mark.parametrize("argument", ["rope", "attention", "norms", "activations", "patch_embed", "positions", "fused_loss"])
def test_each_part_can_be_left_out(hf, argument):
    report = compare(hf, models.batch(MIXED), **{argument: False})
    left = [part.name for part in report.parts.values() if f"{argument}=False" in part.status]
    expected = {
        "rope": ["vision rope", "m-rope"], "attention": ["one tower pass", "vision attention"],
        "norms": ["vision norms", "text norms"],
        "activations": ["vision activations", "swiglu"], "patch_embed": ["patch embedding"], "positions": ["position ids"],
        "fused_loss": ["loss"],
    }  # fmt: skip
    assert left == expected[argument]
    assert not any(report.parts[name].calls or report.parts[name].bound for name in left)


def test_backend_of_choice(hf, monkeypatch):
    """It reaches every op that has it."""
    asked = []
    real = ops.rope.choose
    others = [sys.modules[f"qwen2vl_fast.ops.{name}"] for name in ("gated", "vision_attention")]
    for module in (ops.rope, ops.norm, ops.activation, ops.attention, *others):
        monkeypatch.setattr(module, "choose", lambda op, *rest: asked.append((op, rest[0])) or real(op, *rest))
    compare(hf, models.batch(MIXED), backend="torch")
    assert {backend for _, backend in asked} == {"torch"}
    assert {op for op, _ in asked} >= {"mrope", "vision_rope_", "varlen_attention", "rms_norm", "layer_norm", "swiglu", "gelu"}


def test_capped_packs(hf, monkeypatch):
    """More patches than a pack may hold: several packs, the same features."""
    monkeypatch.setattr(vision, "MAX_PACK_PATCHES", 20)
    report = compare(hf, models.batch(MIXED))
    assert report.parts["vision attention"].calls > 2 and report.parts["packing"].calls == 1


def test_images_and_videos_share_one_pass(hf):
    inputs = models.batch(MIXED)
    calls = []
    hf.model.visual.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), patched(hf):
        forward(hf, inputs)
    assert len(calls) == 1
    if not OLD_TRANSFORMERS:  # there generate encodes before its first forward
        with patched(hf):
            hf.generate(**peer_inputs(hf, inputs), max_new_tokens=2, do_sample=False)
        assert len(calls) == 2


def test_placeholders_that_do_not_match(hf):
    inputs = peer_inputs(hf, models.batch([[("text", 3), ("image", 4, 6), ("text", 4)]]))
    inputs["input_ids"][0, 6] = 5
    with patched(hf), pytest.raises(ValueError, match="expected 6 image placeholders by image_grid_thw, got 5"):
        hf(**inputs)
    del inputs["image_grid_thw"]
    with patched(hf), pytest.raises(ValueError, match="image_grid_thw: expected"):
        hf(**inputs)


# Inputs of 5.x.


@NEW
def test_encoded_media_are_honoured(hf):
    inputs = models.batch(MIXED)
    real = real_tokens(inputs)
    with torch.no_grad():
        expected = forward(hf, inputs).logits
        outputs = {
            "image": hf.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True),
            "video": hf.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True),
        }
        rest = {name: x for name, x in inputs.items() if not name.startswith("pixel")}
        with patched(hf) as report:
            got = hf(**rest, mm_encoder_outputs=outputs).logits
        check_parity(got[real], expected[real], "released")
        assert report.parts["one tower pass"].calls == 1 and report.parts["packing"].calls == 0
        with patched(hf), pytest.raises(ValueError, match="mm_encoder_outputs"):
            hf(**inputs, mm_encoder_outputs=outputs)


@NEW
def test_precomputed_inputs_are_honoured(hf):
    """image_cu_seqlens and image_position_ids, even where they say something else than the grids."""
    inputs = models.batch([[("text", 2), ("image", 4, 6), ("image", 2, 2), ("text", 3)]])
    given = {
        "image_cu_seqlens": torch.tensor([0, 8, 28], dtype=torch.int32),
        "image_position_ids": positions.vision_position_ids(inputs["image_grid_thw"]).t().flip(1).contiguous(),
    }
    with torch.no_grad():
        plain = hf(**inputs).logits
        for names in (list(given), list(given)[:1], list(given)[1:]):
            expected = hf(**inputs, **{name: given[name] for name in names}).logits
            with patched(hf) as report:
                got = hf(**inputs, **{name: given[name] for name in names}).logits
            check_parity(got, expected, "released")
            assert float((expected - plain).abs().max()) > 1e-4, "the case tells nothing"
            assert report.parts["vision attention"].calls == 2


@NEW
def test_packed_samples(hf):
    """Two samples in one row, told apart by the first of four rows of position ids."""
    ids = torch.randint(0, 256, (1, 12))
    text = torch.cat((torch.arange(5), torch.arange(7)))[None]
    position_ids = torch.stack((text, text, text, text))
    with torch.no_grad():
        packed = {"input_ids": ids, "position_ids": position_ids, "use_cache": False}  # a cache would turn packing off
        expected = hf(**packed).logits
        with patched(hf):
            got = hf(**packed).logits
            alone = [hf(input_ids=part).logits for part in ids.split((5, 7), 1)]
    check_parity(got, expected, "released")
    check_parity(got, torch.cat(alone, 1), "lifted")


@NEW
def test_attention_implementation(tmp_path, shared):
    shared.save_pretrained(tmp_path)
    inputs = models.batch(MIXED)
    one = models.alone(inputs, MIXED, 0)
    import qwen2vl_fast.patch  # noqa: F401 -- registers the name

    loaded = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="qwen2vl_fast", dtype=torch.float64
    ).eval()
    assert loaded.config._attn_implementation == "qwen2vl_fast"
    for batch in (inputs, one):  # with a mask, and without
        real = real_tokens(batch)
        with torch.no_grad():
            expected = forward(shared, batch).logits[real]
            check_parity(forward(loaded, batch).logits[real], expected, "released")
            with patched(loaded):
                check_parity(forward(loaded, batch).logits[real], expected, "released")
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(**one, **greedy), shared.generate(**one, **greedy))


def test_attention_function_is_varlen_attention(monkeypatch):
    from qwen2vl_fast.patch import interface

    calls = []
    real = ops.varlen_attention
    monkeypatch.setattr(ops, "varlen_attention", lambda *a, **k: calls.append(k["causal"]) or real(*a, **k))
    q, k, v = (torch.randn(2, heads, 5, 8, dtype=torch.float64) for heads in (4, 2, 2))
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    for causal in (None, False):
        out, _ = interface.attention(module, q, k, v, None, scaling=0.3, is_causal=causal)
        wide_k, wide_v = (x.repeat_interleave(2, 1) for x in (k, v))
        flag = causal is None
        expected = nn.functional.scaled_dot_product_attention(q, wide_k, wide_v, scale=0.3, is_causal=flag).transpose(1, 2)
        check_parity(out, expected, "lifted")
    assert calls == [True, False]


def test_signatures_stay(hf):
    """Trainer and generate look at the arguments of forward."""
    before = inspect.signature(hf.forward)
    with patched(hf):
        assert inspect.signature(hf.forward) == before
        assert hf.forward.__name__ == "forward"


def test_compile(hf):
    """Under torch.compile, again with other lengths, and the counters stand still instead of compiling anew."""
    inputs = models.batch([[("text", 5)]])
    longer = models.batch([[("text", 9)], [("text", 6)]])
    with torch.no_grad(), patched(hf) as report:
        expected = [forward(hf, x, use_cache=False).logits for x in (inputs, longer)]
        torch._dynamo.reset()
        compiled = torch.compile(hf.model.language_model, backend="eager", dynamic=True, fullgraph=True)
        hf.model.language_model, plain = compiled, hf.model.language_model
        calls = report.parts["swiglu"].calls
        try:
            got = [forward(hf, x, use_cache=False).logits for x in (inputs, longer, inputs)]
        finally:
            hf.model.language_model = plain
        assert report.parts["swiglu"].calls > calls
    for ours, theirs in zip(got, [*expected, expected[0]], strict=True):
        check_parity(ours, theirs, "lifted")


@pytest.mark.full
def test_compile_whole_model():
    """With media, lengths that change, and a training step; what reads grids on the host stays outside the graphs."""
    hf = model_of(patching.tiny(1))
    merge = hf.config.vision_config.spatial_merge_size
    batches = [
        patching.batch([[("text", 3), ("image", 2 * merge, merge), ("text", count)]], merge, seed=count) for count in (2, 5)
    ]
    with patched(hf):
        with torch.no_grad():
            expected = [forward(hf, x, use_cache=False).logits for x in batches]
        loss, gradient = patching.gradients(hf, batches[0], use_cache=False)
        torch._dynamo.reset()
        hf.compile(backend="aot_eager", dynamic=True)
        with torch.no_grad():
            got = [forward(hf, x, use_cache=False).logits for x in batches]
        compiled_loss, compiled = patching.gradients(hf, batches[0], use_cache=False)
    for ours, theirs in zip(got, expected, strict=True):
        check_parity(ours, theirs, "lifted")
    check_parity(compiled_loss, loss, "lifted")
    patching.check_gradients(compiled, gradient, "compiled")


def test_matrix_of_the_documentation():
    """docs/patch.md names tests that exist, and is what `python -m tests.matrix` writes."""
    text = matrix.DOCUMENT.read_text(encoding="utf-8")
    assert text == matrix.render(text)


class Device(torch.Tensor):
    """Stands for a tensor on a device: whatever is computed from one is one, and reading one on the host is counted."""

    reads: list[str] = []
    READS = ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "equal", "allclose")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        caller = sys._getframe(1).f_code.co_filename
        name = getattr(function, "__name__", "")
        if name in cls.READS and "qwen2vl_fast" in caller:
            cls.reads.append(name)
        if name in ("__getitem__", "masked_select", "masked_scatter") and "qwen2vl_fast" in caller:
            masks = [x for x in args[1:] for x in (x if isinstance(x, tuple) else (x,)) if isinstance(x, torch.Tensor)]
            cls.reads += [name for mask in masks if mask.dtype == torch.bool]
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_is_read_on_the_host_but_the_grids(hf, monkeypatch, masked):
    """On the CPU: tensors that stand for ones on a device, and the one copy that a forward makes of them."""
    inputs = models.batch([[("text", 3), ("image", 4, 6), ("video", 2, 4, 4), ("text", 5)]])
    if masked:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    real = vision.to_host

    def to_host(*tensors):
        return [x if x is None else x.as_subclass(torch.Tensor) for x in real(*tensors)]

    monkeypatch.setattr(vision, "to_host", to_host)
    monkeypatch.setattr(sys.modules["qwen2vl_fast.patch.model"], "to_host", to_host)
    monkeypatch.setattr(positions, "_check_runs", lambda *_: None)  # looks at tensors on the host alone
    there = {name: x.as_subclass(Device) if not name.endswith("grid_thw") else x for name, x in inputs.items()}
    Device.reads.clear()
    with torch.no_grad():
        expected = forward(hf, inputs, use_cache=False).logits
        with patched(hf) as report:
            got = forward(hf, there, use_cache=False).logits
    assert isinstance(got, Device) and report.parts["vision attention"].calls and report.parts["one tower pass"].calls == 1
    check_parity(got.as_subclass(torch.Tensor), expected, "released")
    assert not Device.reads
    monkeypatch.undo()  # with the check of host tensors in its place, what it reads is counted
    with torch.no_grad(), patched(hf):
        forward(hf, there, use_cache=False)
    assert Device.reads


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_device(dtype):
    """With the kernels that are there. The judge is the float64 model on the CPU; grids on the host and on the device."""
    hf, wide = model_of(CONFIGS["released"], dtype=dtype).cuda(), model_of(CONFIGS["released"])
    wide.load_state_dict(hf.state_dict())
    inputs = models.batch(MIXED, dtype=dtype)
    real = real_tokens(inputs)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    there = {name: x.cuda() for name, x in inputs.items()}
    with torch.no_grad():
        reference = qwen2vl_fast.Qwen2VL.from_transformers(wide)(**exact).logits[real]
        unpatched = forward(hf, there).logits.cpu()[real]
        with patched(hf) as report:
            for grids in ("cuda", "cpu"):
                given = {name: x.to(grids) if name.endswith("grid_thw") else x for name, x in there.items()}
                got = forward(hf, given).logits.cpu()[real]
                check(got, reference, [error(unpatched, reference)])
    kernels = {row["part"]: row["backend"] for row in report.rows()}
    assert kernels["m-rope"] == kernels["vision rope"] == kernels["swiglu"] == "triton"


@pytest.mark.gpu
def test_random_models_on_a_device():
    for seed in range(20):
        patching.check_case(seed, "released", device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("masked", [False, True])
def test_no_sync_beyond_one_copy(where, masked):
    """With grids on the host none; with grids on the device the one that copies them."""
    hf = model_of(CONFIGS["released"], dtype=torch.bfloat16).cuda()
    inputs = models.batch([[("text", 3), ("image", 4, 6), ("video", 2, 4, 4), ("text", 5)]], dtype=torch.bfloat16)
    if masked:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs = {name: x.to(where if name.endswith("grid_thw") else "cuda") for name, x in inputs.items()}
    with torch.no_grad(), patched(hf):
        forward(hf, inputs, use_cache=False)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                forward(hf, inputs, use_cache=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    ours = [w for w in caught if "synchronizing" in str(w.message) and "qwen2vl_fast" in w.filename]
    assert len(ours) == (where == "cuda"), [f"{w.filename}:{w.lineno}" for w in ours]
