"""The decoder's grid: what it is pre-trained on, what its loss is taken on, and what forgetting is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from apportion.recipes.evidence import cli as evidence
from apportion.recipes.evidence.adapters import RANK
from apportion.recipes.evidence.cells import Cell, Records
from apportion.recipes.evidence.decoder import TASKS, DecoderGrid, batch, descriptions, instructions, load, rows
from apportion.recipes.evidence.pretrain import BLOCK, END, HELD_OUT, PROSE, blocks, byte_pairs, held_out, pretrain
from apportion.recipes.evidence.run import measure
from apportion.recipes.evidence.sources import SOURCES
from apportion.recipes.evidence.tables import LAYOUTS

TINY = {"vocab_size": 300, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
MATRICES = 3 * (4 * (24 + 24) + 3 * (24 + 48))
"""Sum of m + n over the matrices of the layers."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Running text and descriptions in the form of the public files."""
    folder = tmp_path_factory.mktemp("data")
    for file in (*PROSE, HELD_OUT, TASKS["e2e"].train):
        (folder / file).parent.mkdir(exist_ok=True)
    line = "the king of the river went to the city and saw the moon over the war\n"
    (folder / PROSE[0]).write_text(line * 60)
    (folder / PROSE[1]).write_text(line.upper() * 20)
    (folder / PROSE[2]).write_text(json.dumps({"1": {"CONTEXTS": [line.strip()] * 30}}))
    (folder / HELD_OUT).write_text(line[::-1].strip() * 60)
    meanings = [f"name[The {name}], food[{food}]" for name in ("Mill", "Eagle", "Vaults") for food in ("fish", "pie")]
    told = [f'"{meaning}",{text}' for meaning in meanings for text in ("A good place .", "Go there .")]
    (folder / TASKS["e2e"].train).write_text("mr,ref\n" + "\n".join(told))
    (folder / TASKS["e2e"].test).write_text("MR,ref\n".lower() + "\n".join(told[-2:]))
    return folder


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pre-trained model."""
    return pretrain(data, tmp_path_factory.mktemp("cache") / "decoder", steps=12, size=4, config=TINY)


class TestPretraining:
    def test_it_learns_and_says_what_it_saw(self, data: Path, model: Path) -> None:
        told = json.loads((model / "pretrain.json").read_text())
        tokenizer = load(model)
        assert told["steps"] == 12
        assert told["tokens"] == 12 * 4 * BLOCK
        seen = blocks((data / PROSE[0]).read_text(), tokenizer)[:4]
        net = LlamaForCausalLM.from_pretrained(model)
        with torch.no_grad():
            loss = net(input_ids=seen, labels=seen).loss
        assert loss < 0.9 * torch.tensor(300.0).log()  # of a model that knows nothing
        assert list(model.parent.iterdir()) == [model]  # nothing half-made is left

    def test_the_held_out_text_is_not_trained_on(self, data: Path, tmp_path: Path) -> None:
        other = tmp_path / "data"
        for file in (*PROSE, HELD_OUT):
            (other / file).parent.mkdir(parents=True, exist_ok=True)
            (other / file).write_text((data / file).read_text())
        (other / HELD_OUT).write_text("something else altogether " * 60)
        one, two = (
            pretrain(where, tmp_path / name, steps=2, size=2, config=TINY)
            for where, name in ((data, "a"), (other, "b"))
        )
        assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
        assert (one / "tokenizer.json").read_text() == (two / "tokenizer.json").read_text()
        assert json.loads((one / "pretrain.json").read_text()) != json.loads((two / "pretrain.json").read_text())

    def test_blocks_are_spread_over_the_text(self) -> None:
        tokenizer = byte_pairs(["abc " * 50], 257)
        text = "".join(chr(97 + i) * BLOCK for i in range(8))
        found = blocks(text, tokenizer, 4)
        assert found.shape == (4, BLOCK)
        assert tokenizer.decode(found[:, 0].tolist()) == "aceg"
        assert blocks(text + "rest", tokenizer).shape == (8, BLOCK)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"wikitext2/test\.txt"):
            pretrain(tmp_path, tmp_path / "model", steps=1)


class TestRows:
    def test_no_prompt_is_in_two_splits(self, data: Path, model: Path) -> None:
        found = rows(TASKS["e2e"], data, model)
        prompts = {name: {tokens[:n] for tokens, n in some} for name, some in found.items()}
        assert [len(prompts[name]) for name in ("train", "dev", "test")] == [4, 1, 1]
        assert len(set.union(*prompts.values())) == 6
        assert len(found["train"]) == 8  # every description of a meaning that is trained on

    def test_the_loss_is_taken_on_answers(self, data: Path, model: Path) -> None:
        tokenizer = load(model)
        (tokens, n), *_ = rows(TASKS["e2e"], data, model)["test"]
        assert tokenizer.decode(list(tokens[:n])).endswith("\n=>")
        assert tokens[-1] == tokenizer.token_to_id(END)
        made = batch([(tokens, n), (tokens[: n + 2], n)])
        assert made["input_ids"].shape == (2, len(tokens))
        kept = made["labels"] != -100
        assert kept.sum(1).tolist() == [len(tokens) - n, 2]
        assert made["labels"][0][kept[0]].tolist() == list(tokens[n:])

    def test_the_public_form_is_read(self, data: Path) -> None:
        first = descriptions(data / TASKS["e2e"].train)[0]
        assert first == ("name[The Mill], food[fish]\n=>", " A good place .")

    def test_instructions_are_read_in_both_forms(self, tmp_path: Path) -> None:
        one, two = {"input": "", "output": "Fish."}, {"input": "a river", "output": "Water."}
        (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "Name it.", **some} for some in (one, two)]))
        people = {"instruction": "Name it.", "instances": [one, two]}
        (tmp_path / "people.jsonl").write_text(json.dumps(people) + "\n\n" + json.dumps(people))
        expected = [
            ("Instruction: Name it.\nAnswer:", " Fish."),
            ("Instruction: Name it.\nInput: a river\nAnswer:", " Water."),
        ]
        assert instructions(tmp_path / "alpaca.json") == expected
        assert instructions(tmp_path / "people.jsonl") == expected * 2

    def test_every_task_has_a_source_and_a_title(self, model: Path, tmp_path: Path) -> None:
        assert {key: task.title for key, task in TASKS.items()} == LAYOUTS["decoder"].tasks
        for task in TASKS.values():
            assert {file.partition("/")[0] for file in (task.train, task.test)} <= set(SOURCES)
        with pytest.raises(FileNotFoundError, match=r"self_instruct/user.* in human_eval of github\.com/yizhongw"):
            rows(TASKS["instructions"], tmp_path, model)


@pytest.fixture(scope="module")
def out(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells of the model as it is, of full tuning and of methods of every unit."""
    folder = tmp_path_factory.mktemp("out")
    options = ["--data", str(data), "--model", str(model), "--out", str(folder), "--steps", "2", "--seeds", "1"]
    methods = ["base", "full", "lift", "lisa", "ist", "adalora"]
    evidence.main(["run", "--grid", "decoder", "--tasks", "e2e", *options, "--methods", *methods])
    return folder


