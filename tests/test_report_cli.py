"""``apportion-report``: what differs between runs, their seeds brought together, and a page that survives bad input."""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from apportion import report_curves
from apportion.recipes.report import cli as report_cli
from apportion.recipes.report import reported
from apportion.recipes.report.pictures import PANELS
from apportion.recipes.report.summary import Summary, objective, seeds
from apportion.recipes.sweeps.runs import Run, collect
from apportion.report_cells import LONGEST, cells, unique
from apportion.report_groups import Spread, grouped, labels
from apportion.report_page import Table, link, marked

EVIL = "<script>alert('x')</script>\"'|`[a](javascript:1)$\\frac{$"


# What differs ---------------------------------------------------------------------------------------------------------


def config(callbacks: Any, lr: float = 0.1, seed: int = 1, **others: Any) -> dict[str, Any]:
    return {"seed": seed, "optimizer": {"_target_": "torch.optim.AdamW", "lr": lr}, "callbacks": callbacks, **others}


LISA = {"lisa": {"_target_": "apportion.callbacks.LISA", "layers": 2}}
IST = {"ist": {"_target_": "apportion.callbacks.IST", "active": 0.5}}


def test_what_all_runs_share_is_no_column_and_seeds_are_none() -> None:
    found = grouped([config(LISA, seed=1), config(LISA, seed=2), config(IST, seed=1)])
    assert found.columns == ("callbacks",)
    assert [(g.label, g.cells, g.members) for g in found.groups] == [
        ("lisa", ("lisa",), (0, 1)),
        ("ist", ("ist",), (2,)),
    ]


def test_a_setting_that_only_some_have_is_a_column_where_it_differs_among_them() -> None:
    four = {"lisa": LISA["lisa"] | {"layers": 4}}
    found = grouped([config(LISA), config(four), config(IST), config(None)])
    assert found.columns == ("callbacks", "callbacks.lisa.layers")
    assert [g.cells for g in found.groups] == [("lisa", "2"), ("lisa", "4"), ("ist", ""), ("none", "")]
    assert [g.label for g in found.groups] == ["lisa, layers 2", "lisa, layers 4", "ist", "no callbacks"]


def test_another_class_is_one_difference() -> None:
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}
    found = grouped([config(LISA), config(LISA) | {"optimizer": sgd}])
    assert found.columns == ("optimizer",)
    assert [g.cells for g in found.groups] == [("AdamW",), ("SGD",)]


def test_how_a_run_is_watched_makes_no_group() -> None:
    (group,) = grouped([config(LISA, logger={"csv": 1}), config(LISA, logger=None, ckpt_path="/a")]).groups
    assert (group.label, group.members) == ("lisa", (0, 1))


def test_a_label_takes_no_more_columns_than_it_needs() -> None:
    rows = [("0.1", "lisa", "LISA"), ("0.2", "ist", "IST")]
    assert labels(["optimizer.lr", "callbacks", "method"], rows) == ["LISA", "IST"]
    assert labels(["callbacks", "model.size"], [("a", "1"), ("a", "2")]) == ["size 1", "size 2"]
    named = [("mine", "lisa", "none"), ("none", "ist", "none"), ("none", "none", "none")]
    assert labels(["method", "callbacks", "peft"], named) == ["lisa", "ist", "no callbacks"]


def test_runs_without_a_config_are_grouped_all_the_same() -> None:
    assert [g.members for g in grouped([{}, {}]).groups] == [(0, 1)]
    found = grouped([{}, config(LISA), {}, config(LISA)])
    assert [(g.label, g.members) for g in found.groups] == [("no config", (0, 2)), ("other", (1, 3))]


def test_a_method_and_none_at_all_are_two_groups() -> None:
    plain = {key: value for key, value in config(None).items() if key != "callbacks"}
    assert [g.label for g in grouped([plain, config(LISA)]).groups] == ["no callbacks", "lisa"]


PLACE = "/data/projects/customer-support/2026/exports/cleaned/deduplicated/"


