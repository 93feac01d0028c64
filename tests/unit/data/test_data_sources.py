"""Every format gives the same rows; every way to break one is reported with its line."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eetrain.data.sources import HubSource, Row, read_rows
from eetrain.errors import DataError

ROWS = [{"mr": "name[Café], food[x]", "ref": 'Says "hi".'}, {"mr": "two\nlines", "ref": ""}, {"mr": "z", "ref": "y"}]


def _csv(path: Path) -> bytes:
    return 'mr,ref\r\n"name[Café], food[x]","Says ""hi""."\r\n"two\nlines",\r\n\r\nz,y\r\n'.encode()


def _jsonl(path: Path) -> bytes:
    return "\n".join(["", *(json.dumps(row) for row in ROWS)]).encode()


def _json(path: Path) -> bytes:
    return json.dumps(ROWS, indent=1).encode()


# The physical lines on which the three rows start, counted by hand from the texts above.
LINES = {"csv": [2, 3, 6], "jsonl": [2, 3, 4], "json": [2, 6, 10]}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(("kind", "content"), [("csv", _csv), ("jsonl", _jsonl), ("json", _json)])
def test_text_formats_give_equal_rows_with_their_lines(tmp_path, kind, content, suffix):
    path = tmp_path / f"data.{kind}{suffix}"
    path.write_bytes(gzip.compress(content(path)) if suffix else content(path))
    rows = list(read_rows(str(path)))
    assert [dict(row.fields) for row in rows] == ROWS
    assert [row.origin for row in rows] == [f"{path}:{line}" for line in LINES[kind]]


def test_parquet_counts_rows(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    rows = list(read_rows(str(path)))
    assert [dict(row.fields) for row in rows] == ROWS
    assert [row.origin for row in rows] == [f"{path}:{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.md", "a.unheard-of", "a"])
def test_any_other_ending_is_one_document(tmp_path, name):
    (tmp_path / name).write_text("line 1\nline 2\n")
    assert list(read_rows(str(tmp_path / name))) == [Row({"text": "line 1\nline 2\n"}, f"{tmp_path / name}:1")]


def test_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfmr,ref\na,b\n")
    assert next(read_rows(str(tmp_path / "a.csv"))).fields == {"mr": "a", "ref": "b"}


def test_globs_are_sorted_lists_keep_their_order_and_limit_counts_over_all(tmp_path):
    for name in ("b", "a", "sub/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(name)
    texts = [row.fields["text"] for row in read_rows(str(tmp_path / "**" / "*.txt"))]
    assert texts == ["a", "b", "sub/c"]
    both = [str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]
    assert [row.fields["text"] for row in read_rows(both)] == ["b", "a"]
    assert [row.fields["text"] for row in read_rows(both, limit=1)] == ["b"]


def test_reading_is_lazy(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\nbroken\n')
    rows = read_rows(str(tmp_path / "a.jsonl"))
    assert next(rows).fields == {"a": 1}
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid JSON"):
        next(rows)


BROKEN = [
    ("a.jsonl", b'{"a": 1}\n\n{"a": }\n', r"a\.jsonl:3: not valid JSON \(Expecting value, column 7\)"),
    ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl:2: a JSON list, not an object"),
    ("a.json", b'[{"a": 1},\n\n {"a": }]', r"a\.json:3: not valid JSON \(Expecting value"),
    ("a.json", b'[{"a": 1}\n {"a": 2}]', r"a\.json:2: not valid JSON \(expected ',' or '\]'"),
    ("a.json", b'[{"a": 1},\n', r"a\.json:2: not valid JSON"),
    ("a.json", b'[{"a": 1},\n 5]', r"a\.json:2: a JSON int, not an object"),
    ("a.json", b'\n{"a": 1}', r"a\.json:2: not a list of objects"),
    ("a.json", b'[{"a": 1}]\n[]', r"a\.json:1: not valid JSON \(the list is followed by '\[\]'"),
    ("a.csv", b'a,b\n"x\ny",1\n1,2,3\n', r"a\.csv:4: 3 columns, but the header has 2 \(a, b\)"),
    ("a.csv", b"a,b\n1\n", r"a\.csv:2: 1 columns"),
    ("a.csv", b'a,b\n1,2\n"open,2\n', r"a\.csv:3: not valid CSV \(unexpected end of data\)"),
    ("a.csv", b"a,a\n1,2\n", r"a\.csv:1: the header names a column twice \(a, a\)"),
    ("a.txt", b"fine\n\xff\xfe\n", r"a\.txt:2: the bytes are not UTF-8 text"),
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-12], r"a\.jsonl\.gz: cannot be read after line"),
    ("a.csv.gz", b"not gzip", r"a\.csv\.gz: cannot be read after line 0"),
    ("a.parquet", b"not parquet", r"a\.parquet: not a readable Parquet file"),
    ("a.csv", b"a,b\n", r"The data set .*a\.csv has no rows"),
    ("a.json", b"[]", r"The data set .*a\.json has no rows"),
    ("a.jsonl", b"\n", r"The data set .*a\.jsonl has no rows"),
    ("a.txt", b"", r"The data set .*a\.txt has no rows"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_broken_file_names_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(str(tmp_path / name)))
    assert caught.value.hint


def test_missing_file_hints_at_both_ways_and_folder_at_a_pattern(tmp_path):
    with pytest.raises(DataError, match=r"File not found: 'owner/name'\.") as caught:
        list(read_rows("owner/name"))
    assert "glob pattern" in caught.value.hint
    assert "hub:owner/name" in caught.value.hint
    with pytest.raises(DataError, match="is a folder") as caught:
        list(read_rows(str(tmp_path)))
    assert f"{tmp_path}/*.jsonl" in caught.value.hint


def test_text_of_a_field():
    row = Row({"s": "a", "i": 3, "f": 0.5, "l": ["x", "y"], "n": None, "b": True, "m": ["x", 1]}, "f:7")
    assert [row.text(name) for name in "sifl"] == ["a", "3", "0.5", "x y"]
    for name, found in (("n", "null"), ("b", "of type bool"), ("m", "of type list")):
        with pytest.raises(DataError, match=f"^f:7: field '{name}' is {found}, not a string"):
            row.text(name)
    with pytest.raises(DataError, match="f:7: there is no field 'q'; the row has 's', 'i'"):
        row.text("q")


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("hub:o/n", ("o/n", None, None)),
        ("hub:o/n@c", ("o/n", "c", None)),
        ("hub:o/n#s", ("o/n", None, "s")),
        ("hub:o/n@c#s[:10%]", ("o/n", "c", "s[:10%]")),
    ],
)
def test_hub_syntax(source, parts):
    assert HubSource.parse(source) == HubSource(*parts)


def test_hub_source_loads_through_datasets(tmp_path, monkeypatch):
    """`load_dataset` takes a folder in place of a hub id, so that the real call runs without a network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"a": "t1"}\n{"a": "t2"}\n')
    (folder / "test.jsonl").write_text('{"a": "e1"}\n')
    assert [dict(row.fields) for row in read_rows(f"hub:{folder}")] == [{"a": "t1"}, {"a": "t2"}]
    assert [row.origin for row in read_rows(f"hub:{folder}", "test")] == [f"hub:{folder}#test:1"]
    assert [row.fields["a"] for row in read_rows(f"hub:{folder}#test")] == ["e1"]
    with pytest.raises(DataError, match=r"split 'validation'\) could not be loaded") as caught:
        list(read_rows(f"hub:{folder}", "validation"))
    assert "after '#'" in caught.value.hint
    with pytest.raises(DataError, match="names no data set"):
        list(read_rows("hub:#train"))
