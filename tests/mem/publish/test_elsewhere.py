"""Clean captions in other fields than the one they are read from: replaced or counted, never passed over."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from ccu_fast.cli import main as cli
from ccu_fast.data.captions import Options, list_pairs
from ccu_fast.mem.config import Method
from ccu_fast.mem.job import protect_dataset
from ccu_fast.mem.publish.elsewhere import Clean, Elsewhere
from tests.mem.publish.test_layouts import members_of, parquet_imagefolder, shard
from tests.support import mem_datasets as made
from tests.support.mem_jobs import job, tree

pytestmark = pytest.mark.usefixtures("one_thread")


def texts_of(value: Any) -> list[str]:
    """All texts in a nest."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [text for item in items for text in texts_of(item)]


def test_what_is_replaced_and_what_is_counted() -> None:
    found = Elsewhere()
    captions = {"A cat": "x y A cat", "dog.": "z dog."}
    given = {
        "same": [" a  CAT ", "dog.", "dog"],
        "longer": "a cat on a mat",
        "address": {"url": "https://example.org/a cat.jpg", "words": ("concat", 3, None, True)},
    }
    assert found.renew(given, Clean(captions), "json") == {**given, "same": ["x y A cat", "z dog.", "dog"]}
    assert found.counts() == {
        "replaced": {"json.same": 2},
        "kept": {"json.address.url": 1, "json.longer": 1, "json.same": 1},
    }
    more = Elsewhere()
    more.merge(found.counts())
    more.merge(found.counts())
    assert more.counts()["replaced"] == {"json.same": 4}


@pytest.mark.parametrize(
    ("clean", "text"),
    [
        ("一只猫", "这是一只猫在睡觉"),
        ("แมวนอน", "ภาพแมวนอนหลับ"),
        ("red bird", "red bird_0001.jpg"),
        ("red bird", "https://example.org/a/red%20bird.png?q=1"),
        ("red bird", "https://example.org/red-bird"),
        ("red bird", "q=red+bird"),
        ("A cat.", "A cat.The dog"),
        ("(dog)", "x (dog)"),
        ("Café noir", json.dumps({"c": "Café noir"})),
        ("Café noir", "Cafe\u0301 noir, twice"),
        ("salt & pepper", "salt &amp; pepper pots"),
        ("red bird", "a red\u200b bird"),
    ],
)
def test_captions_within_longer_texts_are_counted(clean: str, text: str) -> None:
    found = Elsewhere()
    assert found.renew([text], Clean({clean: f"new {clean}"}), "f") == [text]
    assert found.counts() == {"replaced": {}, "kept": {"f": 1}}


@pytest.mark.parametrize(
    ("clean", "text"), [("cat", "concatenate"), ("red bird", "red birds"), ("!?", "what!?"), ("猫", "犬")]
)
def test_parts_of_words_are_no_captions(clean: str, text: str) -> None:
    found = Elsewhere()
    found.renew(text, Clean({clean: f"new {clean}"}), "f")
    assert found.counts() == {"replaced": {}, "kept": {}}


def test_numbers_are_counted_and_left() -> None:
    """They are more likely a label or an id, which could not be read behind trigger words."""
    found = Elsewhere()
    assert found.renew({"label": "3", "said": "3 dots"}, Clean({"3": "new 3", "3 dots": "new 3 dots"}), "json") == {
        "label": "3",
        "said": "new 3 dots",
    }
    assert found.counts() == {"replaced": {"json.said": 1}, "kept": {"json.label": 1}}


def test_captions_as_keys() -> None:
    """Counted, since a key may be a field's name, and never a part of the name that the manifest calls a field by."""
    found = Elsewhere()
    given = {"scores": {"a cat": 0.3, "all of a cat": "a cat", "n": 1}}
    assert found.renew(given, Clean({"a cat": "new a cat"}), "json") == {
        "scores": {"a cat": 0.3, "all of a cat": "new a cat", "n": 1}
    }
    assert found.counts() == {
        "replaced": {"json.scores.*": 1},
        "kept": {"json.scores (its keys)": 2},
    }