@pytest.mark.parametrize(
    "values",
    [
        (PLACE + "english.jsonl", PLACE + "german.jsonl"),
        (f"{PLACE}en/{PLACE}a.jsonl", f"{PLACE}de/{PLACE}a.jsonl"),
        ("x" * 200 + "a" * 99 + "y" * 200, "x" * 200 + "a" * 50 + "b" + "a" * 48 + "y" * 200),
        ("{instruction}\n", "{instruction} ", "{instruction}"),
        ("a  b", "a b", "a\u00a0b"),
        (0.1234567, 0.1234568),
        ([{"path": "a"}], [{"path": "b"}]),
        ({"_target_": "one.Adam"}, {"_target_": "two.Adam"}),
        ({"_target_": "Adam", "a": 1}, {"_target_": "Adam", "b": 1}, {"_target_": "SGD"}),
        ({"_target_": "Adam", "_args_": [1]}, {"_target_": "Adam", "_args_": [2]}),
        (None, "none", [], {}),
        (True, 1, "true"),
        (1e300, 1e301, float("inf"), date(2026, 1, 2), "2026-01-02", {1: 2}, {2: 1}),
        ([{"seed": 1}], [{"seed": 2}]),
        (0.1, "0.1"),
        ("", " ", "-", None),
        ("a", "a (2)", "a  ", "a "),
    ],
)
def test_different_values_are_different_groups_and_look_different(values: tuple[Any, ...]) -> None:
    found = grouped([{"x": {"y": value, "z": 1}} for value in values])
    assert [group.members for group in found.groups] == [(at,) for at in range(len(values))]
    rows = [tuple(" ".join(cell.split()) for cell in group.cells) for group in found.groups]  # as a page folds them
    assert len(set(rows)) == len({group.label for group in found.groups}) == len(values)
    assert all(len(cell) <= LONGEST + len(" (9)") for row in rows for cell in row)


def test_what_is_no_difference_makes_no_group() -> None:
    configs = [
        {"seed": 1, "lr": 1, "data": {"seed": 5, "b": 0, "a": 1.0}, "model": {"_target_": "A", "_convert_": "all"}},
        {"seed": 2, "lr": 1.0, "data": {"a": 1, "b": 0, "seed": 6}, "model": {"_target_": "A"}, "extra": None},
        {"seed": 2, "lr": 1.0, "data": {"a": 1, "b": 0}, "model": {"_target_": "A"}, "extra": None},
    ]
    found = grouped(configs)
    assert (found.columns, [group.members for group in found.groups]) == ((), [(0, 1, 2)])
    assert [group.members for group in grouped([{"a": float("nan")}] * 2).groups] == [(0, 1)]


def test_a_setting_that_is_null_is_another_than_one_that_is_not_there() -> None:
    assert len(grouped([config({"lisa": {"layers": None}}), config({"lisa": {}})]).groups) == 2
    assert len(grouped([{"seed": {"data": 1}}, {"seed": {"data": 2}}]).groups) == 2


def test_a_long_value_keeps_both_ends_and_shows_where_others_differ() -> None:
    assert cells([PLACE + "english.jsonl"]) == ["/data/projects/customer-suppo…ned/deduplicated/english.jsonl"]
    shown = cells([f"{PLACE}en/{PLACE}a.jsonl", f"{PLACE}de/{PLACE}a.jsonl"])
    assert ["en" in text for text in shown] == [True, False]
    assert all(text.startswith('"/data/') and text.endswith('a.jsonl"') for text in shown)


def test_names_are_all_different() -> None:
    assert unique(["a", "a", "a (2)", "a"]) == ["a", "a (2)", "a (2) (2)", "a (3)"]


def test_the_standard_error_falls_with_the_number_of_seeds() -> None:
    found = Spread((1.0, 2.0, 3.0, 4.0))
    assert found.error == pytest.approx((5 / 3) ** 0.5 / 2)
    assert Spread((0.5,)).error is None
    assert Spread((0.5,)).text(100) == "50"
    assert Spread((0.5, 0.5), runs=3).text(100) == "50 ± 0 (2 of 3)"


# The files of a run ---------------------------------------------------------------------------------------------------


