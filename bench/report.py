"""Writes the tables of README.md and docs from bench/results/*.json and nano's eval.json, and plots.

    python -m bench.report [--check] [--from FOLDER]

A table stands between `<!-- table NAME -->` and `<!-- end -->`; --check changes nothing and fails when a table or a plot is not
what the results give. --from takes over the results of another machine (JSON files, or one that holds several) first.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import plots
from bench.timing import RESULTS, ROOT, speedup, times
from bench.variants import best
from qwen2vl_fast.training import nano_card

NANO = ROOT / "qwen2vl_fast" / "assets" / "nano"
OURS = "qwen2vl_fast"
DOCUMENTS = ("README.md", "docs/bench.md", "docs/hopper.md", "docs/patch.md")
PASSES = ("rope", "mrope", "merge", "norms", "activations", "patchify")
Result = dict[str, Any]


def read(path: Path) -> Result:
    return json.loads(path.read_text(encoding="utf-8"))


def sources(results: list[Result]) -> list[str]:
    """Where results come from: a paragraph for each device, state and run, with the commands that it was asked."""
    found: dict[str, list[str]] = {}
    for result in results:
        found.setdefault(source(result), []).append(f"`{result['command']}`")
    paragraphs = [line for text, commands in found.items() for line in ("", f"{text}: {', '.join(commands)}")]
    return paragraphs[1:]


def source(result: Result) -> str:
    env = result["environment"]
    parts = [env["device"]]
    if "driver" in env:
        parts += [f"driver {' '.join(env['driver'])}", f"CUDA {env['cuda']}"]
    else:
        parts.append(
            f"{env['threads']} thread{'s' if env['threads'] != 1 else ''}"
            + (f" (load average {env['load_average']})" if env.get("load_average") else "")
        )
    parts += [f"torch {env['torch']}"]
    parts += [f"{name} {env[name]}" for name in ("transformers", "triton") if env.get(name, "not installed") != "not installed"]
    state = f"commit {env['commit']}" if env["commit"] != "no git checkout" else f"sources {env['sources']}"
    text = ", ".join([*parts, env["date"], state])
    if ceiling := result.get("ceilings"):
        text += (
            f"; same run: copy {rate(ceiling['copy_bytes_per_s'], 2)}B/s, matrix product {ceiling['matmul']} "
            f"{rate(ceiling['matmul_flops'], 0)}FLOP/s"
        )
    return text


def rate(value: float, digits: int) -> str:
    """'3.01 T', with these digits; '12 G' where that would show fewer than two of them."""
    return f"{value / 1e12:.{digits}f} T" if value >= 10 ** (13 - digits) else f"{value / 1e9:.0f} G"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"] + [
        "| " + " | ".join(row) + " |" for row in rows
    ]


def time(seconds: float) -> str:
    return (
        f"{seconds * 1e3:.0f} ms"
        if seconds >= 0.1
        else f"{seconds * 1e3:.2f} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:.1f} us"
    )


def tower(result: Result) -> list[str]:
    if "case" not in result["rows"][0] or result["environment"].get("driver") is None:
        rows = []
        for row in result["rows"]:
            patches = " + ".join(str(t * h * w) for t, h, w in row["grids"])
            seconds = [row["seconds"].get(key) for key in ("transformers sdpa", OURS)]
            cells = ["" if value is None else f"{value['median'] * 1e3:.0f} ms" for value in seconds]
            rows.append([patches, *cells, times(row["speedup"])])
        return table(["patches of the images", "transformers sdpa", OURS, "ratio"], rows)
    theirs = "transformers sdpa"
    names = [n for n in dict.fromkeys(name for row in result["rows"] for name in row["seconds"]) if n != theirs]
    rows = []
    for row in result["rows"]:
        seconds, cells = row["seconds"], []
        for n in names:
            cells += [time(seconds[n]["median"]), times(speedup(seconds, theirs, n))] if n in seconds else ["", ""]
        peer = time(seconds[theirs]["median"]) if theirs in seconds else ""
        rows.append([plots.case_name(row), peer, *cells, f"{100 * row['share_of_floor']:.0f} %"])
    head = [cell for name in names for cell in (name, "ratio")]
    return table(["case", theirs, *head, "of the floor"], rows)


def attention(result: Result) -> list[str]:
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["contenders"]))
    shown = [name for name in names if any("flops" in row["contenders"][name] for row in result["rows"])]
    digits = 0 if result["ceilings"]["matmul_flops"] > 1e13 else 3
    rows = []
    for row in result["rows"]:
        cells = []
        for name in shown:
            facts = row["contenders"][name]
            cells.append(f"{facts['flops'] / 1e12:.{digits}f}" if "flops" in facts else "no")
        ours = row["contenders"].get(OURS, {})
        share = f"{100 * ours['share_of_matmul']:.0f} %" if "share_of_matmul" in ours else ""
        ratio = f"{row['ratio_to_best_peer']:.2f}x" if row["ratio_to_best_peer"] else ""
        rows.append([f"({row['case']}) {row['lengths']}", *cells, share, ratio])
    lines = table(["useful TFLOP/s", *shown, "ours, of a matrix product", "over the best peer"], rows)
    notes = {}
    for row in result["rows"]:
        for name, facts in row["contenders"].items():
            if "missing" in facts:
                notes.setdefault(f"{name}: {facts['missing']}", []).append(row["case"])
    for note, cases in notes.items():
        lines += ["", note.replace("|", "/") + ("" if len(cases) == len(result["rows"]) else f" ({', '.join(cases)})")]
    if means := result.get("geometric_means"):
        lines += ["", "Geometric mean over " + ", ".join(f"{name} {mean:.2f}x" for name, mean in means.items())]
    return lines


LONG = ("d", "e")  # the cases of 4096 patches an image and more


def hopper() -> str:
    """The attention forward against its goals, case by case against its prediction, and how far it is."""
    result, path = read(RESULTS / "attention_cuda.json"), RESULTS / "static_model.json"
    rows = {row["case"]: row for row in result["rows"]}
    model = {row["case"]: row["predicted_flops"]["H100"] / 1e12 for row in read(path)["attention"]} if path.exists() else {}
    ours = {case: row["contenders"][OURS] for case, row in rows.items() if "flops" in row["contenders"].get(OURS, {})}
    speeds = {case: facts["flops"] / 1e12 for case, facts in ours.items()}
    lines = table(
        ["useful TFLOP/s", *(f"({case})" for case in rows)],
        [[name, *(f"{values[case]:.0f}" if case in values else "" for case in rows)]
         for name, values in (("predicted, H100 and H200", model), ("measured", speeds))],
    )  # fmt: skip

    def over(peer: str, cases: Any = LONG) -> dict[str, float]:
        theirs = {case: rows[case]["contenders"].get(peer, {}).get("flops") for case in cases if case in rows}
        return {case: ours[case]["flops"] / flops for case, flops in theirs.items() if flops and case in ours}

    everywhere = over("FlashAttention-3", rows)
    mean = math.exp(sum(map(math.log, everywhere.values())) / len(everywhere)) if len(everywhere) == len(rows) else None
    peers = {case: row["ratio_to_best_peer"] for case, row in rows.items() if row["ratio_to_best_peer"]}
    least = min(peers, key=peers.get, default="")
    shares = {case: 100 * ours[case]["share_of_matmul"] for case in LONG if case in ours}
    goals = [
        ("620 useful TFLOP/s from 4096 patches on", 620, {c: speeds[c] for c in LONG if c in speeds}, "{:.0f}"),
        ("78 % of the same run's matrix product there", 78, shares, "{:.0f} %"),
        *((f"{goal} times {peer} there", goal, over(peer), "{:.2f}")
          for peer, goal in (("FlashAttention-3", 1.25), ("FlashAttention-4", 1.15), ("cuDNN", 1.15))),
        ("400 useful TFLOP/s on (b)", 400, {c: speeds[c] for c in "b" if c in speeds}, "{:.0f}"),
        ("1.4 times FlashAttention-3, geometric mean of all cases", 1.4, {} if mean is None else {"": mean}, "{:.2f}"),
        ("never under the best peer", 1, {least: peers[least]} if peers else {}, "{:.2f} at the least"),
    ]  # fmt: skip
    cells = []
    for goal, bound, found, how in goals:
        told = ", ".join(f"({case}) {how.format(value)}" if case else how.format(value) for case, value in found.items())
        verdict = "not measured" if not found else "reached" if min(found.values()) >= bound else "**missed**"
        cells.append([goal, told, verdict])
    lines += ["", *table(["goal", "measured", ""], cells)]
    for peer in ("FlashAttention-4", "cuDNN"):
        if not over(peer):
            reasons = {row["contenders"].get(peer, {}).get("missing", "took no part") for row in rows.values()}
            lines += [line for reason in sorted(reasons) for line in ("", f"{peer}: {reason}")]
    return "\n".join([*lines, "", source(result)])


def variants(result: Result) -> list[str]:
    """Useful TFLOP/s of every form of the Hopper forward; the last column is what `bench.variants --choose` goes by."""
    names = {(entry["name"], entry["rows"]) for entry in result["rows"][0]["variants"]}
    speeds = [{(e["name"], e["rows"]): e["flops"] for e in row["variants"] if "flops" in e} for row in result["rows"]]
    means = best(result["rows"])
    rows = [
        [f"{name}, {size} rows", *(f"{found[name, size] / 1e12:.0f}" if (name, size) in found else "no" for found in speeds),
         f"{means[name]:.3f}" if name in means else ""]
        for name, size in sorted(names, key=lambda key: (-means.get(key[0], 0), key))
    ]  # fmt: skip
    return table(["form", *(f"({row['case']})" for row in result["rows"]), "speed over the chosen, better size"], rows)


def passes(results: list[Result]) -> list[str]:
    rows = []
    for result in results:
        most = max(row["tokens"] for row in result["rows"])
        for row in result["rows"]:
            if row["tokens"] != most:
                continue
            ours = row["contenders"][OURS]
            seconds = {n: facts["seconds"] for n, facts in row["contenders"].items() if "seconds" in facts}
            peers = [n for n in seconds if not n.startswith(OURS)]
            best = min(peers, key=lambda n: seconds[n]["median"], default="")
            share = f"{100 * ours['share_of_copy']:.0f} %"
            rows.append([
                row["op"], str(row["tokens"]), time(ours["seconds"]["median"]), share,
                time(seconds[best]["median"]) if best else "", best, times(speedup(seconds, best, OURS)),
            ])  # fmt: skip
    return table(["op", "tokens", OURS, "of copy bandwidth", "best peer", "which", "ratio"], rows)


def generate(result: Result) -> list[str]:
    rows = []
    for row in result["rows"]:
        for name, facts in row["contenders"].items():
            rows.append([
                f"{row['size']}, {row['layers']} layers", str(row["batch"]), str(row["context"]), name,
                f"{facts['tokens_per_second']:.1f}", f"{100 * facts['share_of_limit']:.0f} %",
                time(facts["prefill_seconds"]["median"]),
            ])  # fmt: skip
    return table(["model", "batch", "context", "", "tokens/s", "of the copy limit", "prefill"], rows)


def preprocess(result: Result) -> list[str]:
    names = [name for name, facts in result["rows"][0]["contenders"].items() if "seconds" in facts]
    rows = []
    for row in result["rows"]:
        speeds = {name: row["contenders"][name]["images_per_second"] for name in names}
        cells = [f"{speeds[name]:.1f}" for name in names]
        best = max((speeds[n] for n in names if not n.startswith(OURS) and not n.endswith("on the GPU")), default=None)
        cells += [times(speeds[name] / best if best else None) for name in names if name.startswith(OURS)]
        rows.append([f"{row['picture']}, {row['rows']} rows", *cells])
    processor = result["rows"][0]["contenders"][OURS]["seconds"]["method"] == "processor time"
    over = [f"{name}, over the best peer on the host" for name in names if name.startswith(OURS)]
    lines = table(["images/s of processor time" if processor else "images/s", *names, *over], rows)
    for name, facts in result["rows"][0]["contenders"].items():
        if "missing" in facts:
            lines += ["", f"{name}: {facts['missing']}"]
    return lines


def stories(result: Result) -> list[str]:
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["contenders"]))
    parts = list(next(iter(result["rows"][0]["contenders"].values()))["seconds"])
    rows = []
    for row in result["rows"]:
        for name in names:
            seconds = row["contenders"][name]["seconds"]
            rows.append([row["story"], str(row["visual_tokens"]), name, *(time(seconds[part]) for part in parts)])
    return table(["story", "visual tokens", "", *parts], rows)


def static_model(result: Result) -> list[str]:
    devices = list(result["devices"])
    rows = [
        [f"({row['case']})", *(f"{row['predicted_flops'][name] / 1e12:.0f}" for name in devices), _against(row)]
        for row in result["attention"]
    ]
    lines = table(["attention, useful TFLOP/s predicted", *devices, "measured over predicted time"], rows)
    rows = []
    for row in result["rows"]:
        if row["kind"] != "Triton" or not row["predicted_seconds"]:
            continue
        registers = " / ".join(str(row[arch]["registers"]) for arch in ("sm_80", "sm_90"))
        blocks = " / ".join(str(row["resident_blocks"][name]) for name in ("A100", "H100"))
        times = [time(row["predicted_seconds"][name]) for name in devices]
        rows.append([row["kernel"], registers, blocks, *times, _against(row)])
    head = [
        "Triton kernel, 32768 tokens",
        "registers sm_80 / sm_90",
        "blocks A100 / H100",
        *devices,
        "measured over predicted time",
    ]
    cuda = []
    for row in result["rows"]:
        if row["kind"] != "CUDA" or not row.get("flop") and not row.get("bytes") or "<false" in row["kernel"]:
            continue
        facts = [row.get(arch) for arch in ("sm_80", "sm_90")]
        registers = " / ".join(str(fact["registers"]) if fact else "" for fact in facts)
        shared = next(fact.get("shared") for fact in facts if fact)
        blocks = " / ".join(str(row["resident_blocks"].get(name, "")) for name in ("A100", "H100"))
        times = [time(row["predicted_seconds"][name]) if name in row["predicted_seconds"] else "" for name in devices]
        kernel = row["kernel"].replace("<", "&lt;")
        cuda.append([kernel, registers, "" if shared is None else f"{shared / 1024:.0f} KiB", blocks, *times])
    head_cuda = ["CUDA kernel in bf16, 4 x 4096 tokens, 16 heads", head[1], "shared memory", head[2], *devices]
    return [*lines, "", *table(head, rows), *(["", *table(head_cuda, cuda)] if cuda else [])]


def _against(row: dict[str, Any]) -> str:
    measured = row.get("measured", {})
    return f"{measured['measured_over_predicted']:.2f}" if "measured_over_predicted" in measured else ""


def nano() -> str:
    result, facts = read(NANO / "eval.json"), read(NANO / "training.json")
    samples = next(iter(result["tasks"].values()))["samples"]
    where = f"{result['device']}, torch {result['torch']}: `{result['command']}`, {samples} samples a task"
    trained = f"{facts['samples']} training samples, {facts['minutes']} minutes of {facts['threads']} CPU thread"
    first = facts["history"][0]
    if first["init"]:
        trained += f", begun with a checkpoint of {first['init_samples']} samples, {first['init_minutes']} minutes"
    lines = [*nano_card.accuracy_table(result), "", *nano_card.ways_table(result), ""]
    return "\n".join([*lines, f"{where}; after {trained} (the model card has the run)"])


def patch(result: Result) -> list[str]:
    head = ["case", "patches", "tokens", "transformers sdpa", "patched", "ratio"]
    rows = [
        [
            row["case"] if " " in row["case"] else f"({row['case']})", str(row["patches"]), str(row["tokens"]),
            *(time(row["seconds"][name]["median"]) if name in row["seconds"] else "" for name in head[3:5]),
            times(row["speedup"]),
        ]
        for row in result["rows"]
    ]  # fmt: skip
    return table(head, rows)


def train(result: Result) -> list[str]:
    rows, lines = [], []
    for row in result["rows"]:
        case = f"{row['patches']} patches, {row['tokens']} tokens, {row['dtype']}"
        seconds = {name: facts["seconds"] for name, facts in row["contenders"].items() if "seconds" in facts}
        for name, value in seconds.items():
            peak = row["contenders"][name].get("peak_bytes")
            memory = "" if peak is None else f"{peak / 2**30:.2f} GiB"
            rows.append([case, name, time(value["median"]), times(speedup(seconds, "transformers sdpa", name)), memory])
        missing = {name: facts["missing"] for name, facts in row["contenders"].items() if "missing" in facts}
        lines += [line for name, reason in missing.items() for line in ("", f"{name}: {reason}")]
    return table(["training step", "", "time", "against transformers", "peak above the weights"], rows) + lines


def loss(result: Result) -> list[str]:
    rows, lines, matmul = [], [], result["ceilings"]["matmul_flops"]
    for row in result["rows"]:
        facts = row["contenders"]
        seconds = {name: fact["seconds"] for name, fact in facts.items() if "seconds" in fact}
        for name, value in seconds.items():
            memory = f"{facts[name]['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in facts[name] else ""
            share = f"{100 * facts[name]['flops'] / matmul:.0f} %"
            rows.append([row["case"], name, time(value["median"]), share, times(speedup(seconds, "torch", name)), memory])
        if row is result["rows"][-1]:
            lines += [line for name, fact in facts.items() if "missing" in fact for line in ("", f"{name}: {fact['missing']}")]
    head = ["loss, forward and backward", "", "time", "three products, of a matrix product's rate", "against torch", "peak"]
    return table(head, rows) + lines


def linear(result: Result) -> list[str]:
    names = list(result["rows"][0]["gflops"])
    rows = []
    for row in result["rows"]:
        shape = " x ".join(map(str, row["shape"]))
        ratio = times(speedup(row["seconds"], "torch.nn.functional.linear", OURS))
        rows.append([f"{row['product']}, {shape}", *(f"{row['gflops'][name]:.0f}" for name in names), ratio])
    return table(["GFLOP/s of a float32 product", *names, "ratio"], rows)


def host(result: Result) -> list[str]:
    names = ("transformers", "patched", "Qwen2VL")
    cells = lambda found: [str(found.get(name, "")) for name in names]  # noqa: E731
    forwards = [row for row in result["rows"] if "forward" in row]
    rounded = [{name: round(value) for name, value in row["microseconds"].items()} for row in forwards]
    rows = [[row["forward"], *cells(row["calls"]), *cells(us)] for row, us in zip(forwards, rounded, strict=True)]
    lines = table(["4 layers", *(f"{n}, calls" for n in names), *(f"{n}, us" for n in names)], rows)
    ops = [[row["op"], str(row["calls"]), f"{row['microseconds']:.1f}"] for row in result["rows"] if "op" in row]
    return [*lines, "", *table(["op", "calls", "us"], ops)]


def summary() -> str:
    """The whole in a few lines: the range of the ratios of tables that README and docs/bench.md have."""
    rows = []
    for stem, what, theirs, ours in SUMMARY:
        path = RESULTS / f"{stem}.json"
        result = read(path) if path.exists() else {"rows": []}
        ratios = {i: ratio for i, row in enumerate(result["rows"]) if (ratio := _ratio(row, theirs, ours))}
        if ratios:
            mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
            cells = [times(value) for value in (min(ratios.values()), mean, max(ratios.values()))]
            cases = [f"({result['rows'][i]['case']})" for i in ratios if "case" in result["rows"][i]]
            rows.append([result["environment"]["device"], " ".join([what, *cases]), theirs, *cells])
    return "\n".join(table(["on", "what", "how many times as fast as", "least", "mean", "most"], rows))


GRAPH = f"{OURS} in a CUDA graph"
SUMMARY = (
    ("attention_cuda", "attention of the tower", "FlashAttention-3", OURS),
    ("attention_cuda", "attention of the tower", "torch varlen_attn", OURS),
    ("tower_cuda_bfloat16", "whole tower", "transformers sdpa", OURS),
    ("tower_cuda_bfloat16", "whole tower, in a CUDA graph", "transformers sdpa", GRAPH),
    ("patch_cpu", "patched model, 4 layers", "transformers sdpa", "patched"),
    ("patch_cpu_avx2", "patched model, 4 layers", "transformers sdpa", "patched"),
    ("patch_cpu_avx512", "patched model, 4 layers", "transformers sdpa", "patched"),
    ("preprocess_cpu", "pictures to pixel rows", "transformers PIL", OURS),
)


def _ratio(row: dict[str, Any], theirs: str, ours: str) -> float | None:
    """Their median time over ours; None where one of them took no part, and of rows that are no case (a training step)."""
    facts = row.get("seconds") or {name: one["seconds"] for name, one in row["contenders"].items() if "seconds" in one}
    return None if " " in row.get("case", "") or ours not in facts else speedup(facts, theirs, ours)


RENDERERS: dict[str, Callable[[Result], list[str]]] = {
    "tower": tower,
    "attention": attention,
    "generate": generate,
    "preprocess": preprocess,
    "stories": stories,
    "static_model": static_model,
    "patch": patch,
    "train": train,
    "linear": linear,
    "loss": loss,
    "host": host,
    "variants": variants,
}


def tables() -> dict[str, Callable[[], str]]:
    """{name: what stands under it}: of each result with a renderer, of all passes of a device, of nano, and of the whole."""
    found: dict[str, Callable[[], str]] = {"summary": summary, "nano": nano}
    if (RESULTS / "attention_cuda.json").exists():
        found["hopper"] = hopper
    for path in sorted(RESULTS.glob("*.json")):
        for prefix, render in RENDERERS.items():
            if path.stem == prefix or path.stem.startswith(prefix + "_"):
                found[path.stem] = lambda path=path, render=render: _block(render(read(path)), [read(path)], path.stem)
    for device in ("cuda", "cpu"):
        paths = [path for subject in PASSES if (path := RESULTS / f"{subject}_{device}.json").exists()]
        if paths:
            name = f"passes_{device}"
            found[name] = lambda paths=paths, name=name: _block(passes(list(map(read, paths))), list(map(read, paths)), name)
    return found


def _block(lines: list[str], results: list[Result], name: str) -> str:
    notes = [line for result in results if "note" in result for line in ("", result["note"])]
    cut = [result["command"] for result in results if result.get("partial")]
    notes += [line for command in cut for line in ("", f"The run was stopped before it had all rows: `{command}`")]
    figures = [f"![{caption}]({path})" for path, caption in plots.figures(name)]
    return "\n".join([*lines, "", *figures, *([""] if figures else []), *sources(results), *notes])


def render(texts: dict[str, str]) -> dict[str, str]:
    """Documents with every table written anew. Raises ValueError unless each table stands in one of them, once."""
    known = tables()
    names = placed(texts)
    if sorted(names) != sorted(known):
        raise ValueError(f"{' and '.join(texts)}: expected the tables {sorted(known)}, got {sorted(names)}")

    def block(match: re.Match[str]) -> str:
        return match[1] + known[match[2]]() + "\n" + match[3]

    pattern = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return {path: _beside(path, pattern.sub(block, text)) for path, text in texts.items()}


def placed(texts: dict[str, str]) -> list[str]:
    return [name for text in texts.values() for name in re.findall(r"<!-- table (\w+) -->", text)]


def place(texts: dict[str, str]) -> dict[str, str]:
    """Results that no document shows yet get a place at the end of docs/bench.md."""
    new = [name for name in tables() if name not in placed(texts)]
    blocks = [f"\n`{name}`:\n\n<!-- table {name} -->\n<!-- end -->\n" for name in new]
    return {path: text + "".join(blocks) if path == "docs/bench.md" else text for path, text in texts.items()}


def _beside(path: str, text: str) -> str:
    """Paths of plots from the document's own folder."""
    return text.replace("](docs/plots/", "](plots/") if path.startswith("docs/") else text


