"""docs/patch.md's matrix of what patch works with, written from the tests that show it: `python -m tests.matrix`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "patch.md"
START, END = "<!-- matrix -->\n", "<!-- end -->"

# What is claimed: the tests that would fail if it did not hold.
FEATURES: dict[str, tuple[str, ...]] = {
    "inference: logits and hidden states, float64": ("test_patch.test_random_models",),
    "training: loss and every gradient, float64": ("test_patch.test_random_models",),
    "float32, bfloat16, float16": ("test_patch.test_lower_precision",),
    "autocast (a trainer's bf16=True)": ("test_patch.test_autocast",),
    "YaRN, untied heads, any widths": ("test_patch.test_real_head_dims", "test_patch.test_random_models"),
    "merge size 1, head dim 8, sections 2/1/1": ("test_patch.test_head_dim_8_sections_2_1_1_and_merge_size_1",),
    "left and right padding, text-only rows, images and videos mixed": ("test_patch.test_real_head_dims",),
    "tower, decoder or headless model alone": ("test_patch.test_parts_of_a_model_alone",),
    "models that hold one of the classes": ("test_patch_binding.test_wrapped_models_are_found",),
    "ColQwen2": ("test_patch_binding.test_colqwen2",),
    "generate: greedy, sampling, beams, several returned, no cache": ("test_patch_generate.test_ways_to_generate",),
    "generate: static cache": ("test_patch_generate.test_static_cache",),
    "generate: assisted, from embeddings, several turns": (
        "test_patch_generate.test_assisted", "test_patch_generate.test_inputs_embeds",
        "test_patch_generate.test_several_turns_with_one_cache",
    ),
    "output_hidden_states": ("test_patch.test_random_models",),
    "output_attentions (the library's attention runs)": ("test_patch_binding.test_attentions_fall_back_and_say_so",),
    "hidden states of the tower": ("test_patch_binding.test_tower_attentions_and_hidden_states",),
    "encoded media (mm_encoder_outputs)": ("test_patch.test_encoded_media_are_honoured",),
    "precomputed cu_seqlens and position ids": ("test_patch.test_precomputed_inputs_are_honoured",),
    "packed samples (4-row position ids)": ("test_patch.test_packed_samples",),
    'attn_implementation="qwen2vl_fast"': ("test_patch.test_attention_implementation",),
    "LoRA on every Linear (PEFT)": ("test_patch_training.test_lora_everywhere",),
    "gradient checkpointing, reentrant and not": ("test_patch_training.test_gradient_checkpointing_on_equals_off",),
    "frozen tower": ("test_patch_training.test_frozen_tower",),
    "transformers' Trainer": ("test_patch_training.test_trainer",),
    "num_items_in_batch, shift_labels": ("test_patch_training.test_arguments_of_the_loss",),
    "DDP, FSDP2, torch's ZeRO-1, accelerate; a rank without media (2 gloo processes)": (
        "test_patch_training.test_rank_without_media",
    ),
    "sharded (ZeRO-3) and quantized weights are not read": (
        "test_patch_training.test_sharded_and_quantized_weights_are_not_read",
    ),
    "device_map: weights elsewhere (accelerate)": ("test_patch_training.test_model_with_its_weights_elsewhere",),
    "torch.compile": ("test_patch.test_compile", "test_patch.test_compile_whole_model"),
    "save_pretrained and reload": ("test_patch_binding.test_save_and_reload",),
    "deepcopy; pickle (comes back unpatched)": (
        "test_patch_abuse.test_a_copy_is_unpatched_and_patched_again",
        "test_patch_abuse.test_a_pickled_model_comes_back_unpatched",
    ),
    "casts, another attn_implementation, a new layer, resized embeddings after patch": (
        "test_patch_abuse.test_cast_after_patch", "test_patch_abuse.test_a_layer_put_in_after_patch",
        "test_patch_abuse.test_new_embeddings_after_patch",
    ),
    "modules that somebody swapped": ("test_patch_binding.test_swapped_modules_are_respected",),
    "forward hooks of any layer": ("test_patch_binding.test_forward_hooks_of_layers_run",),
}  # fmt: skip


def test_of(name: str) -> Callable:
    module, function = name.split(".")
    return getattr(importlib.import_module(f"tests.{module}"), function)


def new_alone(function: Callable) -> bool:
    """Whether the test is left out with transformers 4.52, which has nothing of the kind."""
    marks = getattr(function, "pytestmark", [])
    return any(mark.name == "skipif" and "transformers 4.52" in mark.kwargs["reason"] for mark in marks)


def table() -> str:
    lines = ["| works with | 4.52 | 5.23 | shown by |", "| --- | --- | --- | --- |"]
    for feature, names in FEATURES.items():
        old = "not there" if any(new_alone(test_of(name)) for name in names) else "yes"
        lines.append(f"| {feature} | {old} | yes | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(lines) + "\n"


def render(text: str) -> str:
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    if not tail:
        raise ValueError(f"{DOCUMENT}: expected {START.strip()} and {END} around the matrix")
    return head + START + table() + END + tail


if __name__ == "__main__":
    DOCUMENT.write_text(render(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
