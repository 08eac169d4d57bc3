import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cluster.errors import RequestError, RunError
from pipeline.config import ColumnsConfig, ReadConfig
from pipeline.manifest import read_manifest
from pipeline.readers import list_schema, list_sources, local_copy, read_rows

ROWS = [
    {"url": "http://a.example/1.jpg", "caption": "one", "score": 1.5, "tag": "x"},
    {"url": "http://a.example/2.jpg", "caption": "zwei, „zitiert“\nund umbrochen", "score": None, "tag": "y"},
    {"url": None, "caption": None, "score": 3.0, "tag": None},
]
COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def quoted(value: Any) -> str:
    return "" if value is None else '"' + str(value).replace('"', '""') + '"'


def encode(format: str) -> bytes:
    if format == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(ROWS), sink)
        return sink.getvalue().to_pybytes()
    if format == "json":
        return json.dumps(ROWS, indent=1).encode()
    if format == "jsonl":
        return b"\n".join(json.dumps(row, ensure_ascii=False).encode() for row in ROWS)
    mark = "\t" if format == "tsv" else ","
    lines = [mark.join(ROWS[0]), *(mark.join(quoted(value) for value in row.values()) for row in ROWS)]
    return "\r\n".join(lines).encode()


def read(
    *patterns: str,
    keep: list[str] | None = None,
    format: str = "auto",
    batch_rows: int = 2,
    infer_rows: int = 1_000,
) -> list[dict[str, Any]]:
    """Every row of a list, through the whole of the readers."""
    sources = list_sources(patterns, format)
    schema = list_schema(sources, ColumnsConfig(keep=keep), ReadConfig(infer_rows=infer_rows))
    rows: list[dict[str, Any]] = []
    for source in sources:
        with local_copy(source) as (path, _):
            for batch in read_rows(path, source, schema, batch_rows):
                batch.validate(full=True)
                rows += batch.to_pylist()
    return rows


