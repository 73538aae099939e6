"""Every subject of bench/ from its command line to its last line, at small sizes: a name or a shape that does not fit is found
here and not on a device. What runs on a device alone (sweeps, the sanitizers' program) is driven as far as a CPU goes."""

from __future__ import annotations

import functools
import importlib
import json
import sys

import pytest
import torch

from bench import generate, host, linear, loss, passes, patch, peers, preprocess, sanitize, stories, sweep, timing, tower, train
from qwen2vl_fast import cli
from tests.compiled import compiled, recorded

TINY = (256, 1, 2, 1, 64, True)  # hidden, layers, heads, key-value heads, MLP, tied


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Ceilings from a few megabytes; no subject asks for more than a blink of them here."""
    facts = {"copy_bytes_per_s": 1e10, "copies": {"copy": 1e10}, "matmul_flops": 1e11, "matmul": "2048^3 float32"}
    for module in ("passes", "attention", "tower", "generate", "patch", "train", "loss"):
        monkeypatch.setattr(importlib.import_module(f"bench.{module}"), "ceilings", lambda *_: facts)


@pytest.fixture
def narrow(monkeypatch):
    """Models of bench.patch and bench.train with both head dims of the released ones, and little else."""
    monkeypatch.setattr(
        patch, "WIDTHS", {"hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    )
    monkeypatch.setattr(patch, "TOWER", {"embed_dim": 160, "num_heads": 2})


def saved(folder) -> dict[str, dict]:
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert not list(folder.glob("*.part"))
    assert all({"environment", "command", "rows"} <= set(result) and "partial" not in result for result in found.values())
    return found


def test_every_subject_knows_its_peers(capsys):
    """`qwen2vl-fast bench SUBJECT --peers nobody` names them and measures nothing."""
    subjects = set(cli.subjects()) - {"static_model"}  # which has none
    assert len(subjects) == 16
    for subject in sorted(subjects):
        module = importlib.import_module(f"bench.{subject}")
        main = functools.partial(passes.main, (subject,), subject) if subject in passes.SUBJECTS else module.main
        with pytest.raises(SystemExit) as stop:
            main(["--peers", "nobody"])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "got 'nobody'" in error and all(peer in error for peer in module.PEERS)


@pytest.mark.parametrize("subject", passes.SUBJECTS)
def test_passes(subject, tmp_path, monkeypatch, capsys):
    """Each judged against its float64 definition; a peer that is not there is a row that says so."""
    count = 1024 if subject in ("rope", "merge", "patchify") else 64
    monkeypatch.setattr(passes, "TOKENS", (count,))
    importlib.import_module(f"bench.{subject}")
    passes.main((subject,), subject, ["--repeats", "1", "--save", str(tmp_path)])
    (result,) = saved(tmp_path).values()
    assert all("seconds" in row["contenders"]["qwen2vl_fast"] and row["tokens"] == count for row in result["rows"])
    contenders = [item for row in result["rows"] for item in row["contenders"].items()]
    reasons = {name: facts["missing"] for name, facts in contenders if "missing" in facts}
    expected = {"rope": {"flash-attn"}, "mrope": {"Liger"}, "norms": {"Liger"}, "activations": {"Liger"}}.get(subject, set())
    assert reasons.pop(passes.COMPILED) == "not compiled on a CPU"
    assert expected <= {name for name, facts in contenders if facts.get("missing") == "needs a CUDA device"}
    assert all(reason == "not in this case" for name, reason in reasons.items() if name not in expected)
    text = capsys.readouterr().out
    assert all(f"{name:<22}needs a CUDA device" in text for name in expected)


def test_a_pass_against_one_peer_and_against_none(tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "TOKENS", (64,))
    ours = {"qwen2vl_fast", "qwen2vl_fast in place"}
    for asked, expected in ((["transformers"], {*ours, "transformers"}), ([], ours)):
        passes.main(("mrope",), "x", ["--repeats", "1", "--save", str(tmp_path), "--peers", *asked])
        rows = saved(tmp_path)["mrope_cpu"]["rows"]
        assert set(rows[0]["contenders"]) == expected
    passes.main(passes.SUBJECTS, "x", ["mrope", "norms", "--repeats", "1", "--save", str(tmp_path), "--peers", "torch"])
    found = saved(tmp_path)
    assert set(found["mrope_cpu"]["rows"][0]["contenders"]) == ours, "a peer of norms alone"
    assert found["norms_cpu"]["rows"][-1]["contenders"]["torch"] == {"missing": "not in this case"}


def test_tower(tmp_path):
    tower.main(["--cases", "1", "--depth", "1", "--repeats", "1", "--save", str(tmp_path)])
    (row,) = saved(tmp_path)["tower_cpu_float32"]["rows"]
    assert max(row["errors"].values()) < 1e-4 and set(row["seconds"]) == {tower.THEIRS, tower.OURS}
    tower.main(["--cases", "1", "--depth", "1", "--repeats", "1", "--save", str(tmp_path), "--peers"])
    (row,) = saved(tmp_path)["tower_cpu_float32"]["rows"]
    assert set(row["errors"]) == {tower.THEIRS, tower.OURS} and set(row["seconds"]) == {tower.OURS}


@pytest.fixture
def on_a_device(monkeypatch):
    """race() of the tower as on a device; a graph is the plain call, replayed after other inputs have been through it."""
    monkeypatch.setattr(tower, "warm_up", lambda run: run())
    monkeypatch.setattr(tower, "capture", lambda run: run)
    monkeypatch.setattr(tower, "CASES", {"a": ((1, 4, 6),)})
    options = timing.parser("tower", "x", peers=tower.PEERS, on_request=(tower.COMPILED,)).parse_args(["--repeats", "1"])
    options.cases, options.depth, options.dtype = ["a"], 1, "float32"

    def race(*named: str) -> list[dict]:
        options.peers = list(named)
        with torch.inference_mode():
            return tower.race(options, torch.float32, "cpu:0", {"matmul_flops": 1e11, "copy_bytes_per_s": 1e10})

    return race


def test_the_graph_of_the_tower_is_judged_before_it_is_timed(on_a_device, monkeypatch):
    (row,) = on_a_device()
    assert row["errors"][tower.GRAPH] < 1e-4 and set(row["seconds"]) == {tower.OURS, tower.GRAPH}
    in_a_graph = tower.in_a_graph

    def stale(model, pixels, grid):
        """What a graph gives that was captured on memory of other pixels."""
        return in_a_graph(model, pixels + 1, grid)

    monkeypatch.setattr(tower, "in_a_graph", stale)
    with pytest.raises(RuntimeError, match="case a, qwen2vl_fast in a CUDA graph: relative error"):
        on_a_device()


def test_the_compiled_tower_is_judged_before_it_is_timed(on_a_device, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda p, g: model(p + 1, g))
    with pytest.raises(RuntimeError, match="transformers sdpa compiled: relative error"):
        on_a_device(tower.COMPILED)


def test_parts_of_the_tower():
    """They are timed on devices alone, but any device will do."""
    _, ours = tower.towers(torch.float32, "cpu", 1)
    with torch.inference_mode():
        found = tower.parts(ours, torch.tensor([[1, 4, 6]]), torch.float32, "cpu", 1)
    assert len(found) == 8 and all(part["seconds"] > 0 and (part["flop"] > 0) != (part["bytes"] > 0) for part in found.values())


def test_generate(tmp_path, monkeypatch):
    monkeypatch.setitem(generate.SIZES, "2B", TINY)
    sizes = ["--layers", "1", "--context", "8", "--tokens", "2", "--batch", "1", "2"]
    generate.main([*sizes, "--repeats", "1", "--save", str(tmp_path)])
    rows = saved(tmp_path)["generate_2B_cpu_float32"]["rows"]
    assert [row["batch"] for row in rows] == [1, 2]
    assert all(set(row["contenders"]) == {generate.THEIRS, generate.OURS} for row in rows)
    generate.main([*sizes, "--repeats", "1", "--save", str(tmp_path), "--peers"])
    assert set(saved(tmp_path)["generate_2B_cpu_float32"]["rows"][0]["contenders"]) == {generate.OURS}


@pytest.mark.parametrize(
    "wrong", [lambda out: out[:, :-1], lambda out: out * 0, lambda out: torch.cat([out[:, :-1], out[:, -1:] * 0 + 7], 1)]
)
def test_a_decoder_that_says_something_else_is_not_timed(wrong, monkeypatch):
    """Too few tokens, none of the prompt, or another last one."""
    monkeypatch.setitem(generate.SIZES, "2B", TINY)
    right = generate.Qwen2VL.generate
    monkeypatch.setattr(generate.Qwen2VL, "generate", lambda *args, **more: wrong(right(*args, **more)))
    with pytest.raises(RuntimeError, match="qwen2vl_fast: (generated|a token)"):
        generate.main(["--layers", "1", "--context", "8", "--tokens", "2", "--batch", "2", "--repeats", "1"])


def test_a_patched_decoder_that_says_something_else_is_not_timed(monkeypatch):
    monkeypatch.setitem(stories.SIZES, "2B", TINY)
    monkeypatch.setattr(stories, "CLIP", (4, 320, 240))
    theirs = stories.Qwen2VLForConditionalGeneration.generate

    def generated(model, **more):
        out = theirs(model, **more)
        return torch.cat([out[:, :-1], out[:, -1:] * 0 + 7], 1) if "forward" in vars(model.model) else out

    monkeypatch.setattr(stories.Qwen2VLForConditionalGeneration, "generate", generated)
    with pytest.raises(RuntimeError, match="3 photos, transformers, patched: a token"):
        stories.main(["--layers", "1", "--depth", "1", "--scale", "0.1", "--tokens", "1", "--repeats", "1"])


def test_products_that_are_others_are_not_timed(monkeypatch):
    monkeypatch.setattr(linear, "TOKENS", (1,))
    monkeypatch.setattr(linear, "linear", lambda x, weight, bias: torch.nn.functional.linear(x, weight))
    with pytest.raises(RuntimeError, match="qkv, 1 rows: relative errors"):
        linear.main(["--repeats", "1"])


def test_stories(tmp_path, monkeypatch):
    monkeypatch.setitem(stories.SIZES, "2B", TINY)
    monkeypatch.setattr(stories, "CLIP", (4, 320, 240))
    sizes = ["--layers", "1", "--depth", "1", "--scale", "0.1", "--tokens", "1"]
    stories.main([*sizes, "--repeats", "1", "--save", str(tmp_path)])
    rows = saved(tmp_path)["stories_cpu"]["rows"]
    assert [row["kind"] for row in rows] == ["images", "images", "videos"]
    files = stories.files
    monkeypatch.setattr(stories, "files", lambda *place: dict(list(files(*place).items())[:1]))
    stories.main([*sizes, "--repeats", "1", "--save", str(tmp_path), "--peers"])
    assert set(saved(tmp_path)["stories_cpu"]["rows"][0]["contenders"]) == {stories.PATCHED, stories.OURS}


def test_patch(tmp_path, narrow):
    patch.main(["--cases", "a", "--depth", "1", "--repeats", "1", "--parts", "--train", "--save", str(tmp_path)])
    result = saved(tmp_path)["patch_cpu"]
    assert [row["case"] for row in result["rows"]] == ["a", "training step"] and result["parts"]
    patch.main(["--cases", "a", "--depth", "1", "--repeats", "1", "--train", "--save", str(tmp_path), "--peers"])
    rows = saved(tmp_path)["patch_cpu"]["rows"]
    assert all("patched" in row["seconds"] and patch.THEIRS not in row["seconds"] and row["speedup"] is None for row in rows)


def test_json_alone_is_on_standard_output_where_parts_are_told_too(capsys, narrow):
    patch.main(["--cases", "a", "--depth", "1", "--repeats", "1", "--parts", "--json"])
    assert json.loads(capsys.readouterr().out)["name"] == "patch_cpu"


def test_a_patched_training_step_of_another_loss_is_not_timed(narrow, monkeypatch):
    build = patch.twin

    def other(model):
        found = build(model)
        found.model.language_model.norm.variance_epsilon = 10.0  # the weights are shared
        return found

    monkeypatch.setattr(patch, "twin", other)
    monkeypatch.setattr(patch, "forwards", lambda *_: [])
    with pytest.raises(RuntimeError, match="training step: losses"):
        patch.main(["--cases", "a", "--depth", "1", "--repeats", "1", "--train"])


def test_a_patched_model_whose_run_is_cut_short(tmp_path, narrow, monkeypatch):
    contenders = patch.contenders
    monkeypatch.setattr(patch, "contenders", lambda *args: contenders(*args) if args[3]["input_ids"].shape[1] < 100 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patch.main(["--cases", "a", "b", "--depth", "1", "--repeats", "1", "--save", str(tmp_path)])
    left = json.loads((tmp_path / "patch_cpu.json").read_text())
    assert left["partial"] and [row["case"] for row in left["rows"]] == ["a"]


def test_what_the_host_costs_is_the_path_of_a_device(monkeypatch):
    """No pass of the torch backend runs where a kernel would start, in training neither."""

    def refuse(*_):
        raise AssertionError("a pass of the torch backend")

    calls = host.model_calls()
    for module, name in (("rope", "_rotate_into"), ("attention", "_plan"), ("loss", "_slopes"), ("checks", "row_blocks")):
        monkeypatch.setattr(importlib.import_module(f"qwen2vl_fast.ops.{module}"), name, refuse)
    with host.no_kernels():
        for what in ("tower, training", "decoder, training"):
            calls[what][1]["patched"]()


def test_loss(tmp_path, capsys, monkeypatch):
    """Judged by float32 logits; a contender that computes something else is not timed, and ours ends the run."""
    monkeypatch.setattr(loss, "race", functools.partial(loss.race, words=320))
    monkeypatch.setattr(loss, "WIDTHS", {"2B": 64})
    loss.main(["--tokens", "16", "--repeats", "1", "--save", str(tmp_path)])
    (row,) = saved(tmp_path)["loss_cpu"]["rows"]
    assert row["contenders"]["Liger"] == {"missing": "needs a CUDA device"}
    assert all(row["contenders"][name]["seconds"] for name in ("qwen2vl_fast", "torch"))
    assert "2B, 16 tokens" in capsys.readouterr().out
    plain = loss.eager
    monkeypatch.setattr(loss, "contenders", lambda wanted: ({"torch": lambda *x: plain(*x) * 1.01}, {}))
    wrong = loss.race("2B", 16, ["torch"], 1)
    assert wrong["contenders"]["torch"]["missing"].startswith("fails: ValueError: relative errors")
    monkeypatch.setattr(loss, "contenders", lambda wanted: ({"qwen2vl_fast": lambda *x: plain(*x) * 1.01}, {}))
    with pytest.raises(ValueError, match="relative errors"):
        loss.race("2B", 16, [], 1)


def test_train(tmp_path, capsys, narrow):
    train.main(["--depth", "1", "--text", "16", "--repeats", "1", "--save", str(tmp_path)])
    (row,) = saved(tmp_path)["train_cpu"]["rows"]
    assert row["contenders"][train.FLASH] == {"missing": "needs a CUDA device"}
    assert "needs a CUDA device" in capsys.readouterr().out
    errors = [error for facts in row["contenders"].values() if "loss" in facts for error in facts["gradient_errors"]]
    assert len(errors) == 9 and max(errors) < 1e-4
    train.main(["--depth", "1", "--text", "16", "--repeats", "1", "--save", str(tmp_path), "--peers"])
    (row,) = saved(tmp_path)["train_cpu"]["rows"]
    assert set(row["contenders"]) == {train.PATCHED, train.OURS}


def test_a_model_that_trains_on_something_else_is_not_timed(monkeypatch, narrow):
    model = patch.build(1)
    monkeypatch.setattr(train, "gradients", lambda one, seen=[]: seen.append(0) or [torch.ones(2) * len(seen)])
    with pytest.raises(RuntimeError, match="relative errors of the gradients"):
        train.race(model, [(16, 16)], 8, [train.THEIRS], 1)


def test_preprocess(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "CASES", {"thumbnail": ("photo.jpg", 112, 112, 2)})
    preprocess.main(["--repeats", "1", "--save", str(tmp_path)])
    (row,) = saved(tmp_path)["preprocess_cpu"]["rows"]
    facts = row["contenders"][preprocess.OURS]
    assert facts["largest_difference"] < 1e-5 and row["rows"] == 128
    assert facts["images_per_second"] == pytest.approx(2 / facts["seconds"]["median"])
    preprocess.main(["--repeats", "1", "--save", str(tmp_path), "--peers", preprocess.VISION])
    (row,) = saved(tmp_path)["preprocess_cpu"]["rows"]
    assert set(row["contenders"]) == {preprocess.OURS, preprocess.OURS_CUDA, preprocess.VISION}


def test_a_processor_that_is_not_installed_says_how_to_get_it(monkeypatch):
    for module in ("torchvision", "qwen_vl_utils.vision_process"):
        monkeypatch.setitem(sys.modules, module, None)
    missing = preprocess.contenders(False)[1]
    assert missing[preprocess.VISION].endswith("; pip install torchvision")
    assert missing[preprocess.UTILS].endswith("; pip install qwen-vl-utils torchvision")


def test_rows_of_something_else_are_not_timed(tmp_path, monkeypatch, capsys):
    """A peer's are a row that says so; ours are an error, by whatever they differ."""
    monkeypatch.setattr(preprocess, "CASES", {"thumbnail": ("photo.jpg", 112, 112, 2)})
    contenders = preprocess.contenders(False)[0]
    upside_down = lambda paths: contenders[preprocess.PIL](paths).flip(0)  # noqa: E731
    cut = lambda paths: contenders[preprocess.PIL](paths)[1:]  # noqa: E731
    others = {preprocess.VISION: upside_down, preprocess.UTILS: cut, preprocess.VISION_CUDA: lambda paths: paths[9]}
    monkeypatch.setattr(preprocess, "contenders", lambda _: (contenders | others, {}))
    preprocess.main(["--repeats", "1", "--save", str(tmp_path)])
    (row,) = saved(tmp_path)["preprocess_cpu"]["rows"]
    assert "grey levels off" in row["contenders"][preprocess.VISION]["missing"]
    assert row["contenders"][preprocess.VISION_CUDA]["missing"].startswith("fails: IndexError")
    assert "(127, 1176) instead of (128, 1176)" in row["contenders"][preprocess.UTILS]["missing"]
    monkeypatch.setattr(preprocess, "contenders", lambda _: (contenders | {preprocess.OURS: upside_down}, {}))
    with pytest.raises(RuntimeError, match="other rows than transformers'"):
        preprocess.main(["--repeats", "1"])