def made(root: Path, name: str, settings: dict[str, Any], accuracy: float | None = 0.5, **files: Any) -> Path:
    """A run folder with a learning curve; without ``accuracy`` it is not done."""
    place = root / name
    (place / ".hydra").mkdir(parents=True)
    (place / ".hydra" / "config.yaml").write_text(yaml.safe_dump(settings))
    if accuracy is not None:
        metrics = {"train/loss": 1.0, "val/accuracy": accuracy, "val/loss": 0.7, "test/accuracy": accuracy + 0.1}
        files = {"metrics": {"metrics": metrics, "objective": accuracy, "steps": 4, "seconds": 2.0}} | files
        (place / "log").mkdir()
        rows = "".join(f"{step},{1 / step},{accuracy if step == 3 else ''}\n" for step in range(1, 4))
        (place / "log" / "metrics.csv").write_text("step,train/loss,val/accuracy\n" + rows)
    for file, content in files.items():
        path = place / f"{file}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return place


class Page(HTMLParser):
    """Tables, texts, tags and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.tags: dict[str, int] = {}
        self.addresses: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        elif "script" not in self.open:
            self.text += data


def report(root: Path, *options: str) -> Page:
    assert report_cli.main([str(root), *options]) == 0
    return Page((root / "report.html").read_text("utf-8"))


def test_methods_are_in_order_with_their_spread_over_seeds(tmp_path: Path) -> None:
    for seed, (lisa, ist) in enumerate([(0.5, 0.7), (0.6, 0.8), (0.7, 0.6)]):
        made(tmp_path, f"lisa{seed}", config(LISA, seed=seed), lisa)
        made(tmp_path, f"ist{seed}", config(IST, seed=seed), ist)
    methods, every = (page := report(tmp_path)).tables
    assert methods[0][:3] == ["method", "test/accuracy", "val/accuracy"]
    assert [row[:2] for row in methods[1:]] == [["ist", "0.8 ± 0.058 (3)"], ["lisa", "0.7 ± 0.058 (3)"]]
    assert methods[0][-1] == "callbacks"
    assert [row[0] for row in every[1:]] == ["ist0", "ist1", "ist2", "lisa0", "lisa1", "lisa2"]
    assert page.tags["img"] == 2  # quality and learning curves
    markdown = (tmp_path / "report.md").read_text("utf-8")
    assert "| ist | 0.8 ± 0.058 (3) |" in markdown
    assert markdown.index("| ist |") < markdown.index("| lisa |")


def test_a_metric_that_is_better_when_smaller_comes_in_that_order(tmp_path: Path) -> None:
    for name, loss in (("a", 2.0), ("b", 1.0)):
        metrics = {"metrics": {"val/loss": loss, "val/accuracy": 0.5}, "objective": 0.5}
        made(tmp_path, name, config(LISA, lr=loss), metrics=metrics)
    assert [row[0] for row in report(tmp_path, "--metric", "val/loss").tables[0][1:]] == ["lr 1", "lr 2"]


def test_a_metric_that_no_run_has_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, "a", config(LISA))
    with pytest.raises(SystemExit):
        report_cli.main([str(tmp_path), "--metric", "val/f1"])
    assert "`--metric val/f1` is in no run; there are test/accuracy, train/loss" in " ".join(
        capsys.readouterr().err.split()
    )


def test_runs_of_different_long_paths_are_two_methods(tmp_path: Path) -> None:
    for at, name in enumerate(("english", "german")):
        made(tmp_path, name, config(LISA, data={"train": f"{PLACE}{name}.jsonl"}), 0.5 + 0.1 * at)
    page = report(tmp_path)
    assert [row[-1][-13:] for row in page.tables[0][1:]] == ["/german.jsonl", "english.jsonl"]
    assert "repeat" not in page.text


def logs(objective: float | None, **values: float | None) -> dict[str, Any]:
    """``metrics.json`` of a run with these metrics of the validation set."""
    return {"metrics": {f"val/{name}": value for name, value in values.items()}, "objective": objective}


def test_a_first_run_that_diverged_does_not_choose_the_metric(tmp_path: Path) -> None:
    results = [
        logs(None, loss=9.0, spearman=None, pearson=None),
        logs(0.5, loss=1.0, spearman=0.4, pearson=0.5),
        logs(0.8, loss=1.5, spearman=0.7, pearson=0.8),
    ]
    for at, metrics in enumerate(results):
        made(tmp_path, str(at), config(LISA, lr=at), metrics=metrics)
    methods = report(tmp_path).tables[0]
    assert methods[0][1] == "val/pearson"
    assert [row[:2] for row in methods[1:]] == [["lr 2", "0.8"], ["lr 1", "0.5"], ["lr 0", "- (0 of 1)"]]


def test_a_first_run_of_zeros_does_not_choose_the_metric(tmp_path: Path) -> None:
    for at, (exact, f1) in enumerate(((0.0, 0.0), (50.0, 60.0))):
        made(tmp_path, str(at), config(LISA, lr=at), metrics=logs(f1, loss=1.0, exact_match=exact, f1=f1))
    assert report(tmp_path).tables[0][0][1] == "val/f1"


def test_the_class_of_the_model_tells_where_values_do_not() -> None:
    def run(target: str) -> Run:
        return Run(Path(), "x", {"model": {"_target_": target}}, logs(0.0, loss=1.0, exact_match=0.0, f1=0.0))

    answering = "apportion.recipes.tasks.answering.QuestionAnswering"
    assert objective([run(answering)]) == "val/f1"
    for other in ("apportion.recipes.tasks.none.None", "this.Import", "apportion.recipes.tasks.module.CausalLM"):
        assert objective([run(other)]) == "val/exact_match"
    assert objective([run("this.Import"), run(answering)]) == "val/f1"
    assert "this" not in sys.modules  # a folder names what it likes


def test_seeds_that_diverged_are_counted_and_named(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.8, None, 0.9)):
        value = {"val/accuracy": accuracy, "test/accuracy": accuracy, "val/loss": 1.0}
        made(tmp_path, f"lisa{seed}", config(LISA, seed=seed), metrics={"metrics": value, "objective": accuracy})
    made(tmp_path, "ist", config(IST), 0.5)
    page = report(tmp_path)
    assert [row[:3] for row in page.tables[0]] == [
        ["method", "test/accuracy", "val/accuracy"],
        ["lisa", "0.85 ± 0.05 (2 of 3)", "0.85 ± 0.05 (2 of 3)"],
        ["ist", "0.6", "0.5"],
    ]
    assert "Runs without a finite test/accuracy, as after a divergence: 1, namely lisa1." in page.text
    every = {row[0]: row[3] for row in page.tables[-1][1:]}
    assert (every["lisa1"], every["lisa2"]) == ("not finite", "0.9")
    assert "0.85 ± 0.05 (2 of 3)" in (tmp_path / "report.md").read_text("utf-8")


def test_a_test_set_that_gives_no_number_at_all_does_not_compare(tmp_path: Path) -> None:
    for name in "ab":
        values = {"val/accuracy": 0.5, "test/accuracy": None}
        made(tmp_path, name, config(LISA, seed=name), metrics={"metrics": values, "objective": 0.5})
    assert Summary(tuple(collect(tmp_path))).quality == "val/accuracy"


def test_nothing_but_divergence_has_a_page_as_well(tmp_path: Path) -> None:
    made(tmp_path, "a", config(LISA), metrics=logs(None, loss=None, accuracy=None))
    assert report(tmp_path).tables[0][1][:2] == ["lisa", "- (0 of 1)"]
    assert report_cli.main([str(tmp_path), "--metric", "val/accuracy"]) == 0


def test_the_page_goes_where_it_is_wanted(tmp_path: Path) -> None:
    made(tmp_path, "a", config(LISA))
    (tmp_path / "there").mkdir()
    for out, page in (("there", "there/report.html"), ("new/", "new/report.html"), ("x.htm", "x.htm"), ("y", "y")):
        assert report_cli.main([str(tmp_path / "a"), "--out", f"{tmp_path}/{out}"]) == 0
        assert (tmp_path / page).read_text("utf-8").startswith("<!")
        assert (tmp_path / page).with_suffix(".md").read_text("utf-8").startswith("# Runs of a")


def test_a_page_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(out: str) -> str:
        with pytest.raises(SystemExit) as left:
            report_cli.main([str(tmp_path / "a"), "--out", f"{tmp_path}/{out}"])
        assert left.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    made(tmp_path, "a", config(LISA))
    (tmp_path / "x.md").mkdir()
    (tmp_path / "file").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(report_cli, "gather", None)  # it is not called
        assert "page.MD` is where the tables go as Markdown: name the page, such as" in refused("page.MD")
        assert "x.md is a folder, and a file must go there" in refused("x.html")
        assert "file is a file, and a folder must be there" in refused("file/new/x.html")
    monkeypatch.setattr(report_cli, "page", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    assert "x.htm` cannot be written: disk full." in refused("sub/x.htm")
    assert (tmp_path / "file").read_text() == "mine"


def test_one_run_alone_has_a_page(tmp_path: Path) -> None:
    place = made(tmp_path, "only", config(None))
    page = report(place, "--title", "Mine")
    assert page.tables[0][1][:2] == ["run", "0.6"]
    assert page.text.count("Mine") == 2  # title and heading


def test_runs_that_are_not_done_are_listed_and_in_no_figure(tmp_path: Path) -> None:
    made(tmp_path, "good", config(LISA, seed=1), 0.5)
    made(tmp_path, "bad", config(LISA, seed=2), None, failure={"error": "OutOfMemoryError: all of it"})
    made(tmp_path, "half", config(IST), None)
    page = report(tmp_path)
    methods, missing, _ = page.tables
    assert [row[:2] for row in methods[1:]] == [["lisa", "0.6"]]
    assert ["bad", "lisa", "failed", "OutOfMemoryError: all of it"] in missing
    assert [row[2] for row in missing[1:]] == ["failed", "unfinished"]
    assert "Runs that are not done: 2." in page.text
    assert "OutOfMemoryError: all of it" in (tmp_path / "report.md").read_text("utf-8")


def test_nothing_but_failures_has_a_page_as_well(tmp_path: Path) -> None:
    made(tmp_path, "bad", config(LISA), None)
    assert report(tmp_path).tables[1][1][2] == "unfinished"


def test_a_run_that_was_repeated_counts_once(tmp_path: Path) -> None:
    for at, (name, accuracy) in enumerate((("old", 0.1), ("new", 0.5))):
        place = made(tmp_path, name, config(LISA, seed=1), accuracy)
        os.utime(place / "metrics.json", (at, at))
    made(tmp_path, "other", config(LISA, seed=2), 0.5)
    page = report(tmp_path)
    assert page.tables[0][1][1] == "0.6 ± 0 (2)"
    assert {row[0] for row in page.tables[-1][1:]} == {"old", "new", "other"}
    assert "Runs that repeat a config and its seeds: 1." in page.text


def test_seeds_of_all_parts_tell_runs_apart() -> None:
    assert seeds(config({"lisa": {"seed": 3}})) == (("seed", "1"), ("callbacks.lisa.seed", "3"))


def test_damaged_files_are_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    place = made(tmp_path, "a", config(LISA))
    (place / "measured.json").write_text("{")
    made(tmp_path, "b", config(LISA, seed=2))
    page = report(tmp_path)
    assert "a: measured.json cannot be read" in page.text
    assert page.tables[0][1][1] == "0.6 ± 0 (2)"


def test_text_of_a_config_stays_text(tmp_path: Path) -> None:
    for seed, name in enumerate((EVIL, "_" + EVIL)):
        history = {"names": [EVIL, "b.1"], "steps": [0], "masks": [[1, 0]]}
        settings = config({EVIL: {"_target_": EVIL}}, seed=seed, method=name, recipe=f"../../{EVIL}")
        place = made(tmp_path, f"run{seed}", settings)
        (place / "history").mkdir()
        (place / "history" / "x.json").write_text(json.dumps(history))
    made(tmp_path, "bad", config(LISA, method="bad"), None, failure={"error": EVIL})
    page = report(tmp_path, "--title", EVIL)
    assert page.tags["script"] == 1
    assert page.text.count(EVIL) >= 2
    assert EVIL in page.tables[1][1][3]  # the reason of the failure
    assert {row[0] for row in page.tables[0][1:]} == {EVIL, "_" + EVIL}
    assert not any(name.startswith("on") for name in page.attributes)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    markdown = (tmp_path / "report.md").read_text("utf-8")
    assert "<script" not in markdown
    assert re.search(r"(?<!\\)\[a\]", markdown) is None
    lines = [line for line in markdown.splitlines() if "alert" in line and line.startswith("|")]
    rows = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    assert set(rows[:2]) == {len(page.tables[0][0]) + 1}


def test_the_page_may_load_nothing_and_its_links_are_web_addresses() -> None:
    assert link("A & B", "javascript:alert(1)") == "A &amp; B"
    assert (
        link("A", 'https://x.org/"><script>')
        == '<a href="https://x.org/&quot;&gt;&lt;script&gt;" rel="noopener noreferrer">A</a>'
    )
    assert marked("a\nb | c") == "a b \\| c"


def test_many_runs_make_a_page_of_bounded_size(tmp_path: Path) -> None:
    masks = {"names": [f"layer.{i}" for i in range(4)], "steps": [0, 2], "masks": [[1, 0, 0, 0], [0, 0, 1, 0]]}
    for at in range(60):
        made(tmp_path, str(at), config(LISA, lr=(at // 2 + 1) / 100, seed=at % 2), at / 90, **{"history/lisa": masks})
    page = report(tmp_path)
    assert len(page.tables[0]) == 31
    assert page.tags["img"] == 2 + 24 // PANELS
    assert "The first 8 of 30 methods" in page.text
    assert (tmp_path / "report.html").stat().st_size < 3e6


def test_memory_time_and_selections_are_shown_where_there_are_any(tmp_path: Path) -> None:
    memory = {"weights": 2**20, "gradients": 2**19, "peak": 3 * 2**19}
    measured = {"timeline": [{"step": 0, **memory}], "memory": memory, "seconds_per_step": 0.25}
    entries = {"names": ["l.0.q.weight"], "steps": [0], "counts": [[3]], "sizes": [12]}
    ranks = {"units": "ranks", "names": ["l.0.q.0", "l.0.q.1"], "steps": [0, 2], "masks": [[1, 1], [0, 1]]}
    layers = {"units": "layers", "names": ["l.0", "l.1"], "steps": [0], "masks": [[0, 1]]}
    files = {"measured": measured, "history/id3": entries, "history/adalora": ranks, "history/lisa": layers}
    made(tmp_path, "a", config(LISA), **files)
    made(tmp_path, "b", config(IST))
    page = report(tmp_path)
    assert page.tables[1][1] == ["lisa", "1.50", "1.00", "0.50", "-", "-", "-", "-", "250.0"]
    assert len(page.tables[1]) == 2
    assert page.tags["img"] == 2 + 2 + 3
    assert page.tags["details"] == 1 + 3 + 1


# What the papers report -----------------------------------------------------------------------------------------------

FILE = {
    "paper": {"title": "T", "venue": "V", "year": 2024, "link": "https://arxiv.org/abs/1"},
    "figures": [
        {
            "experiment": "p/one",
            "metric": "accuracy, mean of two",
            "value": 77.0,
            "unit": "%",
            "table": "Table 2",
            "grade": "paper",
        },
        {"experiment": "p/one", "metric": "accuracy on the moon", "value": 99.0, "unit": "%", "grade": "recalled"},
        {"experiment": "p/one", "metric": "memory", "value": 3, "unit": "GB", "grade": "code", "note": "of a log"},
        {"experiment": "p/two", "metric": "accuracy", "value": 55.0, "unit": "%", "grade": "paper"},
    ],
}


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recipes with one paper."""
    (tmp_path / "recipes" / "p").mkdir(parents=True)
    file = tmp_path / "recipes" / "p" / "reported.json"
    file.write_text(json.dumps(FILE))
    monkeypatch.setattr(reported, "files", lambda package: tmp_path / "recipes")
    return file


