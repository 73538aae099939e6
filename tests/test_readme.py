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