def documents() -> dict[str, str]:
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in DOCUMENTS}


def take_over(folder: Path) -> list[Path]:
    """Copies the results in `folder` to bench/results; a file may hold several by name. Returns what was written."""
    written = []
    for path in sorted(folder.glob("*.json")):
        content = read(path)
        results = {path.stem: content} if "environment" in content else content
        for name, result in results.items():
            if not (isinstance(result, dict) and {"environment", "command", "rows"} <= set(result)):
                raise ValueError(f"{path}: {name} is no result of bench (environment, command, rows)")
            RESULTS.mkdir(exist_ok=True)
            target = RESULTS / f"{name}.json"
            target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            written.append(target)
    return written


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail when a table or a plot is out of date, and change nothing")
    parser.add_argument("--from", dest="folder", type=Path, help="first copy the results of this folder to bench/results")
    options = parser.parse_args(argv)
    if options.folder:
        for path in take_over(options.folder):
            print(path)
    before = documents()
    stale = plots.stale()
    if options.check:
        after = render(before)
        changed = [path for path in before if after[path] != before[path]]
        for path in [*changed, *stale]:
            print(f"{path} does not agree with the results; run python -m bench.report", file=sys.stderr)
        return int(bool(changed or stale))
    for path in plots.write(stale):
        print(path)
    for path, text in render(place(before)).items():
        (ROOT / path).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
