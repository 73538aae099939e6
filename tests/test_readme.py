"""README.md: its tables are those that bench.report makes of the results."""

import pytest

from bench import report

README = (report.ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_agree_with_the_results():
    assert report.render(README) == README, "run python -m bench.report"


def test_a_changed_figure_is_noticed():
    first = README.index(" ms |")
    changed = README[: first - 1] + str((int(README[first - 1]) + 1) % 10) + README[first:]
    assert report.render(changed) != changed


def test_a_missing_table_is_an_error():
    with pytest.raises(ValueError, match="expected the tables"):
        report.render(README.replace("<!-- table nano -->", ""))
