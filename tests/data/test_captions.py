"""Captions: whose a text or a row is, which counts, and what is told of the rest."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from delora_diffusion.data.captions import read_captions
from delora_diffusion.data.image_files import DataError
from delora_diffusion.data.photos import instance_examples

from .. import tiny
from .test_photos import config, folder_of, noise, saved

# ---- captions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts, prompt, caption",
    [
        (
            {"a_txt": "from text\n", "metadata_jsonl": '{"file_name": "a.png", "text": "listed"}'},
            "prompt",
            "from text",
        ),
        ({"metadata_jsonl": '{"file_name": "a.png", "text": " listed "}'}, "prompt", "listed"),
        ({"metadata_jsonl": '\n{"file_name": "a.png", "caption": "listed"}\n\n'}, None, "listed"),
        ({"metadata_jsonl": '{"file_name": "a.png", "prompt": "listed"}'}, None, "listed"),
        ({"metadata_jsonl": '{"file_name": "b.png", "text": "another"}'}, "prompt", "prompt"),
        ({"b_txt": "another"}, "prompt", "prompt"),
        ({"a_txt": "\ufeffein Hund, süß"}, None, "ein Hund, süß"),
        ({"metadata_jsonl": '\ufeff{"file_name": "a.png", "text": "süß"}'}, None, "süß"),
    ],
)
def test_a_caption_is_the_text_beside_else_the_metadata_else_the_prompt(
    texts: dict[str, str], prompt: str | None, caption: str, tmp_path: Path
) -> None:
    (example,) = instance_examples(config(folder_of(tmp_path, **texts), instance_prompt=prompt), seed=0)
    assert example.caption == caption and example.weight == 1.0


@pytest.mark.parametrize(
    "texts, said",
    [
        ({}, "a.png has no caption: there is none; give instance_prompt, write a.txt, or use metadata.jsonl"),
        ({"a_txt": " \n"}, "a.png has no caption: a.txt is empty"),
        ({"metadata_jsonl": '{"file_name": "a.png", "text": ""}'}, "a.png has no caption"),
        ({"metadata_jsonl": '{"file_name": "a.png", "text": "x"}\n{"file_name'}, "metadata.jsonl line 2 is not"),
        ({"metadata_jsonl": '{"file": "a.png", "text": "x"}'}, "metadata.jsonl line 1 is not"),
        ({"metadata_jsonl": '{"file_name": "a.png"}'}, "metadata.jsonl line 1 is not"),
        ({"metadata_jsonl": '{"file_name": "a.png", "text": 3}'}, "metadata.jsonl line 1 is not"),
        ({"metadata_jsonl": '["a.png", "x"]'}, "metadata.jsonl line 1 is not"),
        ({"metadata_jsonl": '{"file_name": ["a.png"], "text": "x"}'}, "metadata.jsonl line 1 is not"),
    ],
)
def test_a_photo_without_a_usable_caption_is_named(texts: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        instance_examples(config(folder_of(tmp_path, **texts), instance_prompt=None), seed=0)
    assert said in str(refused.value)


def test_an_empty_text_file_is_not_overruled_by_the_prompt(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.txt is empty"):
        instance_examples(config(folder_of(tmp_path, a_txt=""), instance_prompt="prompt"), seed=0)


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
def test_text_that_is_not_utf8_is_named(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / name).write_bytes("süß".encode("latin-1"))
    with pytest.raises(DataError, match=rf"cannot read .*{name}.*save it as UTF-8"):
        instance_examples(config(folder), seed=0)


def test_each_photo_has_its_own_caption(tmp_path: Path) -> None:
    paths = tiny.photos(tmp_path, 3)
    lines = [json.dumps({"file_name": path.name, "text": f"listed {path.stem}"}) for path in reversed(paths)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "01.txt").write_text("beside 01")
    captions = read_captions(tmp_path, paths, default="prompt").texts
    assert [captions[path] for path in paths] == ["listed 00", "beside 01", "listed 02"]


# ---- names and forms as people write them -----------------------------------------------------------

ROW = '{"file_name": "%s", "text": "written"}'
CSV = "file_name,text\na.png,written\n"
#: name of the photo, name of the file with its caption, what that holds
MEANT = {
    "text ending in capitals": ("a.png", "a.TXT", "written"),
    "text in another case": ("IMG_1.JPG", "img_1.txt", "written"),
    "text after the whole name": ("a.png", "a.png.txt", "written"),
    "kohya's ending": ("a.png", "a.caption", "written"),
    "text in another Unicode form": (unicodedata.normalize("NFC", "hündin.png"), "hu\u0308ndin.txt", "written"),
    "row with ./": ("a.png", "metadata.jsonl", ROW % "./a.png"),
    "row with a folder": ("a.png", "metadata.jsonl", ROW % "train/a.png"),
    "row from Windows": ("a.png", "metadata.jsonl", ROW % r"C:\\dogs\\a.png"),
    "row with the whole path": ("a.png", "metadata.jsonl", ROW % "/data/dogs/a.png"),
    "row in another case": ("a.png", "metadata.jsonl", ROW % "A.PNG"),
    "row of another image format": ("a.png", "metadata.jsonl", ROW % "a.jpg"),
    "row without an ending": ("a.png", "metadata.jsonl", ROW % "a"),
    "row in another Unicode form": ("hu\u0308ndin.png", "metadata.jsonl", ROW % "hündin.png"),
    "list in capitals": ("a.png", "Metadata.JSONL", ROW % "a.png"),
    "list of another name": ("a.png", "captions.jsonl", ROW % "a.png"),
    "the same row twice": ("a.png", "metadata.jsonl", ROW % "a.png" + "\n" + ROW % "./a.png"),
    "csv": ("a.png", "metadata.csv", CSV),
    "csv from Excel": ("a.png", "metadata.csv", "\ufefffile_name;text\r\na.png;written\r\n"),
    "csv with quotes": ("a.png", "metadata.csv", 'text,file_name\n"written","a.png"\n'),
    "tsv": ("a.png", "metadata.tsv", CSV.replace(",", "\t")),
    "json: rows": ("a.png", "metadata.json", f"[{ROW % 'a.png'}]"),
    "json: one row": ("a.png", "metadata.json", ROW % "a.png"),
    "json: texts by name": ("a.png", "metadata.json", '{"a.png": "written"}'),
    "json: rows by name": ("a.png", "metadata.json", '{"/x/a": {"caption": "written", "tags": "dog"}}'),
    "json that is jsonl": ("a.png", "metadata.json", f"{ROW % 'a.png'}\n{ROW % 'b.png'}"),
}


@pytest.mark.parametrize("form", MEANT)
def test_a_caption_is_found_as_it_is_meant(form: str, tmp_path: Path) -> None:
    name, list_name, content = MEANT[form]
    photo = saved(tmp_path / name, Image.fromarray(noise()))
    (tmp_path / list_name).write_text(content, encoding="utf-8", newline="")
    captions = read_captions(tmp_path, [photo], default="prompt")
    assert captions.texts == {photo: "written"}
    assert len(captions.unused) == (form == "json that is jsonl")
    source = "text files" if "text" in form.split() or "kohya" in form else list_name
    assert captions.sources == {photo: source} and str(captions) == f"captions: 1 from {source}"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_a_text_may_hold_what_unicode_calls_the_end_of_a_line(separator: str, tmp_path: Path) -> None:
    text = f"a dog{separator}in the snow"
    row = json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=ord(separator) < 32)
    folder = folder_of(tmp_path, metadata_jsonl=f"{row}\n{ROW % 'b.png'}\n")
    assert read_captions(folder, [folder / "a.png"], default=None).texts == {folder / "a.png": text}
    quoted = folder_of(tmp_path / "csv", metadata_csv=f'file_name,text\na.png,"a dog\nin the{separator} snow"\n')
    assert read_captions(quoted, [quoted / "a.png"], default=None).texts == {
        quoted / "a.png": f"a dog\nin the{separator} snow"
    }


@pytest.mark.parametrize(
    "texts, unused",
    [
        ({"b_txt": "x"}, "b.txt (no photo here is called b)"),
        ({"metadata_jsonl": ROW % "zzz.png"}, "metadata.jsonl line 1 (no photo here is called zzz.png)"),
        ({"metadata_csv": "file_name,text\n\nb.png,x"}, "metadata.csv line 3 (no photo here is called b.png)"),
        (
            {"a_txt": "another", "metadata_jsonl": ROW % "a.png"},
            "metadata.jsonl line 1 (a.txt has another caption of a.png, which counts)",
        ),
    ],
)
def test_a_caption_that_is_no_photos_is_named(texts: dict[str, str], unused: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, **texts)
    assert read_captions(folder, [folder / "a.png"], default="prompt").unused == [unused]


def test_a_name_that_fits_several_photos_is_nobodys_and_the_exact_one_counts(tmp_path: Path) -> None:
    photos = [saved(tmp_path / name, Image.fromarray(noise())) for name in ("IMG.png", "img.png", "b.jpg", "b.png")]
    (tmp_path / "Img.txt").write_text("unclear")
    (tmp_path / "img.txt").write_text("exact")
    (tmp_path / "b.txt").write_text("of both")
    (tmp_path / "metadata.jsonl").write_text(f"{ROW % 'Img.png'}\n{ROW % 'b.webp'}")
    captions = read_captions(tmp_path, photos, default="prompt")
    assert [captions.texts[path] for path in photos] == ["prompt", "exact", "of both", "of both"]
    assert [text.partition(" (")[0] for text in captions.unused] == [
        "Img.txt", "metadata.jsonl line 1", "metadata.jsonl line 2"
    ]  # fmt: skip


def test_a_row_of_a_photo_in_a_sub_folder_is_not_taken_for_one_of_the_same_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, metadata_jsonl=ROW % "sub/a.png")
    assert read_captions(folder, [folder / "a.png"], default=None).texts == {folder / "a.png": "written"}
    saved(folder / "sub" / "a.png", Image.fromarray(noise()))
    captions = read_captions(folder, [folder / "a.png"], default="prompt")
    assert captions.texts == {folder / "a.png": "prompt"} and "sub/a.png" in captions.unused[0]


def test_a_linked_photo_is_one_of_the_folder_it_is_linked_into(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, metadata_jsonl=ROW % "b.png")
    (folder / "b.png").symlink_to(saved(tmp_path / "elsewhere.png", Image.fromarray(noise())))
    assert read_captions(folder, [folder / "b.png"], default=None).texts == {folder / "b.png": "written"}


@pytest.mark.parametrize(
    "texts, said",
    [
        ({"a_txt": "one", "a_caption": "other"}, "'one' in a.txt"),
        ({"a_txt": "one", "a_TXT": "other"}, "a.png has two captions: "),
        ({"metadata_jsonl": ROW % "a.png" + '\n{"file_name": "a.png", "text": "other"}'}, "'other' in metadata.jsonl"),
        ({"metadata_jsonl": ROW % "a.png", "metadata_csv": "file_name,text\na.png,other"}, "a.png has two captions"),
        ({"metadata_json": '{"a.png": "one", "a.png": "other"}'}, "metadata.json line 1 is not"),
        ({"metadata_jsonl": '{"file_name": "a.png", "text": "x", "text": "y"}'}, "metadata.jsonl line 1 is not"),
        ({"metadata_jsonl": "[" * 100_000}, "metadata.jsonl line 1 is not"),
        ({"metadata_csv": "file_name,text\na.png,a dog, on the beach"}, "metadata.csv line 2 is not"),
        ({"metadata_csv": "file_name,text\na.png"}, "metadata.csv line 2 is not"),
        ({"metadata_csv": "image,text\na.png,x"}, "metadata.csv has the columns 'image,text'; it needs file_name and"),
        ({"metadata_csv": ""}, "metadata.csv has the columns ''"),
        ({"metadata_csv": f"file_name,text\na.png,{'x' * 200_000}"}, "field larger than"),
        ({"metadata_json": "3"}, "metadata.json row 1 is not"),
    ],
)  # fmt: skip
def test_captions_that_contradict_each_other_or_are_broken_are_refused(
    texts: dict[str, str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as refused:
        instance_examples(config(folder_of(tmp_path, **texts)), seed=0)
    assert said in str(refused.value)
