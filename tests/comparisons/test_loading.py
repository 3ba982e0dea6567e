"""Data sets from files: what is read, and one clear error with file, line and field for each that is malformed."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from comparisons.dataset import Dataset, Media, Row, split
from comparisons.loading import Defaults, as_line, load
from models.errors import BadRequest, InvalidValue
from models.request import GenerationSettings, ImagePart, JsonFormat, TextPart


def picture(side: int = 8, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(stream, kind)
    return stream.getvalue()


def written(folder: Path, *lines: object, name: str = "data.jsonl") -> Path:
    """A file of JSON lines beside a picture `a.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.png").write_bytes(picture())
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def read(path: Path, **defaults: Any) -> Dataset:
    return load(path, Defaults(**defaults))


ROW = {"image": "a.png", "prompt": "What color is it?", "reference": "red"}


def test_a_line_says_what_is_asked_what_is_right_and_where_it_counts(tmp_path):
    line = {"id": "r1", "slices": {"light": "dark", "dirt": 2}, "detail": "low", "source": "elsewhere", **ROW}
    (row,) = read(written(tmp_path, line, "")).rows
    assert (row.row_id, row.references, row.measure, row.slices) == ("r1", ("red",), "exact", ("light=dark", "dirt=2"))
    request = row.request(GenerationSettings(), "auto")
    assert request.detail == "low"
    shown, text = request.messages[0].parts
    assert isinstance(shown, ImagePart)
    assert isinstance(text, TextPart)
    assert (shown.data, text.text) == (picture(), "What color is it?")


def test_pictures_come_from_the_files_folder_another_folder_or_the_line_itself(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    path = written(tmp_path / "lines", {**ROW, "image": None, "images": [url, "b.png"]})
    with pytest.raises(BadRequest, match=r"data.jsonl line 1, image: b.png is not there"):
        read(path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "b.png").write_bytes(picture(9))
    (row,) = read(path, images=tmp_path / "pictures").rows
    assert [media.read() for media in row.images] == [picture(), picture(9)]


def test_a_document_or_a_video_may_be_asked_about_instead(tmp_path):
    golden = Path(__file__).parents[1] / "models" / "golden"
    for name in ("clip.webm", "short.mp4", "clip.gif"):
        (tmp_path / name).write_bytes((golden / name).read_bytes())
    Image.new("RGB", (8, 8)).save(tmp_path / "p.tiff")
    lines = [{"video": name, "prompt": "?"} for name in ("clip.webm", "short.mp4", "clip.gif")]
    rows = read(written(tmp_path, *lines, {"document": "p.tiff", "task": "document"})).rows
    assert [bool(row.video) for row in rows] == [True, True, True, False]
    parts = rows[3].request(GenerationSettings(), "auto").messages[0].parts
    assert [type(part).__name__ for part in parts] == ["DocumentPart", "TextPart"]


def test_references_may_be_several_numbers_or_objects_and_the_measure_follows(tmp_path):
    answers = [["red", "Red!"], 5, {"count": 2}, None, ["red", "star"]]
    lines = [{**ROW, "reference": answer} for answer in answers[:4]] + [
        {**ROW, "reference": answers[4], "measure": "mentions"}
    ]
    rows = read(written(tmp_path, *lines)).rows
    assert [(row.measure, row.references) for row in rows] == [
        ("exact", ("red", "Red!")),
        ("exact", ("5",)),
        ("json", ('{"count": 2}',)),
        ("exact", ()),
        ("mentions", ('["red", "star"]',)),
    ]
    assert rows[0].score("red").correct
    assert rows[3].score("red") is None


def test_a_schema_a_tolerance_and_defaults_for_rows_that_say_nothing(tmp_path):
    schema = {"type": "object", "properties": {"n": {"type": "number"}}}
    path = written(
        tmp_path,
        {"image": "a.png", "reference": 100, "tolerance": 0.05, "measure": "number"},
        {**ROW, "schema": schema},
    )
    bare, formed = read(path, prompt="How many?", measure="contains").rows
    assert (bare.prompt, formed.prompt, formed.measure) == ("How many?", "What color is it?", "contains")
    assert bare.score("104").correct
    assert not bare.score("106").correct
    assert formed.output == JsonFormat(schema=schema)
    (row,) = read(written(tmp_path, {"image": "a.png", "reference": "x"}), task="ocr").rows
    assert (row.measure, row.task, row.prompt) == ("anls", "ocr", None)


def test_a_folder_is_its_metadata_or_its_pictures_with_texts_beside_them(tmp_path):
    written(tmp_path / "listed", {"file_name": "a.png", "prompt": "?", "reference": "x"}, name="metadata.jsonl")
    dataset = read(tmp_path / "listed")
    assert (dataset.name, dataset.rows[0].references) == ("listed", ("x",))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("b.png", "a.jpg"):
        (folder / name).write_bytes(picture(kind="JPEG" if name.endswith("jpg") else "PNG"))
    (folder / "b.txt").write_text("a red square\n")
    rows = read(folder, task="caption").rows
    assert [(row.row_id, row.references) for row in rows] == [("a.jpg", ()), ("b.png", ("a red square",))]
    with pytest.raises(BadRequest, match=r"pictures picture 1, prompt: is missing"):
        read(folder)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadRequest, match=r"neither metadata\.jsonl nor pictures\. It holds parquet"):
        read(tmp_path / "none")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "data.jsonl has no rows"),
        (["", "  "], "data.jsonl has no rows"),
        ([ROW, "{not json"], "data.jsonl line 2: is not JSON"),
        ([ROW, "[1]"], "data.jsonl line 2: is no JSON object"),
        ([ROW, {**ROW, "prompt": 5}], "data.jsonl line 2, prompt: Input should be a valid string"),
        ([{**ROW, "prompt": " "}], "data.jsonl line 1, prompt: is missing"),
        ([{**ROW, "promt": "?"}], "line 1, promt: there is no such field; did you mean prompt"),
        ([{**ROW, "refrence": "?"}], "line 1, refrence: there is no such field; did you mean reference"),
        ([{**ROW, "measure": "best"}], "line 1, measure: Input should be 'exact'"),
        ([{**ROW, "task": "sing"}], "line 1, task: "),
        ([{**ROW, "reference": True}], "line 1, reference: must be a text"),
        ([{**ROW, "reference": []}], "line 1, reference: must be a text"),
        ([{**ROW, "reference": ["red", None]}], "line 1, reference: must be a text"),
        ([{**ROW, "reference": "  "}], "line 1, reference: measure exact takes text"),
        ([{**ROW, "reference": "red", "measure": "number"}], "line 1, reference: measure number takes a number"),
        ([{**ROW, "reference": "red", "measure": "json"}], "line 1, reference: measure json takes a JSON object"),
        ([{**ROW, "image": "gone.png"}], "line 1, image: gone.png is not there"),
        ([{**ROW, "image": "data.jsonl"}], "line 1, image: data.jsonl is none of JPEG, PNG, WEBP, GIF"),
        ([{**ROW, "image": "https://x/a.png"}], "line 1, image: is an address"),
        ([{**ROW, "image": "data:image/png;base64,????"}], "line 1, image: a data URL must read"),
        ([{**ROW, "image": "data:image/png;base64,QUJD"}], "line 1, image: it is none of JPEG"),
        ([{**ROW, "image": None, "document": "a.png"}], "line 1, document: a.png is none of PDF, TIFF"),
        ([{**ROW, "images": ["a.png"] * 16}], "line 1, images: 17 pictures, at most 16"),
        ([{**ROW, "tolerance": -1}], "line 1, tolerance: "),
        ([{**ROW, "slices": [1]}], "line 1, slices: "),
        ([{**ROW, "id": 1}, {**ROW, "id": "1"}], "data: the id '1' is given to more than one row"),
    ],
)
def test_what_is_malformed_is_named_by_file_line_and_field(tmp_path, lines, said):
    with pytest.raises(BadRequest) as raised:
        read(written(tmp_path, *lines))
    assert said in raised.value.message
    assert "\n" not in raised.value.message


def test_bytes_that_are_no_text_and_files_of_no_known_layout_are_refused(tmp_path):
    path = written(tmp_path, ROW)
    path.write_bytes(path.read_bytes() + b"\n\xff\xfe")
    with pytest.raises(BadRequest, match=r"data.jsonl line 2: is not UTF-8"):
        read(path)
    other = tmp_path / "other.json"
    for content, said in (
        ("[1, 2]", "no list of objects"),
        ('{"data": []}', "other.json has no rows"),
        ('[{"a": 1}]', "in no layout that is known"),
    ):
        other.write_text(content)
        with pytest.raises(BadRequest, match=said):
            read(other)


# Published layouts, as tiny files of our own.


def test_textvqa_counts_what_three_people_said_as_right(tmp_path):
    folder = tmp_path / "train_images"
    folder.mkdir()
    (folder / "abc123.jpg").write_bytes(picture(kind="JPEG"))
    record = {"question": "what does it say?", "image_id": "abc123", "question_id": 7, "image_classes": ["Sign"]}
    answers = ["stop"] * 4 + ["halt"] * 3 + ["go"] * 2 + ["nothing"]
    path = tmp_path / "TextVQA_0.5.1_val.json"
    path.write_text(json.dumps({"dataset_name": "textvqa", "data": [{**record, "answers": answers}]}))
    (row,) = read(path).rows
    assert (row.row_id, row.references, row.measure) == ("7", ("stop", "halt"), "exact")
    assert row.images[0].read() == picture(kind="JPEG")
    path.write_text(json.dumps({"data": [{**record, "answers": answers}, {**record, "question": ""}]}))
    with pytest.raises(BadRequest, match=r"TextVQA_0.5.1_val.json record 2, prompt: is missing"):
        read(path)


def test_docvqa_takes_any_of_its_answers_by_anls(tmp_path):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "p_1.png").write_bytes(picture())
    record = {
        "questionId": 337, "question": "what is the date?", "question_types": ["handwritten", "form"],
        "image": "documents/p_1.png", "docId": 279, "ucsf_document_id": "x", "ucsf_document_page_no": "1",
        "answers": ["1/8/93", "1/8/1993"], "data_split": "val",
    }  # fmt: skip
    path = tmp_path / "val_v1.0.json"
    path.write_text(json.dumps({"dataset_name": "docvqa", "dataset_version": "1.0", "data": [record]}))
    dataset = read(path)
    (row,) = dataset.rows
    assert dataset.name == "docvqa-val_v1.0"
    assert "UCSF" in dataset.licence
    assert (row.measure, row.slices) == ("anls", ("question_type=handwritten", "question_type=form"))
    assert row.score("1/8/1993").score == 1.0
    assert 0 < row.score("1/8/1994").score < 1


def test_chartqa_takes_numbers_within_five_percent_and_words_as_they_are(tmp_path):
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / "41.png").write_bytes(picture())
    records = [{"imgname": "41.png", "query": "How much?", "label": label} for label in ("200", "Blue")]
    path = tmp_path / "test_human.json"
    path.write_text(json.dumps(records))
    number, word = read(path).rows
    assert [number.score(text).correct for text in ("209", "211", "two hundred")] == [True, False, False]
    assert [word.score(text).correct for text in ("blue", "Red")] == [True, False]


def test_mmbench_asks_for_a_letter_and_its_pictures_lie_in_the_table(tmp_path):
    inside = base64.b64encode(picture(kind="JPEG")).decode()
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category", "split"]
    values = ["241", "Which is it?", '"Look\nwell."', "a cat", "a dog", "", "", "B", "animals", inside, "coarse", "dev"]
    path = tmp_path / "MMBench_DEV_EN.tsv"
    path.write_text("\t".join(columns) + "\n" + "\t".join(values) + "\n")
    (row,) = read(path).rows
    asked = "Look\nwell.\nWhich is it?\nA. a cat\nB. a dog\nAnswer with the letter of the right option alone."
    assert row.prompt == asked
    assert row.slices == ("category=animals", "l2-category=coarse")
    assert [row.score(text).correct for text in ("B", "b. a dog", "A")] == [True, True, False]
    path.write_text("\t".join(columns[:-3]) + "\n")
    with pytest.raises(BadRequest, match="has no rows"):
        read(path)


def test_pope_asks_yes_or_no_about_objects(tmp_path):
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "COCO_1.jpg").write_bytes(picture(kind="JPEG"))
    lines = [
        {"question_id": number, "image": "COCO_1.jpg", "text": "Is there a dog in the image?", "label": label}
        for number, label in enumerate(("yes", "no"), 1)
    ]
    path = written(tmp_path, *lines, name="coco_pope_random.json")
    yes, no = read(path).rows
    assert yes.prompt == "Is there a dog in the image? Answer yes or no."
    assert (yes.slices, no.slices) == (("right=yes",), ("right=no",))
    assert no.score("No, there is no dog.").correct
    assert not no.score("Yes").correct


def test_a_row_that_was_read_can_be_written_and_read_elsewhere_as_the_same(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(picture())
    embedded = f"data:image/png;base64,{base64.b64encode(picture(9)).decode()}"
    lines = [
        {"image": "a.png", "prompt": "Which color?", "reference": ["red", "rouge"], "slices": {"kind": "color"}},
        {"id": "7b", "images": ["a.png", embedded], "prompt": "Read.", "reference": 4.5, "measure": "number",
         "tolerance": 0.1, "detail": "low"},
        {"image": "a.png", "prompt": "As JSON.", "reference": {"a": [1]}, "schema": {"type": "object"}},
        {"image": "a.png", "task": "caption"},
    ]  # fmt: skip
    first = read(written(tmp_path / "data", *lines))
    elsewhere = tmp_path / "held_out.jsonl"
    elsewhere.write_text("".join(f"{as_line(row)}\n" for row in first.rows))
    assert read(elsewhere).fingerprint == first.fingerprint
    assert [row.slices for row in read(elsewhere).rows] == [row.slices for row in first.rows]


def drawn_rows(count: int, **slices: int) -> Dataset:
    """Two questions about every picture; of each slice as many pictures as it says, in turn."""
    names = [name for name, pictures in slices.items() for _ in range(pictures)]
    rows = [
        Row(row_id=f"{at}{part}", prompt=part, images=(Media(source=f"{at}".encode()),), slices=(name,))
        for at, name in enumerate(names)
        for part in "ab"
    ]
    assert len(rows) == count
    return Dataset(name="drawn", rows=tuple(rows), licence="none")


def test_a_share_set_apart_keeps_pictures_whole_and_slices_in_proportion():
    dataset = drawn_rows(220, rare=10, common=100)
    kept, apart = split(dataset, 0.2, seed=3)
    assert {*kept, *apart} == {*dataset.rows}
    assert not {row.images for row in kept} & {row.images for row in apart}
    assert [sum(row.slices == (name,) for row in apart) for name in ("rare", "common")] == [4, 40]
    assert split(dataset, 0.2, seed=3) == (kept, apart)
    assert split(dataset, 0.2, seed=4) != (kept, apart)
    assert split(dataset, 0.0, seed=3) == (dataset.rows, ())


def test_slices_of_one_picture_each_give_their_share_together():
    kept, apart = split(drawn_rows(40, **{f"slice{number}": 1 for number in range(20)}), 0.25, seed=0)
    assert (len(kept), len(apart)) == (30, 10)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(InvalidValue, match="a share is a number from 0 to below 1"):
        split(drawn_rows(2, one=1), share, seed=0)