def test_a_pass_of_a_peer_that_fails_is_a_row():
    x = torch.ones(4, 2)

    def broken():
        raise OSError("no compiler")

    found = {"torch": lambda: x, "transformers": broken, "Liger": lambda: -x, "qwen2vl_fast": lambda: x}
    case = passes.Case("x", 4, 1, found, lambda rows: (x[rows].double(),))
    row = passes.measure_case(case, ["torch", "transformers", "Liger"], 1, 1e9)["contenders"]
    assert "seconds" in row["torch"] and row["transformers"] == {"missing": "fails: OSError: no compiler"}
    assert row["Liger"]["missing"].startswith("fails: RuntimeError: x, 4 tokens, Liger: relative error")
    case.contenders["qwen2vl_fast"] = broken
    with pytest.raises(OSError, match="no compiler"):
        passes.measure_case(case, [], 1, 1e9)


def test_a_pass_that_computes_something_else_is_not_timed():
    x = torch.ones(4, 2)
    case = passes.Case("x", 4, 1, {}, lambda rows: (x[rows].double(),))
    assert passes.judge(case, "right", x) == 0
    for wrong in (x * 1.001, x * float("nan")):
        with pytest.raises(RuntimeError, match="x, 4 tokens, wrong: relative error"):
            passes.judge(case, "wrong", wrong)


