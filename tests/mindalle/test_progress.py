"""Progress bars, in a terminal and in a log."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mindalle
from mindalle.progress import progress_bar

ROOT = Path(mindalle.__file__).parents[1]


def test_a_log_has_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten states a second filled the logs of evaluations that take hours."""
    for _ in progress_bar(range(1000), desc="reading", unit=" pictures", miniters=1):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert "reading: 100%" in lines[-1]
    assert "1000/1000" in lines[-1]
    assert len(lines) == 2  # where it began and where it ended


def test_all_bars_are_made_in_one_place() -> None:
    """Downloads alone have a bar that no log shows."""
    makers = {"mindalle/progress.py", "mindalle/download.py"}
    for path in (*(ROOT / "mindalle").rglob("*.py"), *(ROOT / "tools").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        is_maker = any(isinstance(func, ast.Name) and func.id == "tqdm" for func in calls)
        assert is_maker <= (str(path.relative_to(ROOT)) in makers), path
