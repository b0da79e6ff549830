"""Rows that are damaged or oddly written: each is read as it is meant, or named with its place."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from apportion.recipes.tasks.columns import BadRow, label
from apportion.recipes.tasks.formats import Row, read
from apportion.recipes.tasks.images import ImageData
from apportion.recipes.tasks.spans import QuestionAnsweringData
from apportion.recipes.tasks.text import TextClassificationData


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("more", ['[{"a": 2}]', "xxx", '{"a": 2}', "]", ","])
def test_nothing_but_blanks_follows_an_array(more: str, tmp_path: Path) -> None:
    path = write(tmp_path / "c.json", f'[{{"a": 0}},\n {{"a": 1}}]\n\n{more}')
    with pytest.raises(ValueError, match=r"c\.json, line 4: is no JSON: More follows after the end of the array"):
        read(path)
    assert len(read(write(path, '[{"a": 0}]\r\n \t\n'))) == 1
    assert read(write(path, "[]\n")) == []


NUMERALS = ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("found", "labels", "expected"),
    [
        *((kind(i), NUMERALS, i - 1) for i in (1, 5) for kind in (str, int, float, np.int64, np.float32)),
        *((found, NUMERALS, "not one of 1, 2, 3, 4, 5") for found in (0, "0", 6, 1.5, True, None, ["1"])),
        (1, ["-1", "0", "1"], 2),
        (1, ["1.5", "1"], 1),
        (1.5, ["1.5", "1"], 0),
        (1.0, ["no", "yes"], "not one of no, yes"),
        (np.float32(1.5), ["no", "yes"], "not one of no, yes"),
        (np.int64(1), ["no", "yes"], 1),
        (None, ["None", "some"], "not one of None, some"),
        (1, ["no", "yes"], 1),
        ("1", ["no", "yes"], 1),
        (True, ["False", "True"], 1),
        (True, ["false", "true"], 1),
        (True, ["no", "yes"], "not one of no, yes"),
        (float("nan"), ["no", "yes"], "not one of no, yes"),
        (float("inf"), NUMERALS, "not one of"),
    ],
)
def test_a_number_is_the_name_that_it_is_written_like(found: Any, labels: list[str], expected: int | str) -> None:
    row = Row("line 1", {"label": found})
    if isinstance(expected, int):
        assert label(row, "label", labels) == expected
    else:
        with pytest.raises(BadRow, match=expected):
            label(row, "label", labels)


def test_every_format_gives_named_integers_the_same_classes(tmp_path: Path) -> None:
    rows = [{"text": "fine", "label": i} for i in range(1, 6)]
    write(tmp_path / "a.tsv", "text\tlabel\n" + "\n".join(f"fine\t{i}" for i in range(1, 6)))
    write(tmp_path / "a.csv", "text,label\n" + "\n".join(f"fine,{i}" for i in range(1, 6)))
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for ending in ("tsv", "csv", "jsonl", "parquet"):
        path = str(tmp_path / f"a.{ending}")
        data = TextClassificationData(path, path, labels=NUMERALS)
        data.setup("fit")
        assert [int(sample["labels"]) for sample in data.train] == [0, 1, 2, 3, 4], ending


def test_no_two_classes_have_one_name() -> None:
    twice = r"`data\.labels=\['no', 'yes', 'no'\]` names 'no' twice: give each class"
    rows = [{"text": "fine", "label": "no", "image": [[0]]}]
    with pytest.raises(ValueError, match=twice):
        ImageData(rows, labels=["no", "yes", "no"])
    with pytest.raises(ValueError, match=twice):
        TextClassificationData(rows, rows, labels=["no", "yes", "no"], bad_rows=1).setup("fit")


def wide(folder: Path, name: str, picture: Image.Image) -> dict[str, Any]:
    picture.save(folder / name)
    return {"image": str(folder / name), "label": 0}


def ramp(dtype: str, *levels: int) -> Image.Image:
    return Image.fromarray(np.array([levels], dtype=dtype))


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_levels_of_16_bits_are_scaled(channels: int, tmp_path: Path) -> None:
    levels = (0, 257 * 85, 257 * 170, 65535)
    rows = [
        wide(tmp_path, "a.png", ramp("<u2", *levels)),  # mode I;16
        wide(tmp_path, "b.tif", ramp(">u2", *levels)),  # mode I;16B
        wide(tmp_path, "c.tif", ramp("i4", *levels)),  # mode I
        {"image": ramp("i4", *levels), "label": 0},
    ]
    header = b"P5\n4 1\n65535\n"  # a grey map, which Pillow reads as mode I
    (tmp_path / "d.ppm").write_bytes(header + np.array(levels, dtype=">u2").tobytes())
    rows.append({"image": str(tmp_path / "d.ppm"), "label": 0})
    rows.append({"image": [[0, 85, 170, 255]], "label": 0})
    modes = {Image.open(row["image"]).mode for row in rows[:3]}
    assert modes == {"I;16", "I;16B", "I"}
    data = ImageData(rows, rows, size=4, channels=channels, mean=[0.5] * 3, std=[0.5] * 3)
    data.setup("fit")
    pixels = [sample["pixel_values"] for sample in data.train]
    assert torch.allclose(pixels[-1][0, 0], torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0]), atol=1e-6)
    assert all(torch.equal(image, pixels[-1]) for image in pixels)


def test_grey_levels_without_a_known_white_are_bad_rows(tmp_path: Path) -> None:
    rows = [
        wide(tmp_path, "a.png", ramp("<u2", 0, 65535)),
        wide(tmp_path, "b.tif", ramp("i4", 0, 65536)),
        wide(tmp_path, "c.tif", ramp("i4", -1, 5)),
        wide(tmp_path, "d.tif", ramp("f4", 0, 1)),
        {"image": ramp("f4", 0, 1), "label": 0},
    ]
    with pytest.raises(ValueError, match="4 of 5 rows are bad") as caught:
        ImageData(rows, rows, size=2).setup("fit")
    lines = str(caught.value).splitlines()[1:5]
    assert "row 2 holds an image with grey levels from 0 to 65536 (mode I), which must lie in [0, 65535]" in lines[0]
    assert "row 3 holds an image with grey levels from -1 to 5 (mode I)" in lines[1]
    assert all("holds an image of fractions (mode F), whose white is not known" in line for line in lines[2:])


def test_a_damaged_image_with_wide_grey_levels_is_a_bad_row(tmp_path: Path) -> None:
    row = wide(tmp_path, "a.tif", Image.fromarray(np.zeros((64, 64), dtype="i4")))
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="row 1 holds no image in column 'image'"):
        ImageData([row], [row], size=2).setup("fit")


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_field_may_be_of_any_length(ending: str, tmp_path: Path) -> None:
    before, long = csv.field_size_limit(), "x" * 300_000
    between = {"csv": ",", "tsv": "\t"}[ending]
    rows = read(write(tmp_path / f"a.{ending}", f"text{between}label\n{long}{between}1\nshort{between}0\n"))
    assert [row.values for row in rows] == [{"text": long, "label": "1"}, {"text": "short", "label": "0"}]
    assert csv.field_size_limit() == before


def test_the_limit_on_fields_is_given_back_after_an_error_too(tmp_path: Path) -> None:
    before = csv.field_size_limit(400_000)
    try:
        with pytest.raises(ValueError, match="2 columns are named 'a'"):
            read(write(tmp_path / "a.csv", f"a,a\n{'x' * 500_000},1\n"))
        assert csv.field_size_limit() == 400_000
    finally:
        csv.field_size_limit(before)


def test_rows_under_data_are_rows(tmp_path: Path) -> None:
    flat = {"version": 1, "data": [{"text": "x", "label": 0}, "y", {"text": "z", "label": 1}]}
    rows = read(write(tmp_path / "a.json", json.dumps(flat)))
    assert [(row.place, row.values) for row in rows if not row.problem] == [
        ("row 1", {"text": "x", "label": 0}),
        ("row 3", {"text": "z", "label": 1}),
    ]
    assert (rows[1].place, rows[1].problem) == ("row 2", "holds a str, not an object with named columns")
    assert read(write(tmp_path / "b.json", '{"data": []}')) == []


def test_whatever_is_missing_in_squad_is_named_with_its_place(tmp_path: Path) -> None:
    good = {"id": "7", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 3}]}
    questions = [
        good,
        {"question": "Who?", "answers": None},
        {"id": "9", "answers": []},
        "Who?",
        {"id": "11", "question": "Who?", "answers": [{"text": "Ada"}]},
        {"id": "12", "question": "Who?", "answers": {"text": ["Ada"], "answer_start": [3]}},
        {"id": "13", "question": "Who?", "answers": ["Ada"]},
    ]
    articles = [
        {"paragraphs": [{"context": "By Ada.", "qas": questions}, {"context": "By Bob."}, "By Cy.", {"qas": [good]}]},
        {"title": "Ada"},
        {"paragraphs": None},
        None,
    ]
    rows = read(write(tmp_path / "a.json", json.dumps({"data": articles})))
    no_list = "has 'answers' that are no list of objects with 'text' and 'answer_start'"
    assert [(row.place, row.problem) for row in rows] == [
        ("question '7'", ""),
        ("question 2", ""),
        ("question '9'", "has no 'question'"),
        ("question 4", "holds a str, not an object with named columns"),
        ("question '11'", no_list),
        ("question '12'", no_list),
        ("question '13'", no_list),
        ("article 1, paragraph 2", "has no list of 'qas'"),
        ("article 1, paragraph 3", "has no list of 'qas'"),
        ("question '7'", "has no 'context'"),
        ("article 2", "has no list of 'paragraphs'"),
        ("article 3", "has no list of 'paragraphs'"),
        ("article 4", "has no list of 'paragraphs'"),
    ]
    assert rows[1].values == {
        "id": "2",
        "context": "By Ada.",
        "question": "Who?",
        "answers": {"text": [], "answer_start": []},
    }
    with pytest.raises(ValueError, match=r"a\.json: 11 of 13 rows are bad.\s+question '9' has no 'question'"):
        QuestionAnsweringData(str(tmp_path / "a.json"), [], length=64, stride=4).setup("fit")


CONTEXT = "abc Ada abc"


def asked(texts: Any, places: Any) -> dict[str, Any]:
    return {"question": "Who?", "context": CONTEXT, "answers": {"text": texts, "answer_start": places}}


@pytest.mark.parametrize(
    ("texts", "places", "spans"),
    [
        (["Ada"], [4], [(4, 7)]),
        ("Ada", 4, [(4, 7)]),
        (["Ada"], 4, [(4, 7)]),
        (("abc", "abc"), np.array([0, 8]), [(0, 3), (8, 11)]),
        ([], [], []),
        ("abc", [0, 1, 2], "has 1 answers but 3 places"),
        ("Ada", "4", r"holds the place '4' \(str\) in column 'answers', not an integer"),
        (["Ada"], [4.0], r"holds the place 4.0 \(float\) in column 'answers', not an integer"),
        ("Ada", 4.0, "holds the place 4.0"),
        (["bc "], [True], r"holds the place True \(bool\)"),
        (["Ada"], [None], r"holds the place None \(NoneType\)"),
        (["Ada"], None, r"holds the place None \(NoneType\)"),
        ([3], [4], r"holds the answer 3 \(int\) in column 'answers', not text"),
        (None, None, r"holds the answer None \(NoneType\)"),
        ({"Ada": 1}, [4], r"holds the answer \{'Ada': 1\} \(dict\)"),
        (["Ada"], [-7], "which does not stand at -7"),
        ([""], [-1], [(-1, -1)]),
    ],
)
def test_answers_are_texts_at_integer_places(texts: Any, places: Any, spans: list[Any] | str) -> None:
    row = asked(texts, places)
    data = QuestionAnsweringData([row], [row], length=64, stride=4)
    if isinstance(spans, str):
        with pytest.raises(ValueError, match=rf"`data.train`: 1 of 1 rows are bad.\s+row 1 .*{spans}"):
            data.setup("fit")
    else:
        data.setup("fit")
        assert data.val[0]["reference"] == ([CONTEXT[start:end] for start, end in spans] or [""])
        start, end = spans[0] if spans and spans[0][0] >= 0 else (None, None)
        window = data.val[0]["windows"][0]
        marked = [int(window[key]) for key in ("start_positions", "end_positions")]
        inside = [window["offsets"][i] for i in marked]
        assert inside == ([(start, start + 1), (end - 1, end)] if start is not None else [None, None])


@pytest.mark.parametrize(("ending", "between"), [("csv", ","), ("tsv", "\t"), ("txt", "\t")])
def test_no_two_columns_of_a_table_have_one_name(ending: str, between: str, tmp_path: Path) -> None:
    name = rf"a\.{ending}"
    path = write(tmp_path / f"a.{ending}", "\n" + between.join(["text", "label", "text"]) + "\n" + between.join("xyz"))
    with pytest.raises(ValueError, match=rf"{name}, line 2: 2 columns are named 'text': rename all but one there"):
        read(path)
    with pytest.raises(ValueError, match=rf"{name}, `data\.columns=\['a', 'b', 'b'\]`: 2 columns are named 'b'"):
        read(path, ["a", "b", "b"])
    unnamed = write(path, between.join(["text", "label", "", ""]) + "\n" + between.join(["x", "1", "", ""]))
    assert read(unnamed)[0].values["text"] == "x"


def test_no_two_columns_of_a_parquet_file_have_one_name(tmp_path: Path) -> None:
    table = pyarrow.table([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: 2 columns are named 'text': rename all but one"):
        read(tmp_path / "a.parquet")
