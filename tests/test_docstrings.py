"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import apportion

NAMES = sorted(
    name
    for _, name, package in pkgutil.walk_packages(apportion.__path__, "apportion.")
    if not package and not name.endswith("__main__")
)


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_a_module_print_what_they_say(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} fail; see the captured output"


def test_examples_are_found_at_all() -> None:
    finder = doctest.DocTestFinder()
    found = sum(len(test.examples) for name in NAMES for test in finder.find(importlib.import_module(name)))
    assert found > 30