def test_products_and_the_host_without_peers(tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "TOKENS", (1, 8))
    monkeypatch.setattr(host, "op_calls", dict)
    for module in (linear, host):
        module.main(["--repeats", "1", "--save", str(tmp_path), "--peers"])
    found = saved(tmp_path)
    assert all(set(row["gflops"]) == {"qwen2vl_fast"} for row in found["linear_cpu"]["rows"])
    assert all("patched" in row["calls"] and "transformers" not in row["calls"] for row in found["host"]["rows"])


def test_rows_made_on_a_device_are_those_made_on_the_host(tmp_path, monkeypatch):
    """The bits of the host's, rounded: both resizes give the same levels."""
    monkeypatch.setattr(preprocess, "CASES", {"small": ("photo.jpg", 150, 110, 2), "large": ("page.png", 112, 168, 1)})
    for path in preprocess.pictures(tmp_path).values():
        found, expected = preprocess.ours_on("cpu")(path).float(), preprocess.ours(path)
        assert found.shape == expected.shape and (found - expected).abs().max() <= 2.0**-8 * expected.abs().max()


@pytest.mark.parametrize("name", sweep.FAMILIES)
def test_every_setting_of_a_sweep_launches(name):
    family = sweep.FAMILIES[name]
    before = {key: getattr(family.module, key) for key in family.settings}
    kinds = set()
    run, size = family.call(1024 if name == "patchify" else 64)
    for _ in sweep.settings(family):
        with recorded() as launches:
            run()
        kinds.add(tuple(sorted((key, value) for key, value in launches[0].options.items())))
        assert size > 0 and launches
    assert len(kinds) > 1, "the settings change nothing"
    assert before == {key: getattr(family.module, key) for key in family.settings}


