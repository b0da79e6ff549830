"""The README's code runs as it stands, and its table and commands name things that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import apportion.callbacks

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_has_code() -> None:
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_blocks_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README.md block {number}", "exec"), {"__name__": "readme"})


def test_the_table_has_a_row_for_every_preset() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE))
    assert rows == set(apportion.callbacks.__all__) - {"MemoryMonitor"}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake (demo|test|lint|bench)\b", README))))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