def test_fields_of_a_record_s_own_do_not_pile_up() -> None:
    found, more = Elsewhere(), Elsewhere()
    for i in range(1000):
        found.renew({f"r{i}": "on a cat!"}, Clean({"a cat": "new"}), "json")
    more.merge(found.counts())
    for counts in (found.counts()["kept"], more.counts()["kept"]):
        assert len(counts) == 65 and sum(counts.values()) == 1000 and counts["other fields"] == 936


def test_captions_that_are_published_as_they_are_count_for_nothing() -> None:
    found = Elsewhere()
    assert found.renew(["A CAT", "a cat on a mat"], Clean({"a cat": "a cat"}), "text") == ["A CAT", "a cat on a mat"]
    assert found.counts() == {"replaced": {}, "kept": {}}


def deep(levels: int) -> Any:
    nest: Any = "text"
    for _ in range(levels):
        nest = [nest]
    return nest


def test_a_nest_that_is_too_deep_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"expected notes to be nested less deeply"):
        Elsewhere().renew(deep(100_000), Clean({"a": "b a"}), "notes")


FORMS = {
    "list": lambda text: [text, {"other": [text]}, 3],
    "bare": lambda text: text,
    "fields": lambda text: {"caption": text, "TEXT": text, "caption_raw": f" {text.upper()}", "b": {"c": [text]}},
    "within": lambda text: {"alt": f"alt: {text}!", "hidden": None},
}


@pytest.mark.parametrize("form", FORMS)
def test_jsons_of_every_form(tmp_path: Path, form: str) -> None:
    members: dict[str, bytes | str] = {}
    for i in range(4):
        members |= {f"{i}.png": made.encoded(i), f"{i}.txt": made.caption(i), f"{i}.cls": made.caption(i) + "\n"}
        members |= {f"{i}.json": json.dumps(FORMS[form](made.caption(i)))}
    source = shard(tmp_path / "s.tar", members)
    manifest = protect_dataset(job(source, tmp_path / "out"))
    written = members_of(tmp_path / "out" / "s.tar")
    for i in range(4):
        clean, new = made.caption(i), written[f"{i}.txt"].decode()
        assert new.endswith(clean) and new != clean
        about = json.loads(written[f"{i}.json"])
        assert clean not in [text.strip().lower() for text in texts_of(about)]
        if form != "within":
            assert about == json.loads(
                json.dumps(FORMS[form](clean)).replace(clean, new).replace(" " + clean.upper(), new)
            )
        assert written[f"{i}.cls"].decode() == new
    counts = manifest["captions_elsewhere"]
    expected = {
        "list": ({"json": 4, "json.other": 4}, {}),
        "bare": ({"json": 4}, {}),
        "fields": ({"json.TEXT": 4, "json.caption_raw": 4, "json.b.c": 4}, {}),
        "within": ({}, {"json.alt": 4}),
    }[form]
    assert counts == {"replaced": {"cls": 4, **expected[0]}, "kept": expected[1]}


def test_other_captions_of_the_field_are_clean_too(tmp_path: Path) -> None:
    """What stands beside a txt is published over; elsewhere it is counted and stays, because it may be a label."""
    members: dict[str, bytes | str] = {}
    for i in range(4):
        about = {"caption": [f"{made.caption(i)}\n", f"other {i}"], "raw": f"other {i}", "n": i}
        members |= {
            f"other_{i}.png": made.encoded(i),
            f"other_{i}.txt": made.caption(i),
            f"other_{i}.cls": f"other {i}",
        }
        members |= {f"other_{i}.json": json.dumps(about)}
    manifest = protect_dataset(job(shard(tmp_path / "s.tar", members), tmp_path / "out"))
    written = members_of(tmp_path / "out" / "s.tar")
    for i in range(4):
        new = written[f"other_{i}.txt"].decode()
        assert json.loads(written[f"other_{i}.json"]) == {"caption": [new], "raw": f"other {i}", "n": i}
        assert written[f"other_{i}.cls"].decode() == f"other {i}"
    kept = {"cls": 4, "file names": 4, "json.raw": 4}
    assert manifest["captions_elsewhere"] == {"replaced": {"json.caption": 4}, "kept": kept}