def test_the_widest_setting_of_a_rotation_compiles():
    rope = sweep.FAMILIES["vision_rope"]
    for row in sweep.settings(rope):
        if row == {"BLOCK_H": 4, "NUM_WARPS": 4, "SHARE": 8}:
            with recorded() as launches:
                rope.call(32768)[0]()
    assert compiled(launches[0], 90)["stack"] == 0


def test_the_program_under_the_sanitizers():
    """Its calls on the CPU, where the torch backend stands for the kernels."""
    names = [op for op, _, call in sanitize.calls(torch.float32, "cpu", "torch") if call() is not None or op.endswith("_")]
    assert len(names) == 15


def test_a_partial_result_is_kept_and_marked(tmp_path):
    options = timing.parser("rope", "x").parse_args(["--save", str(tmp_path)])
    timing.keep("rope_cpu", options, [{"op": "x"}])
    assert json.loads((tmp_path / "rope_cpu.json").read_text())["partial"] is True
    timing.publish("rope_cpu", options, [{"op": "x"}])
    assert "partial" not in json.loads((tmp_path / "rope_cpu.json").read_text())


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    """FlashAttention-4 brings a folder flash_attn without what flash-attn has in its own."""
    (tmp_path / "flash_attn_of_another" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(peers.Missing, match="pip install flash-attn"):
        peers.load("flash_attn_of_another.ops.triton.rotary", "apply_rotary", "flash-attn", cuda=True)