def test_a_papers_figure_stands_beside_ours(tmp_path: Path, paper: Path) -> None:
    runs = tmp_path / "runs"
    for seed, accuracy in enumerate((0.6, 0.7)):
        made(runs, str(seed), config(LISA, seed=seed, recipe="p/one"), accuracy)
    page = report(runs)
    rows = page.tables[1][1:]
    assert [row[2:6] for row in rows] == [
        ["77 %", "Table 2", "75 ± 5 (2) %", "test/accuracy"],
        ["3 GB", "of a log", "-", "-"],
    ]
    assert "accuracy on the moon: reported by a secondary source, not shown" in page.text
    assert "99" not in page.text
    assert "https://arxiv.org/abs/1" in page.addresses


def test_a_smoke_run_is_held_to_no_paper(tmp_path: Path, paper: Path) -> None:
    made(tmp_path / "runs", "a", config(LISA, recipe="p/two", smoke=True), 0.6)
    (row,) = report(tmp_path / "runs").tables[1][1:]
    assert row[4] == "smoke run: not comparable"


def test_a_damaged_file_of_a_paper_is_told(tmp_path: Path, paper: Path) -> None:
    paper.write_text('{"paper": {}}')
    made(tmp_path / "runs", "a", config(LISA, recipe="p/two"), 0.6)
    assert "recipes/p/reported.json cannot be read: KeyError" in report(tmp_path / "runs").text


