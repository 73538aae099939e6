"""README.md and docs/bench.md: their tables are those that bench.report makes of the results."""

import pytest

from bench import report

TEXTS = report.documents()


def test_the_tables_agree_with_the_results():
    assert report.render(TEXTS) == TEXTS, "run python -m bench.report"


def test_a_changed_figure_is_noticed():
    readme = TEXTS["README.md"]
    first = readme.index(" ms |")
    changed = TEXTS | {"README.md": readme[: first - 1] + str((int(readme[first - 1]) + 1) % 10) + readme[first:]}
    assert report.render(changed) != changed


def test_a_missing_table_is_an_error():
    with pytest.raises(ValueError, match="expected the tables"):
        report.render(TEXTS | {"README.md": TEXTS["README.md"].replace("<!-- table nano -->", "")})


def test_the_report_of_the_second_example():
    """What README shows is what patch prints: nano, five tokens, then verify."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    import torch

    import qwen2vl_fast

    shown = next(block for block in TEXTS["README.md"].split("```") if "ForConditionalGeneration of transformers" in block)
    folder = report.NANO
    hf = transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    grid = torch.tensor([[1, 4, 4]])
    ids = torch.cat((torch.arange(5), torch.full((4,), hf.config.image_token_id), torch.arange(5)))[None]
    kinds = (ids == hf.config.image_token_id).int()
    inputs = {"input_ids": ids, "mm_token_type_ids": kinds, "pixel_values": torch.randn(16, 1176), "image_grid_thw": grid}
    found = qwen2vl_fast.patch(hf)
    hf.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    found.verify(inputs)
    assert str(found) == shown.strip("\n").replace("5.23.0", transformers.__version__)