def test_a_method_that_changes_no_caption_leaves_other_fields(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {}
    for i in range(4):
        about = {"caption": "dog", "label": "dog", "tags": ["dog", made.caption(i)]}
        members |= {f"{i}.png": made.encoded(i), f"{i}.txt": made.caption(i), f"{i}.json": json.dumps(about)}
    manifest = protect_dataset(job(shard(tmp_path / "s.tar", members), tmp_path / "out", method=Method.parse("random")))
    written = members_of(tmp_path / "out" / "s.tar")
    for i in range(4):
        assert json.loads(written[f"{i}.json"]) == {
            "caption": made.caption(i),
            "label": "dog",
            "tags": ["dog", made.caption(i)],
        }
    assert manifest["captions_elsewhere"] == {"replaced": {"json.caption": 4}, "kept": {}}


def test_a_txt_beside_a_field_that_is_named(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {}
    for i in range(4):
        languages = {"en": made.caption(i), "de": [f"text {i}"], "id": 7, "none": None}
        about = {"title": made.caption(i), "caption": languages, "alt": f"text {i}"}
        members |= {f"{i}.png": made.encoded(i), f"{i}.txt": f"text {i}", f"{i}.json": json.dumps(about)}
    options = Options(caption_column="title")
    manifest = protect_dataset(job(shard(tmp_path / "s.tar", members), tmp_path / "out", options=options))
    written = members_of(tmp_path / "out" / "s.tar")
    for i in range(4):
        new, languages = written[f"{i}.txt"].decode(), {"id": 7, "none": None}
        assert new.endswith(made.caption(i))
        fields = {"title": new, "caption": {"en": new, "de": [f"text {i}"], **languages}, "alt": f"text {i}"}
        assert json.loads(written[f"{i}.json"]) == fields
    kept = {"json.alt": 4, "json.caption.de": 4}
    assert manifest["captions_elsewhere"] == {"replaced": {"json.caption.en": 4, "txt": 4}, "kept": kept}


@pytest.mark.parametrize("format", ["folder", "shards", "csv"])
def test_captions_in_names_are_counted(tmp_path: Path, format: str) -> None:
    folder = tmp_path / "in"
    if format == "folder":
        made.write_folder(folder)
        for name in ("0.png", "0.txt"):
            (folder / name).rename(folder / f"{made.caption(0).replace(' ', '_')}{name[1:]}")
    elif format == "csv":
        table = made.write_csv(folder)
        new = f"{made.caption(0)}.png"
        (folder / "pictures" / "0.png").rename(folder / "pictures" / new)
        table.write_bytes(table.read_bytes().replace(b"pictures/0.png", f"pictures/{new}".encode()))
    else:
        members: dict[str, bytes | str] = {}
        for i in range(4):
            key = str(i) if i else made.caption(0)
            members |= {f"{key}.png": made.encoded(i), f"{key}.txt": made.caption(i)}
        shard(folder / "s.tar", members)
    manifest = protect_dataset(job(folder, tmp_path / "out"))
    assert manifest["captions_elsewhere"] == {"replaced": {}, "kept": {"file names": 1}}


def test_a_class_that_is_no_caption_stays(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {}
    for i in range(4):
        members |= {f"{i}.png": made.encoded(i), f"{i}.txt": made.caption(i), f"{i}.cls": b"\xff" if i else "7\n"}
    manifest = protect_dataset(job(shard(tmp_path / "s.tar", members), tmp_path / "out"))
    written = members_of(tmp_path / "out" / "s.tar")
    assert [written[f"{i}.cls"] for i in range(2)] == [b"7\n", b"\xff"]
    assert manifest["captions_elsewhere"] == {"replaced": {}, "kept": {}}


def test_hashes_in_a_json_are_those_of_the_published_picture(tmp_path: Path) -> None:
    from hashlib import md5, sha512

    members: dict[str, bytes | str] = {}
    for i in range(4):
        about = {"md5": "old", "key": "old", "sha512": "old", "caption": made.caption(i)}
        members |= {f"{i}.png": made.encoded(i), f"{i}.json": json.dumps(about)}
    protect_dataset(job(shard(tmp_path / "s.tar", members), tmp_path / "out"))
    written = members_of(tmp_path / "out" / "s.tar")
    for i in range(4):
        png, about = written[f"{i}.png"], json.loads(written[f"{i}.json"])
        assert list(about) == ["md5", "key", "sha512", "caption"]
        assert about["md5"] == md5(png).hexdigest() and about["sha512"] == sha512(png).hexdigest()
        assert about["key"] == "old"


def test_another_column_of_a_csv(tmp_path: Path) -> None:
    """Also the caption of another row of the same picture; the command names what it had to leave."""
    table = made.write_csv(tmp_path / "in")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {
            "text": made.caption(99) if row["id"] == "id 0" else row["caption"],
            "title": f"No. 1: {row['caption']}",
        }
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    manifest = protect_dataset(job(table, tmp_path / "out"))
    assert manifest["captions_elsewhere"] == {"replaced": {"text": 7}, "kept": {"title": 7}}
    with (tmp_path / "out" / "train.csv").open(newline="") as file:
        new = list(csv.DictReader(file))
    assert [row["text"] for row in new[1:]] == [row["caption"] for row in new[1:]]
    assert new[0]["text"] == new[6]["caption"] and [row["title"] for row in new] == [row["title"] for row in rows]


def test_the_command_names_what_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made.write_imagefolder(tmp_path / "in")
    table = folder / "metadata.jsonl"
    records = [json.loads(line) for line in table.read_text().splitlines()]
    lines = [
        json.dumps({**record, "alt": {"en": f"{record['text']}, again"}, "raw": [record["text"]]}) for record in records
    ]
    table.write_text("\n".join(lines))
    words = [str(folder), "--out", str(tmp_path / "out"), "--size", "16x16", "--model", "small:16", "--eps", "4"]
    assert cli.main(["protect", *words, "--method", "random-3"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "clean captions stay as parts of other fields: alt.en (6); check them before you publish" in told
    assert "clean captions replaced in other fields: raw (6)" in told and "complete already" not in told
    assert cli.main(["protect", *words, "--method", "random-3"]) == 0
    assert "complete already, nothing was done" in " ".join(capsys.readouterr().out.split())
    written = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [record["raw"] for record in written] == [[record["text"]] for record in written]


def test_columns_of_a_parquet_table(tmp_path: Path) -> None:
    """Text within structs, lists and maps; every type stays, and a column without captions stays as it is."""
    folder = parquet_imagefolder(tmp_path / "in")
    table = parquet.read_table(folder / "metadata.parquet")
    clean = [made.caption(i) for i in range(6)]
    columns = {
        "plain": pyarrow.array(clean, pyarrow.large_string()),
        "view": pyarrow.array(clean, pyarrow.string_view()),
        "struct": pyarrow.array([{"raw": text, "n": i} for i, text in enumerate(clean)]),
        "map": pyarrow.array([[("raw", text)] for text in clean], pyarrow.map_(pyarrow.string(), pyarrow.string())),
        "keys": pyarrow.array([[(text, 1)] for text in clean], pyarrow.map_(pyarrow.string(), pyarrow.int8())),
        "kinds": pyarrow.array(clean).dictionary_encode(),
        "other": pyarrow.array([{"raw": "nothing", "n": i} for i in range(6)]),
    }
    for name, values in columns.items():
        table = table.append_column(name, values)
    parquet.write_table(table, folder / "metadata.parquet")
    manifest = protect_dataset(job(folder, tmp_path / "out"))
    replaced = {"kinds": 6, "map.raw": 6, "plain": 6, "struct.raw": 6, "view": 6}
    assert manifest["captions_elsewhere"] == {"replaced": replaced, "kept": {"keys (its keys)": 6}}
    old, new = (parquet.read_table(path / "metadata.parquet") for path in (folder, tmp_path / "out"))
    assert new.schema.equals(old.schema) and new["other"].equals(old["other"]) and new["keys"].equals(old["keys"])
    published = [texts[0] for texts in new["caption"].to_pylist()]
    assert new["plain"].to_pylist() == new["view"].to_pylist() == new["kinds"].to_pylist() == published
    assert new["struct"].to_pylist() == [{"raw": text, "n": i} for i, text in enumerate(published)]
    assert new["map"].to_pylist() == [[("raw", text)] for text in published]
    assert not any(text.encode() in tree(tmp_path / "out")["manifest.json"] for text in clean)


@pytest.mark.parametrize("method", ["random", "random-3"])
@pytest.mark.parametrize("kind", [pyarrow.string_view(), pyarrow.list_(pyarrow.string_view())])
def test_captions_of_arrow_s_newest_text(tmp_path: Path, kind: Any, method: str) -> None:
    """Which Arrow cannot pick rows of; of these the second has a picture that is left out."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.png").write_bytes(b"none" if i == 1 else made.encoded(i))
    texts = [made.caption(i) if kind == pyarrow.string_view() else [made.caption(i)] for i in range(6)]
    columns = {"file_name": [f"{i}.png" for i in range(6)], "caption": pyarrow.array(texts, kind)}
    parquet.write_table(pyarrow.table(columns), folder / "metadata.parquet")
    protect_dataset(job(folder, tmp_path / "out", method=Method.parse(method), skip_bad=True))
    new = parquet.read_table(tmp_path / "out" / "metadata.parquet")
    assert new.schema.field("caption").type == kind and new.num_rows == 5
    clean = [made.caption(i) for i in range(6) if i != 1]
    for text, old in zip(list_pairs(tmp_path / "out").captions, clean, strict=True):
        assert text.endswith(old) and (text == old) == (method == "random")


@pytest.mark.parametrize("column", ["caption", "kind"])
def test_a_dictionary_with_an_index_of_one_byte(tmp_path: Path, column: str) -> None:
    """As pandas' categories: with triggers there are more texts than such an index counts."""
    folder, n = tmp_path / "in", 150
    folder.mkdir()
    for i in range(n):
        (folder / f"{i}.png").write_bytes(made.encoded(i))
    texts = pyarrow.array([made.caption(i % 10) for i in range(n)])
    few = texts.cast(pyarrow.dictionary(pyarrow.int8(), pyarrow.string()))
    columns = {"file_name": [f"{i}.png" for i in range(n)], "caption": texts, "other": few}
    columns["caption" if column == "caption" else "kind"] = few
    parquet.write_table(pyarrow.table(columns), folder / "metadata.parquet")
    protect_dataset(job(folder, tmp_path / "out", method=Method.parse("random-3")))
    new = parquet.read_table(tmp_path / "out" / "metadata.parquet")
    assert len(set(new[column].to_pylist())) > 128 and new[column].to_pylist() == new["caption"].to_pylist()
    assert list_pairs(tmp_path / "out").captions == new["caption"].to_pylist()


def test_a_column_that_cannot_be_looked_at_is_refused(tmp_path: Path) -> None:
    """Nanoseconds beside a text, which no Python object holds; to train on, the table is as good as any."""
    folder = parquet_imagefolder(tmp_path / "in")
    table = parquet.read_table(folder / "metadata.parquet")
    kind = pyarrow.struct({"text": pyarrow.string(), "at": pyarrow.timestamp("ns")})
    column = pyarrow.array([{"text": "x", "at": 1}] * 6, kind)
    parquet.write_table(table.append_column("odd", column), folder / "metadata.parquet")
    assert list_pairs(folder).bad == []
    if importlib.util.find_spec("pandas"):  # holds them
        protect_dataset(job(folder, tmp_path / "out"))
        assert parquet.read_table(tmp_path / "out" / "metadata.parquet")["odd"].combine_chunks().equals(column)
    else:
        with pytest.raises(ValueError, match=r"column odd: expected text that can be looked at"):
            protect_dataset(job(folder, tmp_path / "out"))
        assert not (tmp_path / "out").exists()