def pairs(rows: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    return [(row["url"], row["caption"]) for row in rows]


@pytest.mark.parametrize(
    ("format", "compression"),
    [
        ("parquet", ""),
        *((format, ending) for format in ("csv", "tsv", "json", "jsonl") for ending in COMPRESS),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, format: str, compression: str) -> None:
    file = tmp_path / f"list.{format}{compression}"
    file.write_bytes(COMPRESS[compression](encode(format)))
    rows = read(str(file))
    assert pairs(rows) == [(row["url"], row["caption"] or "") for row in ROWS]
    as_text = format in ("csv", "tsv")
    assert [row["source_score"] for row in rows] == (["1.5", None, "3.0"] if as_text else [1.5, None, 3.0])
    assert [row["tag"] for row in rows] == ["x", "y", None]
    assert {row["reason"] for row in rows} == {None}


def test_plain_text_is_a_url_a_line(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfhttp://a/1 \r\n\n  http://a/2\nhttp://a/\xff3")
    rows = read(str(tmp_path / "list.txt"))
    assert [(row["url"], row["caption"]) for row in rows[:2]] == [("http://a/1", ""), ("http://a/2", "")]
    assert (rows[2]["url"], rows[2]["reason"]) == (None, "unreadable_row")


def test_lists_are_read_from_any_fsspec_url() -> None:
    with fsspec.open("memory://lists/a.csv.gz", "wb") as file:
        file.write(gzip.compress(encode("csv")))
    with fsspec.open("memory://lists/b.parquet", "wb") as file:
        file.write(encode("parquet"))
    assert len(read("memory://lists/a.csv.gz", keep=[])) == 3
    assert len(read("memory://lists", keep=[])) == 6
    assert len(read("memory://lists/*.parquet", keep=[])) == 3
    assert [source.name for source in list_sources(["memory://lists"])] == ["a.csv.gz", "b.parquet"]


def test_folders_and_globs_are_sorted_and_each_file_is_taken_once(tmp_path: Path) -> None:
    for name in (
        "b.csv",
        "a.jsonl",
        "deep/c.txt",
        "_SUCCESS",
        ".hidden.csv",
        "readme.md",
        "_temporary/d.csv",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [source.name for source in list_sources([str(tmp_path), str(tmp_path / "*.csv"), str(tmp_path / "b.csv")])]
    assert names == ["a.jsonl", "b.csv", "deep/c.txt"]
    assert not any(str(tmp_path) in name for name in names)


def test_glob_that_matches_folders_takes_the_files_in_them(tmp_path: Path) -> None:
    for name in ("a.parquet/part-0.parquet", "a.parquet/_SUCCESS", "b.parquet/part-0.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"url": ["http://a"], "caption": ["x"]}), tmp_path / name)
    assert len(read(str(tmp_path / "*.parquet"))) == 2


def test_file_name_with_a_bracket_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "list[1].txt").write_text("http://a/1\n")
    assert len(read(str(tmp_path / "list[1].txt"))) == 1


def test_ragged_and_undecodable_csv_rows_are_counted_and_spoil_no_other(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_bytes(
        b"url,caption\nhttp://a/1,one\nhttp://a/2\nhttp://a/3,three,more\n\nhttp://a/4,\xff\xfe\nhttp://a/5,five\n"
    )
    rows = read(str(file), batch_rows=100)
    good = [row for row in rows if row["reason"] is None]
    assert pairs(good) == [("http://a/1", "one"), ("http://a/5", "five")]
    bad = [row for row in rows if row["reason"] == "unreadable_row"]
    assert len(bad) == 3
    assert "http://a/2" in bad[0]["caption"]


@pytest.mark.parametrize("column", ["url", "caption"])
@pytest.mark.parametrize("num_rows", [20, 2_000])
def test_stray_quote_loses_its_own_line_only(tmp_path: Path, column: str, num_rows: int) -> None:
    lines = [f"http://a/{i},caption {i}" for i in range(num_rows)]
    lines[7] = '"http://a/7,caption 7' if column == "url" else 'http://a/7,"caption 7'
    (tmp_path / "list.csv").write_text("\n".join(["url,caption", *lines]) + "\n")
    rows = read(str(tmp_path / "list.csv"), batch_rows=1_000)
    assert pairs([row for row in rows if not row["reason"]]) == [
        (f"http://a/{i}", f"caption {i}") for i in range(num_rows) if i != 7
    ]
    assert len([row for row in rows if row["reason"] == "unreadable_row"]) == 1


def test_broken_json_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_bytes(
        b'{"url": "http://a/1", "caption": "one"}\n{"url": \n[1]\n\n{"url": "http://a/\xff", "caption": ""}\n'
        b'{"url": "http://a/\\ud800", "caption": "x"}\n{"url": 5, "caption": ["a", "b"]}\n'
    )
    rows = read(str(tmp_path / "list.jsonl"))
    assert pairs([row for row in rows if not row["reason"]]) == [("http://a/1", "one"), ("5", '["a", "b"]')]
    assert sum(row["reason"] == "unreadable_row" for row in rows) == 4


@pytest.mark.parametrize("spoil", [lambda data: data[:-30], lambda data: b"}, {{".join(data.rsplit(b"}, {", 1))])
def test_json_array_that_breaks_off_or_is_damaged_ends_the_run(tmp_path: Path, spoil: Any) -> None:
    rows = [{"url": f"http://a/{i}", "caption": "ä" * 50} for i in range(5_000)]
    (tmp_path / "list.json").write_bytes(spoil(json.dumps(rows, ensure_ascii=False).encode()))
    with pytest.raises(RunError, match=r"list\.json: breaks off or is damaged .no JSON value and no end"):
        read(str(tmp_path / "list.json"))


def test_json_arrays_one_after_the_other_are_not_taken_for_the_first_alone(tmp_path: Path) -> None:
    one = json.dumps([{"url": f"http://a/{i}", "caption": "x"} for i in range(2_000)], indent=1)
    (tmp_path / "list.json").write_text(f"{one}\n{one}\n")
    with pytest.raises(RunError, match="more text after the end of the array"):
        read(str(tmp_path / "list.json"))
    (tmp_path / "list.json").write_text(f"{one}\n \n")
    assert len(read(str(tmp_path / "list.json"))) == 2_000


def test_json_file_with_one_object_a_line_is_read_as_such(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_bytes(encode("jsonl"))
    assert len(read(str(tmp_path / "list.json"))) == 3


LATE = [
    ("many", "many does not fit int64"),
    (1.5, "1.5 does not fit int64"),
    (True, "true does not fit int64"),
    (2**63, "9223372036854775808 does not fit int64"),
]


@pytest.mark.parametrize(("value", "said"), LATE)
def test_late_json_values_of_another_type_end_the_run_with_row_key_and_remedy(
    tmp_path: Path, value: Any, said: str
) -> None:
    row = {"url": "http://a", "caption": "", "n": 1}
    rows = [*([row] * 1_000), "broken", row, {**row, "n": value}, row]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(RunError) as failed:
        read(str(tmp_path / "list.jsonl"), batch_rows=600)
    assert str(failed.value).startswith(f"list.jsonl: row 1003: key n: {said}")
    assert "set read.infer_rows to at least 1003, or leave it out with columns.keep=[]" in str(failed.value)
    found = read(str(tmp_path / "list.jsonl"), infer_rows=1_003)
    assert len(found) == 1_004
    assert read(str(tmp_path / "list.jsonl"), keep=[])[-1].keys() == {"url", "caption", "reason", "detail"}


def test_late_json_key_ends_the_run_unless_further_columns_are_named(tmp_path: Path) -> None:
    row = {"url": "http://a", "caption": "", "n": 1}
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, [*([row] * 1_000), {**row, "late": 2}])))
    with pytest.raises(RunError, match=r"row 1001: key late: not seen before.*columns\.keep=\[n\]"):
        read(str(tmp_path / "list.jsonl"))
    assert [row["n"] for row in read(str(tmp_path / "list.jsonl"), keep=["n"])] == [1] * 1_001
    assert read(str(tmp_path / "list.jsonl"), infer_rows=2_000)[-1]["late"] == 2


def test_numbers_that_a_double_would_round_stay_as_they_are(tmp_path: Path) -> None:
    row = {"url": "http://a", "caption": ""}
    rows = [{**row, "n": 0.5}, {**row, "n": 2**60 + 1}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [row["n"] for row in read(str(tmp_path / "list.jsonl"))] == ["0.5", str(2**60 + 1)]
    base = {"url": ["http://a"], "caption": ["x"]}
    pq.write_table(pa.table({**base, "n": pa.array([2**60 + 1])}), tmp_path / "a.parquet")
    pq.write_table(pa.table({**base, "n": pa.array([2.5])}), tmp_path / "b.parquet")
    with pytest.raises(RunError, match=r"a\.parquet: column n: .*give the column one type in all files"):
        read(str(tmp_path / "*.parquet"))


def test_too_long_line_is_one_unreadable_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.readers.text.MAX_LINE_BYTES", 1_000)
    (tmp_path / "list.txt").write_text("http://a/1\nhttp://a/" + "x" * 5_000 + "\nhttp://a/2\n")
    rows = read(str(tmp_path / "list.txt"), batch_rows=10)
    assert [row["url"] for row in rows] == ["http://a/1", "http://a/2", None]


def test_parquet_with_bad_bytes_and_dictionaries_is_read(tmp_path: Path) -> None:
    table = pa.table(
        {
            "url": pa.array([b"http://a/1", b"http://a/\xff", b"http://a/3"], pa.binary()),
            "caption": pa.array(["a", "b", "a"]).dictionary_encode(),
            "tags": pa.array([["x"], None, ["y", "z"]]),
            "name": pa.array(["p", "q", "r"], pa.large_string()),
        }
    )
    pq.write_table(table, tmp_path / "list.parquet")
    rows = read(str(tmp_path / "list.parquet"), batch_rows=10)
    assert [row["url"] for row in rows] == ["http://a/1", "http://a/3", None]
    assert [row["tags"] for row in rows] == [["x"], ["y", "z"], None]
    assert rows[2]["reason"] == "unreadable_row"


def test_extra_columns_are_unified_over_files(tmp_path: Path) -> None:
    base = {"url": ["http://a"], "caption": ["x"]}
    pq.write_table(pa.table({**base, "n": pa.array([1], pa.int32()), "only": [True]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({**base, "n": pa.array([2.5])}), tmp_path / "b.parquet")
    rows = read(str(tmp_path))
    assert [(row["n"], row["only"]) for row in rows] == [(1.0, True), (2.5, None)]


def test_columns_with_our_names_are_renamed(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"url": ["http://a"], "caption": ["x"], "width": [640], "source_width": [1]}),
        tmp_path / "a.parquet",
    )
    row = read(str(tmp_path))[0]
    assert (row["source_source_width"], row["source_width"]) == (640, 1)


def write(tmp_path: Path, name: str, content: str) -> str:
    (tmp_path / name).write_text(content)
    return str(tmp_path / name)


def refusal(*patterns: str, columns: ColumnsConfig | None = None) -> str:
    with pytest.raises(RequestError) as refused:
        list_schema(list_sources(patterns), columns or ColumnsConfig(), ReadConfig())
    return str(refused.value)


def test_missing_columns_are_refused_with_what_is_there_and_the_key_to_set(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "a.csv", "URL,TEXT,WIDTH\n1,2,3\n"))
    assert message == "a.csv: no column url; it has URL, TEXT, WIDTH; set columns.url=URL"
    columns = ColumnsConfig(url="URL")
    assert refusal(str(tmp_path / "a.csv"), columns=columns).endswith("set columns.caption=TEXT")
    keeping = ColumnsConfig(url="URL", caption="TEXT", keep=["WITH"])
    assert refusal(str(tmp_path / "a.csv"), columns=keeping).endswith("did you mean WIDTH?")


def test_unusable_lists_are_refused_before_work(tmp_path: Path) -> None:
    good = write(tmp_path, "good.csv", "url,caption,n\nhttp://a,x,1\n")
    assert "did you mean good.csv?" in refusal(str(tmp_path / "god.csv"))
    assert "set read.format" in refusal(write(tmp_path, "list.dat", "x"))
    assert "cannot be read as plain parquet" in refusal(write(tmp_path, "bad.parquet", "this is no parquet"))
    assert "cannot be read as gzip csv" in refusal(write(tmp_path, "bad.csv.gz", "this is no gzip"))
    assert "neither a JSON array" in refusal(write(tmp_path, "bad.jsonl", "hello\n"))
    assert "appears twice" in refusal(write(tmp_path, "twice.csv", "url,caption,url\n1,2,3\n"))
    assert "no rows in empty.txt" in refusal(write(tmp_path, "empty.txt", ""))
    assert "no rows in header.csv" in refusal(write(tmp_path, "header.csv", "url,caption\n"))
    assert "the server does not answer" in refusal("http://127.0.0.1:9/list.csv")
    assert "cannot open this location" in refusal("nosuch://place/a.csv")
    pq.write_table(pa.table({"url": ["u"], "caption": ["c"], "n": [1]}), tmp_path / "int.parquet")
    clash = refusal(good, str(tmp_path / "int.parquet"))
    assert clash.startswith("int.parquet: column n holds int64, but string in good.csv")
    pq.write_table(pa.table({"url": ["u"], "caption": [["c"]]}), tmp_path / "nested.parquet")
    assert "holds list" in refusal(str(tmp_path / "nested.parquet"))


def test_empty_files_beside_others_are_nothing(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", "")
    write(tmp_path, "b.csv", "url,caption\n")
    write(tmp_path, "c.csv", "url,caption\nhttp://a,x\n")
    assert len(read(str(tmp_path))) == 1


@pytest.mark.parametrize("ending", [ending for ending in COMPRESS if ending])
def test_compressed_list_that_breaks_off_ends_the_run(tmp_path: Path, ending: str) -> None:
    body = "url,caption\n" + "".join(f"http://a/{i},{i * 7919 % 10007}\n" for i in range(200_000))
    data = COMPRESS[ending](body.encode())
    (tmp_path / f"a.csv{ending}").write_bytes(data[: len(data) * 9 // 10])
    with pytest.raises((RunError, RequestError), match=r"a\.csv.*: (breaks off|cannot be read)"):
        read(str(tmp_path / f"a.csv{ending}"), batch_rows=10_000)


def test_compressed_parts_one_after_the_other_are_read_as_one(tmp_path: Path) -> None:
    for ending, compress in COMPRESS.items():
        (tmp_path / f"a.txt{ending}").write_bytes(compress(b"http://a/1\n") + compress(b"http://a/2\n"))
        assert len(read(str(tmp_path / f"a.txt{ending}"))) == 2


def test_header_that_is_no_utf8_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("url,caption\nhttp://a,x\n".encode("utf-16"))
    assert "names of the columns is no UTF-8 text" in refusal(str(tmp_path / "a.csv"))
    assert "has a quote that stays open" in refusal(write(tmp_path, "b.csv", 'url,"caption\nhttp://a,x\n'))


def test_dataset_in_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no finished dataset here"):
        read_manifest(write(tmp_path, "list.csv", "url,caption\n"))