class TestCells:
    def test_the_model_as_it_is_forgets_nothing(self, out: Path, data: Path, model: Path) -> None:
        record = Records(out).get(Cell("decoder", "e2e", "base", 1, 0.0))
        assert record is not None
        assert record["error"] is None
        assert record["steps"] == 0
        told = json.loads((model / "pretrain.json").read_text())["held_out"]
        assert record["metrics"]["held_out/loss"] == pytest.approx(told["val/loss"], abs=1e-6)
        assert set(record["metrics"]) == {"test/loss", "test/perplexity", "held_out/loss", "held_out/perplexity"}

    def test_every_kind_of_unit_trains(self, out: Path, model: Path) -> None:
        records = {
            r["cell"]["method"]: r for p in (out / "decoder" / "e2e").iterdir() if (r := json.loads(p.read_text()))
        }
        assert {name: r["error"] for name, r in records.items() if r["error"]} == {}
        trained = {name: r["trained"] for name, r in records.items()}
        everything = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(model).parameters())
        assert trained["full"]["step_mean"] == everything
        assert trained["lift"]["step_mean"] == RANK * MATRICES
        assert trained["base"]["moved"] == 0
        assert {t["head"] for t in trained.values()} == {0}
        assert 0 < trained["ist"]["step_mean"] < RANK * MATRICES

    def test_ranks_that_wait_do_not_count_as_moved(self, data: Path, model: Path) -> None:
        told = measure(Cell("decoder", "e2e", "increlora", 1, 1e-3), DecoderGrid(data, model, steps=10))["trained"]
        room = 2 * RANK * (MATRICES + 3 * 7)  # of a matrix (m, n), m + n + 1 for each of twice as many ranks
        assert 0.4 * room < told["step_last"] < 0.6 * room
        assert 0.9 * told["step_last"] < told["moved"] <= 1.1 * told["step_last"]

    def test_the_search_sees_the_dev_rows_alone(self, out: Path) -> None:
        for path in (out / "decoder" / "e2e").iterdir():
            record = json.loads(path.read_text())
            splits = {name.partition("/")[0] for name in record["metrics"]}
            assert splits == ({"dev"} if record["cell"]["seed"] == 0 else {"test", "held_out"})
            if record["cell"]["seed"] == 0:
                assert record["dev_score"] == -record["metrics"]["dev/loss"]


def test_held_out_batches_hold_whole_blocks(data: Path, model: Path) -> None:
    found = held_out(data, load(model), most=3, size=2)
    assert [tuple(one["input_ids"].shape) for one in found] == [(2, BLOCK), (1, BLOCK)]
    assert DecoderGrid(data, model).facts("e2e")["rows"] == {"train": 8, "dev": 1, "test": 2}
