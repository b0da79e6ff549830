"""Rows of local files: every public format, places of bad rows, splits, and what the tasks make of a row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from apportion.recipes.tasks import packing, source
from apportion.recipes.tasks.columns import BadRow, label, number, text
from apportion.recipes.tasks.formats import Row, read
from apportion.recipes.tasks.images import ImageData
from apportion.recipes.tasks.instructions import InstructionData
from apportion.recipes.tasks.pairs import Seq2SeqData
from apportion.recipes.tasks.source import Source
from apportion.recipes.tasks.spans import QuestionAnsweringData, place
from apportion.recipes.tasks.text import CausalTextData, TextClassificationData
from apportion.recipes.tasks.tokens import byte_tokenizer

ROWS = [{"text": 'a "b" c', "label": "0"}, {"text": "d\u2028e", "label": "1"}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


FILES: dict[str, Callable[[Path], Path]] = {
    "jsonl": lambda f: write(f / "a.jsonl", "\n".join(json.dumps(row) for row in ROWS) + "\n"),
    "raw jsonl": lambda f: write(f / "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
    "json": lambda f: write(f / "a.json", json.dumps(ROWS, indent=1)),
    "lines in json": lambda f: write(f / "a.json", "\n".join(json.dumps(row) for row in ROWS)),
    "tsv": lambda f: write(f / "a.tsv", "text\tlabel\n" + "\n".join("\t".join(row.values()) for row in ROWS) + "\n"),
    "bom and crlf": lambda f: write(
        f / "a.txt", "\ufefftext\tlabel\r\n" + "\r\n".join("\t".join(row.values()) for row in ROWS) + "\r\n"
    ),
    "csv": lambda f: write(f / "a.csv", 'text,label\n"a ""b"" c",0\nd\u2028e,1\n'),
    "parquet": lambda f: (
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), f / "a.parquet"),
        f / "a.parquet",
    )[1],
}


@pytest.mark.parametrize("kind", FILES)
def test_every_format_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    assert [(dict(row.values), row.problem) for row in read(FILES[kind](tmp_path))] == [(row, "") for row in ROWS]


def test_a_table_without_a_header_is_told_its_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "one,2.5\n")
    assert read(path, ["text", "score"]) == [Row("line 1", {"text": "one", "score": "2.5"})]
    with pytest.raises(ValueError, match=r"`data.columns=\['text'\]` is for tables"):
        read(FILES["jsonl"](tmp_path), ["text"])


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.tsv", b"text\tlabel\nx\t1\n\ny\nz\t2\n", {"line 4": "has 1 field where there are 2 columns"}),
        ("a.csv", b'text,label\n"x\ny",1\nz\n', {"line 4": "has 1 field where there are 2 columns"}),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n["x"]\n', {"line 2": "is no JSON", "line 3": "holds a list, not an"}),
        ("a.json", b'[\n {"text": "x"},\n\n "y"\n]', {"line 4": "holds a str, not an object"}),
        ("a.tsv", b"text\tlabel\nx\t1\n\xff\xfe\t1\n", {"line 3": "holds bytes that are not UTF-8"}),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', {"line 2": "holds bytes that are not UTF-8"}),
    ],
)
def test_what_cannot_be_read_has_its_line(name: str, content: bytes, places: dict[str, str], tmp_path: Path) -> None:
    found = {row.place: row.problem for row in read(write(tmp_path / name, content)) if row.problem}
    assert found.keys() == places.keys()
    assert all(problem in found[line] for line, problem in places.items())


def test_a_file_that_is_not_json_or_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.json, line 2: is no JSON"):
        read(write(tmp_path / "a.json", '[{"a": 1},\n {"a" 2}]'))
    with pytest.raises(ValueError, match="an array of objects"):
        read(write(tmp_path / "b.json", '{"a": [1]}'))
    with pytest.raises(ValueError, match=r"must end in .jsonl, .json"):
        read(write(tmp_path / "a.xml", "<a/>"))


def test_named_objects_and_squad_become_rows(tmp_path: Path) -> None:
    named = read(write(tmp_path / "a.json", '{"17": {"q": "x"}, "18": {"q": "y"}}'))
    assert [(row.place, row.values) for row in named][1] == ("entry '18'", {"id": "18", "q": "y"})
    asked = {"id": "7", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 3}]}
    nested = {"data": [{"paragraphs": [{"context": "By Ada.", "qas": [asked, {"id": "8", "question": "Why?"}]}]}]}
    rows = read(write(tmp_path / "b.json", json.dumps(nested)))
    assert rows[0].values["answers"] == {"text": ["Ada"], "answer_start": [3]}
    assert rows[1].values["answers"] == {"text": [], "answer_start": []}
    assert rows[1].values["context"] == "By Ada."


def test_a_split_of_a_local_folder_is_found_with_and_without_its_ending(tmp_path: Path) -> None:
    FILES["jsonl"](tmp_path).rename(tmp_path / "train.jsonl")
    for i, row in enumerate(ROWS):
        write(tmp_path / f"test-0000{i}.jsonl", json.dumps(row))
    (tmp_path / "main").mkdir()
    write(tmp_path / "main" / "val.tsv", "text\tlabel\nmain\t1\n")
    rows = Source("train.jsonl", "val", "test", path=str(tmp_path), name="main").read()
    assert [len(rows[split]) for split in source.SPLITS] == [2, 1, 2]
    assert rows["test"][1].place == "test-00001.jsonl, line 1"
    one = Source("whatever", "val", path=str(tmp_path / "train.jsonl"), name="main").read()
    assert (len(one["train"]), len(one["val"])) == (2, 1)
    write(tmp_path / "train.tsv", "text\tlabel\n")
    with pytest.raises(ValueError, match=r"may be train\.jsonl or train\.tsv"):
        Source("train", "val", path=str(tmp_path), name="main").read()
    with pytest.raises(FileNotFoundError, match=r"no such file in .* which holds .*train\.jsonl"):
        Source("train.jsonl", "dev", path=str(tmp_path)).read()
    with pytest.raises(FileNotFoundError, match="there is no folder or file"):
        Source("train", path="/no/such/folder").read()


def test_the_hub_is_asked_for_what_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, name: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, name, split))
        return [{"text": split}]

    monkeypatch.setattr("datasets.load_dataset", load)
    rows = Source("train[:1%]", "validation", path="nyu-mll/glue", name="rte").read()
    assert asked == [("nyu-mll/glue", "rte", "train[:1%]"), ("nyu-mll/glue", "rte", "validation")]
    assert rows["val"] == [Row("row 1", {"text": "validation"})]


def test_a_data_set_that_cannot_be_fetched_says_how_to_do_without(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the split 'train' could not be loaded from the hub .*data\.path=/data"):
        Source("train", "validation", path="nobody/nothing").read()


def test_rows_are_held_out_by_a_seed_of_their_own() -> None:
    rows = [{"i": i} for i in range(20)]

    def taken(**options: Any) -> tuple[list[int], list[int]]:
        found = Source(rows, **options).read()
        return [r.values["i"] for r in found["train"]], [r.values["i"] for r in found["val"]]

    train, val = taken(holdout=5)
    assert len(val) == 5
    assert sorted(train + val) == list(range(20))
    assert (train, val) == (sorted(train), sorted(val))
    assert taken(holdout=0.25) == (train, val)
    assert taken(holdout=5, split_seed=1)[1] != val
    fewer, _ = taken(holdout=5, limit={"train": 4})
    assert len(fewer) == 4
    assert set(fewer) < set(train)
    with pytest.raises(ValueError, match=r"`data.val=null data.holdout=0` leaves 20 rows to train on and 0"):
        taken()
    with pytest.raises(ValueError, match="leaves 0 rows to train on and 20"):
        taken(holdout=20)
    for wrong in ({"holdout": 1.5}, {"holdout": -1}, {"limit": {"train": 0}}, {"limit": {"dev": 3}}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Source(rows, **wrong)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, r"no column 'text'; it has \[\]"),
        ({"text": 3}, r"holds 3 \(int\) in column 'text', not text"),
        ({"text": "  "}, "is empty in column 'text'"),
        ({"text": "\udcff"}, "not UTF-8"),
    ],
)
def test_a_text_is_text(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRow, match=problem):
        text(Row("line 1", values), "text")
    assert text(Row("line 1", {}), "text", empty=True) == ""


@pytest.mark.parametrize(
    ("found", "labels", "classes", "expected"),
    [
        ("1", None, None, 1),
        (1, None, 2, 1),
        ("no", ["yes", "no"], None, 1),
        (1, ["yes", "no"], None, 1),
        ("maybe", ["yes", "no"], None, "not one of yes, no"),
        ("no", None, 2, r"not an integer; give the names as `data.labels"),
        (2, None, 2, r"label 2 .* must lie in \[0, 1\]"),
        (-1, None, None, "label -1 .* must be at least 0"),
        (True, None, None, "not an integer"),
        (1.0, None, None, "not an integer"),
        (None, None, None, "not an integer"),
    ],
)
def test_a_label_is_a_class(found: Any, labels: list[str] | None, classes: int | None, expected: int | str) -> None:
    row = Row("line 1", {"label": found})
    if isinstance(expected, int):
        assert label(row, "label", labels, classes) == expected
    else:
        with pytest.raises(BadRow, match=expected):
            label(row, "label", labels, classes)


@pytest.mark.parametrize("found", ["", "x", None, True, "nan", float("inf")])
def test_a_number_is_finite(found: Any) -> None:
    assert number(Row("line 1", {"score": "3.5"}), "score") == 3.5
    with pytest.raises(BadRow, match="not a finite number"):
        number(Row("line 1", {"score": found}), "score")


def labelled(path: Path, bad: int, good: int = 5) -> str:
    lines = ["text\tlabel", *["fine\t1"] * good, *["fine\tseven"] * bad]
    return str(write(path, "\n".join(lines)))


def test_all_bad_rows_are_counted_and_the_first_few_shown(tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.tsv", bad=7)
    with pytest.raises(ValueError, match="7 of 12 rows are bad") as caught:
        TextClassificationData(path, path).setup("fit")
    lines = str(caught.value).splitlines()
    assert [line.split()[1] for line in lines[1:6]] == ["7", "8", "9", "10", "11"]
    assert lines[1].startswith("  line 7 holds 'seven' (str) in column 'label'")
    assert lines[6] == "  ... and 2 more"
    assert "`data.bad_rows=7`" in lines[7]
    assert str(tmp_path / "a.tsv") in lines[0]


def test_bad_rows_are_left_out_if_so_many_may_be(tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.tsv", bad=2)
    with pytest.raises(ValueError, match="2 of 7 rows are bad"):
        TextClassificationData(path, path, bad_rows=1).setup("fit")
    data = TextClassificationData(path, path, bad_rows=2)
    with pytest.warns(UserWarning, match=r"2 of 7 rows are bad[\s\S]*They are left out"):
        data.setup("fit")
    assert (len(data.train), len(data.val)) == (5, 5)
    none = labelled(tmp_path / "b.tsv", bad=2, good=0)
    with pytest.raises(ValueError, match="None is left: name other columns"):
        TextClassificationData(none, none, bad_rows=2).setup("fit")
    empty = str(write(tmp_path / "c.tsv", "text\tlabel\n"))
    with pytest.raises(ValueError, match="none of 0 rows gives a sample"):
        TextClassificationData(empty, path, bad_rows=2).setup("fit")


def test_labels_that_yaml_has_changed_are_refused() -> None:
    with pytest.raises(ValueError, match=r"holds True, which is no text: quote it"):
        TextClassificationData([], labels=[True, False])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="names 2 classes, but the model has 3"):
        TextClassificationData([], labels=["a", "b"], classes=3)


def test_files_are_read_once_for_all_stages(tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.tsv", bad=0)
    data = TextClassificationData(path, path)
    data.setup("fit")
    before = data.train
    data.setup("test")
    assert data.train is before


def test_pairs_and_numbers_for_regression() -> None:
    rows = [{"a": "x", "b": "yz", "score": "2.5"}]
    data = TextClassificationData(rows, rows, text="a", pair="b", label="score", regression=True)
    data.setup("fit")
    (sample,) = data.train
    assert sample["input_ids"].tolist() == [123, 1, 124, 125, 1]
    assert sample["labels"].dtype == torch.float32
    assert sample["labels"].item() == 2.5


def test_buckets_sort_evaluation_and_training_batches_by_length() -> None:
    rows = [{"text": "x" * (1 + 7 * i % 16), "label": 0} for i in range(64)]
    plain, bucketed = (TextClassificationData(rows, rows, batch_size=4, bucket=b) for b in (False, True))
    padded = []
    for data in (plain, bucketed):
        data.setup("fit")
        for loader in (data.train_dataloader(), data.val_dataloader()):
            batches = list(loader)
            assert sum(len(batch["labels"]) for batch in batches) == 64
            padded.append(sum(int((batch["attention_mask"] == 0).sum()) for batch in batches))
    assert padded[0] > 0
    assert padded[1] > 0
    assert padded[2] == padded[3] == 0  # 16 lengths, four texts of each


def test_the_first_batches_of_a_bucketed_evaluation_are_not_the_shortest() -> None:
    rows = [{"text": "x" * (1 + 7 * i % 61), "label": 0} for i in range(63)]
    data = TextClassificationData(rows, rows, batch_size=4, bucket=True)
    data.setup("fit")
    batches = list(data.val_dataloader())
    widths = [batch["input_ids"].shape[1] for batch in batches]
    assert widths != sorted(widths)
    assert [len(batch["labels"]) for batch in batches] == [4] * 15 + [3]
    lengths = sorted(length for batch in batches for length in batch["attention_mask"].sum(1).tolist())
    assert lengths == sorted(len(row["text"]) + 1 for row in rows)
    assert all(int((batch["attention_mask"] == 0).sum()) <= 4 * 4 for batch in batches)
    assert widths == [batch["input_ids"].shape[1] for batch in data.val_dataloader()]


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_that_is_named_must_have_rows(split: str, tmp_path: Path) -> None:
    full, empty = write(tmp_path / "a.tsv", "text\tlabel\na\t0\n"), write(tmp_path / "b.tsv", "text\tlabel\n")
    files = {"val": str(full), "test": None} | {split: str(empty)}
    with pytest.raises(ValueError, match=r"b\.tsv: none of 0 rows"):
        TextClassificationData(str(full), **files).setup("fit")


def instructions(rows: list[dict[str, str]], **options: Any) -> InstructionData:
    settings = {"prompt": "{instruction}|{input}=", "prompt_alone": "{instruction}=", "length": 64} | options
    data = InstructionData(rows, rows, **settings)
    data.setup("fit")
    return data


def said(tokens: torch.Tensor) -> str:
    return byte_tokenizer().decode(tokens[tokens >= 0])


def test_only_the_answer_and_the_end_of_the_text_are_learned() -> None:
    rows = [
        {"instruction": "add", "input": "2, 3", "output": "5 {x}"},
        {"instruction": "say {hi}", "input": "", "output": "hi"},
        {"instruction": "stop", "output": "ok"},
    ]
    data = instructions(rows)
    assert [said(sample["input_ids"]) for sample in data.train] == [
        "add|2, 3=5 {x}</s>",
        "say {hi}=hi</s>",
        "stop=ok</s>",
    ]
    assert [said(sample["labels"]) for sample in data.train] == ["5 {x}</s>", "hi</s>", "ok</s>"]
    assert [data.tokens(sample) for sample in data.train] == [6, 3, 3]
    assert [(s["prompt"], s["reference"]) for s in data.val] == [(9, "5 {x}"), (9, "hi"), (5, "ok")]
    assert "prompt" not in data.train[0]
    whole = instructions(rows, mask_prompt=False)
    assert said(whole.train[0]["labels"]) == "add|2, 3=5 {x}</s>"


def test_what_does_not_fit_is_counted() -> None:
    rows = [{"instruction": "a", "output": "b" * n} for n in (3, 8, 9)] + [{"instruction": "c" * 9, "output": "d"}]
    cut, left = "2 of 4 answers are cut at `data.length=10`", "1 of 4 prompts leave no room for an answer and are left"
    with pytest.warns(UserWarning, match=cut), pytest.warns(UserWarning, match=left):
        data = instructions(rows, length=10)
    assert [len(sample["input_ids"]) for sample in data.train] == [6, 10, 10]


@pytest.mark.parametrize("prompt", ["no name", "{instruction}{output}", "{instruction}{}"])
def test_a_prompt_names_what_there_is(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"must name \{instruction\}"):
        InstructionData([], prompt=prompt)


def test_packed_rows_hold_every_token_once_and_no_row_is_too_long() -> None:
    rows = [{"instruction": "q" * (1 + i % 5), "output": "a" * (1 + i % 7)} for i in range(40)]
    plain, packed = instructions(rows, length=24), instructions(rows, length=24, packing=True)
    assert len(packed.train) < len(plain.train) / 1.5
    assert max(len(sample["input_ids"]) for sample in packed.train) <= 24
    for key in ("input_ids", "labels"):
        tokens = [torch.cat([sample[key] for sample in data.train]).sort().values for data in (plain, packed)]
        assert torch.equal(*tokens)
    assert sum(map(packed.tokens, packed.train)) == sum(map(plain.tokens, plain.train))
    assert len(packed.val) == len(plain.val)
    starts = sum(int((sample["position_ids"] == 0).sum()) for sample in packed.train)
    assert starts == len(plain.train)
    batch = packed.collate(packed.train[:3])
    assert "attention_mask" not in batch  # with one, transformers would not look at the positions


def test_rows_are_filled_the_longest_first() -> None:
    assert packing.pack([], 8) == []
    assert packing.pack([8, 8], 8) == [[0], [1]]
    assert packing.pack([4, 5, 4, 3, 1], 8) == [[0, 2], [1, 3], [4]]
    rows = packing.pack([3] * 10, 9)
    assert [len(row) for row in rows] == [3, 3, 3, 1]


def test_source_and_target_are_cut_each_at_its_own_length() -> None:
    rows = [{"source": "abcdef", "target": "xyz"}]
    data = Seq2SeqData(rows, rows, prefix="to: ", length=8, target_length=3)
    data.setup("fit")
    (sample,) = data.train
    assert said(sample["input_ids"]) == "to: abc</s>"
    assert said(sample["labels"]) == "xy</s>"
    assert data.tokens(sample) == 3
    assert data.val[0]["reference"] == "xyz"
    batch = data.collate([sample, {**sample, "labels": sample["labels"][:1]}])
    assert batch["labels"][1].tolist() == [int(sample["labels"][0]), -100, -100]


CONTEXT = "Ada met Bob. Then Bob met Cy."


def asked(answer: str | None, at: int = 0, question: str = "Who?") -> dict[str, Any]:
    places = {"text": [answer], "answer_start": [at]} if answer is not None else {"text": [], "answer_start": []}
    return {"question": question, "context": CONTEXT, "answers": places}


def test_windows_overlap_and_the_answer_is_marked_where_it_lies_whole() -> None:
    data = QuestionAnsweringData([asked("Cy", 26)], [asked("Cy", 26)], length=20, stride=4)
    data.setup("fit")
    spans = [said(s["input_ids"][int(s["start_positions"]) : int(s["end_positions"]) + 1]) for s in data.train]
    assert len(spans) == 3
    assert spans[-1] == "Cy"
    assert all(int(s["start_positions"]) == int(s["end_positions"]) == 0 for s in data.train[:-1])
    (question,) = data.val
    assert len(question["windows"]) == 3
    assert question["reference"] == ["Cy"]
    batch = data.collate(data.val)
    assert batch["input_ids"].shape == (3, 20)
    assert batch["counts"] == [3]


def test_a_question_without_an_answer_is_marked_on_the_null_token() -> None:
    data = QuestionAnsweringData([asked(None)], [asked(None)], length=64, stride=4)
    data.setup("fit")
    assert [(int(s["start_positions"]), int(s["end_positions"])) for s in data.train] == [(0, 0)]
    assert data.val[0]["reference"] == [""]


def test_an_answer_that_stands_elsewhere_is_a_bad_row() -> None:
    rows = [asked("Ada", 0), asked("Bob", 9), asked("Ada", 0, question="Who" * 30)]
    with pytest.raises(ValueError, match="2 of 3 rows are bad") as caught:
        QuestionAnsweringData(rows, rows, length=64, stride=16).setup("fit")
    assert "has the answer 'Bob' in column 'answers', which does not stand at 9" in str(caught.value)
    assert "has a question that leaves -28 of `data.length=64` tokens" in str(caught.value)
    with pytest.raises(ValueError, match="must lie in"):
        QuestionAnsweringData(rows, length=64, stride=64)


def test_an_answer_between_two_tokens_takes_the_tokens_that_it_touches() -> None:
    assert place([(0, 4), (4, 9)], (2, 6)) == (0, 1)
    assert place([(0, 4), (4, 9)], (5, 9)) == (1, 1)
    assert place([None, (4, 9)], (2, 6)) is None
    assert place([(0, 4), None], (2, 6)) is None


def picture(path: Path, grey: int, size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, 0, 255)).save(path)


def test_images_come_from_folders_named_after_their_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name, grey in (("dog", 0), ("cat", 255)):
            picture(tmp_path / split / name / "1.png", grey)
    data = ImageData("train", "val", path=str(tmp_path), size=8, mean=[0.5, 0, 0], std=[0.5, 1, 1], classes=2)
    data.setup("fit")
    assert data.labels == ["cat", "dog"]
    cat = data.train[0]
    assert cat["labels"].item() == 0
    assert cat["pixel_values"].shape == (3, 8, 8)
    assert [channel.unique().tolist() for channel in cat["pixel_values"]] == [[1.0], [0.0], [1.0]]
    assert data.train[1]["pixel_values"][0].unique().tolist() == [-1.0]
    batch = next(iter(data.train_dataloader()))
    assert batch["pixel_values"].dtype == torch.float32


def test_images_come_as_numbers_bytes_and_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 255)
    encoded = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    rows = [{"image": image, "label": 0} for image in ([[255, 0], [0, 255]], encoded, Image.new("L", (2, 2), 255))]
    data = ImageData(rows, rows, size=2, channels=1, mean=[0.0], std=[1.0])
    data.setup("fit")
    pixels = [sample["pixel_values"] for sample in data.train]
    assert pixels[0].tolist() == [[[1.0, 0.0], [0.0, 1.0]]]
    assert pixels[1].shape == (1, 2, 2)
    assert np.all(pixels[2].numpy() == 1.0)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "cat" / "1.png", 0)
    write(tmp_path / "train" / "cat" / "2.png", b"no image")
    whole = (tmp_path / "train" / "cat" / "1.png").read_bytes()
    write(tmp_path / "train" / "cat" / "3.png", whole[:45] + bytes([whole[45] ^ 255]) + whole[46:])
    with pytest.raises(ValueError, match=r"2 of 3 rows are bad.\s+cat/2.png holds no image[^\n]+\s+cat/3.png holds no"):
        ImageData("train", "train", path=str(tmp_path), size=8).setup("fit")
    with pytest.raises(FileNotFoundError):
        ImageData("none", "train", path=str(tmp_path), size=8).setup("fit")
    for wrong in ({"size": 0}, {"channels": 2}, {"mean": [0.5]}, {"std": [1.0, 1.0, 0.0]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ImageData([], **wrong)


def test_running_text_may_be_a_column_of_any_file(tmp_path: Path) -> None:
    rows = [{"text": "abc"}, {"text": "defg"}]
    data = CausalTextData(rows, rows, length=3)
    data.setup("fit")
    assert "".join(said(sample["input_ids"]) for sample in data.train) == "abc</s>defg</s>"
    assert [data.tokens(sample) for sample in data.train] == [2, 2, 2]