def test_a_recipe_without_a_paper_and_no_recipe_are_no_trouble(tmp_path: Path, paper: Path) -> None:
    lost: list[str] = []
    assert reported.reported(["none/one", "../p/one", "", "p"], lost) == []
    assert [figure.value for figure in reported.reported(["p/one"], lost)] == [77.0, 99.0, 3.0]
    assert lost == []


# Pieces ---------------------------------------------------------------------------------------------------------------


def test_a_row_has_a_cell_for_every_heading() -> None:
    with pytest.raises(ValueError, match="`Table` has 2 headings and a row of 1 cells"):
        Table(("a", "b"), ((("x", "x"),),))


def test_the_objective_is_the_validated_metric_of_that_value() -> None:
    results = {"metrics": {"test/a": 0.5, "val/b": 0.5, "val/c": 0.4}, "objective": 0.5}
    run = Run(Path(), "x", results=results)
    assert objective([run]) == "val/b"
    assert objective([Run(Path(), "x", config={"objective": "val/c"}, results=results)]) == "val/c"
    assert objective([Run(Path(), "x", config={"objective": "val/d"}, results=results)]) == "val/b"
    assert objective([Run(Path(), "x", results={"metrics": {"train/a": 1.0, "val/b": 0.5}})]) == "val/b"


