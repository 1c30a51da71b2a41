"""The pages of the patched libraries: figures as measured, examples that ran with the library they are about."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.compat import __main__ as compat
from benchmarks.compat import pages
from benchmarks.compat.environments import ENVIRONMENTS
from ccu_fast import patch

ROWS = json.loads(compat.RESULTS.read_text())
# Whose examples `make test` cannot run: it has no such library.
ELSEWHERE = [name for name in patch.TARGETS if f"<!-- needs: {name} -->" in pages.page(name).read_text()]

PAGE = """
<!-- setup
x = 2
-->
Prose.

```python
with open("written", "w") as file:
    file.write(str(x))
```

```text
not Python
```

```python
assert x == 2
```
"""


def test_the_committed_tables_are_what_the_results_make() -> None:
    for path, text in pages.with_tables(ROWS).items():
        assert pages.BEGIN in text, path.name
        assert path.read_text() == text, f"{path.name}: run python -m benchmarks.compat --report"


@pytest.mark.parametrize("target", patch.TARGETS)
def test_a_page_says_how_to_switch_on_and_off_and_how_one_knows(target: str) -> None:
    text = pages.page(target).read_text()
    for said in (f'patch.apply("{target}")', f'patch.revert("{target}")', f'patch.applied("{target}"', "patch.calls()"):
        assert said in text
    for heading in ("What is replaced, and what is not", "What it gains", "Pitfalls"):
        assert f"\n## {heading}\n" in text


def test_which_pages_run_elsewhere() -> None:
    assert ELSEWHERE == ["lightly", "colpali_engine", "flag_embedding", "laion_clap", "textattack"]


@pytest.mark.parametrize("environment", [e.name for e in ENVIRONMENTS if e.target in ELSEWHERE])
def test_examples_ran_with_their_library_as_they_are_now(environment: str) -> None:
    row = ROWS[environment]
    text = pages.page(row["target"]).read_text()
    assert row["page"] == {"examples": len(pages.examples(text)), "digest": pages.digest(text), "outcome": "passed"}, (
        f"run make compat ARGS='--pages --only {row['target']}'"
    )


def test_examples_are_python_and_setup_with_their_lines() -> None:
    found = pages.examples(PAGE)
    assert [block.line for block in found] == [3, 8, 17]
    assert [block.text.splitlines()[0] for block in found] == [
        "x = 2",
        'with open("written", "w") as file:',
        "assert x == 2",
    ]
    assert pages.digest(PAGE) == pages.digest(PAGE.replace("Prose", "Other prose"))
    assert pages.digest(PAGE) != pages.digest(PAGE.replace("x == 2", "x == 3"))


def test_a_page_that_fails_is_recorded_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pages, "FOLDER", tmp_path)
    pages.page("lightly").write_text(PAGE)
    pages.execute(pages.page("lightly"))
    assert not Path("written").exists()
    pages.page("lightly").write_text(PAGE.replace("x == 2", "x == 3"))
    row = pages.run("lightly", Path(sys.executable))
    assert row["outcome"] == "failed" and row["examples"] == 3
    assert 'lightly.md", line 17' in capsys.readouterr().err


def test_a_row_that_did_not_pass_has_no_figures() -> None:
    rows = {name: {**row, "outcome": "failed"} if name == "lightly-1.6.0" else row for name, row in ROWS.items()}
    assert "| 1.5.20 |" in pages.figures("lightly", rows) and "| 1.6.0 |" not in pages.figures("lightly", rows)
    assert "1.6.0" not in pages.overview(rows)