def test_the_band_reaches_from_the_lowest_to_the_highest_seed() -> None:
    steps, mean, low, high = report_curves.band([[(0, 1.0), (4, 5.0)], [(2, 2.0), (4, 3.0)]])
    assert steps.tolist() == [0, 2, 4]
    assert mean.tolist() == [1.0, 2.5, 4.0]
    assert low.tolist() == [1.0, 2.0, 3.0]
    assert high.tolist() == [1.0, 3.0, 5.0]


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    steps, mean, _, _ = report_curves.band([[(step, float(step)) for step in range(10_000)]])
    assert len(steps) == 500
    assert (steps[0], steps[-1]) == (0, 9999)
    assert np.array_equal(steps, mean)


def test_every_group_has_its_colour_in_the_picture(tmp_path: Path) -> None:
    curves = {f"group {i}": [[(0, i), (5, i + 1.0)], [(0, i), (5, i + 2.0)]] for i in range(4)}
    image = imread(
        report_curves.learning({"train/loss": curves, "val/loss": {"group 0": [[(5, 1.0)]]}}, tmp_path / "c.png")
    )

    def ink(colour: str) -> int:
        wanted = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        return int((np.abs(image[..., :3] - wanted).max(-1) < 0.02).sum())

    assert all(ink(colour) > 100 for colour in report_curves.COLOURS[:4])
    assert ink(report_curves.COLOURS[5]) == 0


def test_folders_are_read_once(tmp_path: Path) -> None:
    made(tmp_path, "a", config(LISA))
    assert len(report_cli.gather([tmp_path, tmp_path / "a"])) == 1
    assert Summary(tuple(collect(tmp_path))).quality == "test/accuracy"
