"""Images from their files to a trained, exported classifier."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from PIL import Image

from rayfed_sub import load_config, run
from rayfed_sub.cli import main
from rayfed_sub.config.schema import Config, Federation, Model, Optimizer, Partition, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import Subspace, wire_bytes
from rayfed_sub.data.batching import collate
from rayfed_sub.data.dataset import build_dataset, load_dataset
from rayfed_sub.data.given import given_rows, given_table
from rayfed_sub.data.images import Images, decoded, digest, encoded, opened
from rayfed_sub.data.pairs import Pairs, distinct
from rayfed_sub.data.readers import Wanted
from rayfed_sub.data.table_pairs import table_pairs
from rayfed_sub.data.tokenization import Cuts, tokenised
from rayfed_sub.export.exported import export_hf, export_peft
from rayfed_sub.models.architecture import architecture, build
from rayfed_sub.models.image_processors import HubImageProcessor, load_image_processor
from rayfed_sub.models.presets import ANY_PATCHES
from rayfed_sub.models.weights import load_weights
from rayfed_sub.planning.job import prepare
from rayfed_sub.planning.needs import need
from rayfed_sub.planning.plan import job_parts, plan_of
from rayfed_sub.planning.worker_memory import backbone_bytes
from rayfed_sub.telemetry.events import Summary
from rayfed_sub.training.inference import predictions
from tests.helpers.pictures import KINDS, album, drawn, filed
from tests.helpers.tiny_models import (
    change,
    dinov2,
    draw_batches,
    galore_start,
    lora_start,
    run_pack,
    run_reference,
    worst,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
DINOV2 = {"type": "dinov2", **SMALL, "mlp_ratio": 2, "image_size": 32, "patch_size": 4, "initializer_range": 0.1}
VIT = {"type": "vit", **SMALL, "intermediate_size": 48, "image_size": 16, "patch_size": 4}
SIGLIP = {"type": "siglip", "vision_config": {**SMALL, "intermediate_size": 48, "image_size": 16, "patch_size": 4}}

GRAY = Image.new("L", (2, 2), 51)
RED = Image.new("RGB", (2, 2), (255, 0, 51))


def table(path: Path, cells: list[Any], labels: list[Any] | None = None, **columns: list[Any]) -> Task:
    """A task over a Parquet file with these image cells."""
    pd.DataFrame({"image": cells, "label": labels or ["a", "b"] * (len(cells) // 2), **columns}).to_parquet(path)
    return Task(name="table", path=str(path), image="image", label="label")


def random_model(numbers: dict[str, Any]) -> Model:
    return Model(path="random", random=numbers)


# --- files and pixels


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP"])
def test_same_pixels_have_one_digest_in_every_lossless_format(kind: str) -> None:
    picture = drawn("disc", 0)
    how = {"lossless": True} if kind == "WEBP" else {}
    assert digest(decoded(filed(picture, kind, **how))) == digest(picture)
    assert digest(decoded(filed(picture.convert("RGB"), "PNG"))) == digest(picture)  # three channels, all gray
    assert digest(decoded(filed(drawn("disc", 1)))) != digest(picture)


def test_other_formats_become_eight_bit_gray_or_rgb() -> None:
    values = np.array([[0, 256], [51 * 256, 65535]], dtype=np.uint16)
    assert np.asarray(decoded(filed(Image.fromarray(values)))).tolist() == [[0, 1], [51, 255]]  # 16 bits
    assert np.asarray(decoded(filed(Image.new("1", (1, 1), 1)))).tolist() == [[255]]
    assert decoded(filed(Image.new("CMYK", (1, 1), (0, 0, 0, 0)), "TIFF")).getpixel((0, 0)) == 255
    assert decoded(filed(RED.convert("P", palette=Image.Palette.ADAPTIVE))).getpixel((0, 0)) == (255, 0, 51)


def test_transparent_pixels_lie_over_white() -> None:
    """Of 51 a share of 1/5 stays: 0.2 * value + 0.8 * 255."""
    faint = Image.new("RGBA", (2, 1), (255, 0, 100, 51))
    assert decoded(filed(faint)).getpixel((0, 0)) == (255, 204, 224)
    assert decoded(filed(Image.new("LA", (1, 1), (100, 51)))).getpixel((0, 0)) == 224
    clear = Image.new("P", (2, 1))
    clear.putpalette([10, 10, 10, 20, 20, 20])
    clear.putpixel((1, 0), 1)
    assert [decoded(filed(clear, "PNG", transparency=0)).getpixel((x, 0)) for x in (0, 1)] == [255, 20]
    gray = Image.new("L", (2, 1), 7)
    gray.putpixel((1, 0), 9)
    assert [decoded(filed(gray, "PNG", transparency=7)).getpixel((x, 0)) for x in (0, 1)] == [255, 9]
    assert [opened(filed(image)).transparent for image in (faint, Image.new("RGBA", (1, 1), "red"), RED)] == [
        True,
        False,
        False,
    ]


def picture_folder(folder: Path) -> dict[str, bytes]:
    """Plain, transparent and 16-bit pictures in folders by class; the brightest 16-bit pixel is 4,000."""
    files = {}
    for number, kind in enumerate(("disc", "cross")):
        picture = drawn(kind, number)
        clear = picture.convert("RGBA")
        clear.putalpha(picture)
        deep = Image.fromarray((np.asarray(picture).astype(np.uint16) * 4).clip(0, 1000))
        bright = np.asarray(deep).copy()
        bright[0, 0] = 4000 if kind == "disc" else 8
        for name, image in {"plain": picture, "clear": clear, "deep": deep, "bright": Image.fromarray(bright)}.items():
            file = folder / kind / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
            files[f"{kind}/{name}"] = file.read_bytes()
    return files


@pytest.mark.parametrize("places", [["disc"], ["train/disc", "test/disc"]], ids=["plain", "of splits"])
def test_a_folder_may_have_images_of_one_class(
    places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number, place in enumerate(places):
        (tmp_path / "set" / place).mkdir(parents=True)
        drawn("disc", number).save(tmp_path / "set" / place / "0.png")
    task = Task(name="table", path=str(tmp_path / "set"), image="image", label="label")
    assert set(table_pairs(task, None).answers) == {"disc"}


def test_folder_and_parquet_give_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = picture_folder(tmp_path / "set")
    task = table(tmp_path / "rows.parquet", list(files.values()), [name.partition("/")[0] for name in files])
    federation = Federation(clients=2, partition=Partition(kind="iid"))
    processor = HubImageProcessor(8, (0.5,) * 3, (0.5,) * 3)
    with caplog.at_level(logging.WARNING):
        one, other = (
            load_dataset(task.model_copy(update={"path": str(path), "test_share": 0.25}), federation, processor, 0)
            for path in (tmp_path / "rows.parquet", tmp_path / "set")
        )
    assert one.fingerprint == other.fingerprint
    assert (one.row_counts.transparent, one.row_counts.deep, one.row_counts.read) == (2, 4, 8)
    messages = [record.getMessage() for record in caplog.records]
    assert [message for message in messages if message.startswith("task.image")] == 2 * [
        "task.image: 2 of 8 images are transparent; over white",
        "task.image: 4 of 8 images have 16 bits; scaled by 4,000, the largest value",
    ]
    pairs = table_pairs(task, None)
    deep = decoded(pairs.images[list(files).index("disc/bright")])
    assert (deep.mode, deep.getpixel((0, 0))) == ("L", 255)
    expected = (np.asarray(Image.open(io.BytesIO(files["cross/deep"]))).astype(int) * 255 + 2000) // 4000
    assert np.array_equal(np.asarray(decoded(pairs.images[list(files).index("cross/deep")])), expected)


def test_photograph_is_rotated_upright() -> None:
    lying = Image.new("L", (4, 2))
    exif = lying.getexif()
    exif[0x0112] = 6  # EXIF: rotate by 90 degrees
    assert decoded(filed(lying, "PNG", exif=exif)).size == (2, 4)


def test_image_that_is_handed_over_is_that_of_its_file() -> None:
    """A PNG would lose the tag that says which side is up, and has no CMYK; a picture of one channel is gray."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for content in (
        filed(drawn("disc", 0), "JPEG", exif=exif),
        filed(drawn("disc", 0).convert("CMYK"), "JPEG"),
        filed(drawn("disc", 0).convert("LAB"), "TIFF"),
    ):
        with Image.open(io.BytesIO(content)) as image:
            assert digest(decoded(encoded(image))) == digest(decoded(content))
    gray = np.asarray(GRAY)
    assert encoded(gray[:, :, None]) == encoded(gray) == encoded(GRAY)


@pytest.mark.parametrize(
    ("cell", "cause"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"an array of the shape \(3, 8, 8\), not \(height, width\)"),
        (np.zeros(8, np.uint8), "an array of the shape"),
        (np.zeros((8, 8), np.float32), "an array of float32, not of uint8"),
        (torch.zeros(3, 8, 8), "a Tensor, not an image"),
        ([[0, 255]], "a list, not an image"),
        (Image.new("F", (2, 2)), "cannot write mode F as PNG"),
    ],
)
def test_what_is_no_image_says_so(cell: Any, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        encoded(cell)
    given = given_rows({"a": [{"p": GRAY, "y": "b"}, {"p": cell, "y": "b"}, {"p": None, "y": "c"}]})
    read = given_table(given, Wanted({"y": "task.label"}, {"p": "task.image"}))
    good, broken, empty = read.column("task.image", "p")
    assert (encoded(good), encoded(empty)) == (encoded(GRAY), b"")
    with pytest.raises(ValueError, match=cause):
        encoded(broken)


@pytest.mark.parametrize(
    "content", [b"", b"no image", filed(drawn("disc", 0))[:80], filed(drawn("disc", 0), "JPEG")[:90]]
)
def test_broken_file_is_reported_with_its_cause(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decoded(content)


def test_no_image_is_in_two_splits(tmp_path: Path) -> None:
    """32 pictures, each three times: as PNG, as BMP and under another label."""
    pictures = [drawn("disc", number) for number in range(32)]
    cells = [*map(filed, pictures), *(filed(picture, "BMP") for picture in pictures), *map(filed, pictures)]
    task = table(tmp_path / "rows.parquet", cells, ["a", "b"] * 32 + ["b", "a"] * 16)
    task = task.model_copy(update={"test_share": 0.25, "validation_share": 0.25})
    federation = Federation(clients=2, partition=Partition(kind="iid"))
    processor = HubImageProcessor(16, (0.5,) * 3, (0.5,) * 3)
    parts = [load_dataset(task, federation, processor, 0, judged) for judged in ("held-out", "validation")]
    splits = [parts[0].train, parts[0].held_out, parts[1].held_out]
    seen = [{pixels.tobytes() for pixels in split.pixels} for split in splits if isinstance(split, Images)]
    assert [len(pixels) for pixels in seen] == [16, 8, 8]
    assert len(set.union(*seen)) == 32


def test_images_that_are_equal_after_scaling_are_in_one_split() -> None:
    """20 gray squares, each also with a left half that is lighter by as much as the right half is darker."""
    plain = [np.full((4, 4), 60 + 5 * i, np.uint8) for i in range(20)]
    halves = np.array([2, 2, -2, -2], np.int64)
    cells = tuple(filed(Image.fromarray((one + sign * halves).astype(np.uint8))) for one in plain for sign in (0, 1))
    names = tuple(digest(decoded(cell)) for cell in cells)
    pairs = Pairs("classification", names, ("a", "b") * 20, ("",) * 40, ("a", "b"), cells)
    shares = Federation(clients=2, partition=Partition(kind="iid"))
    data = build_dataset(pairs, Task(test_share=0.2), shares, HubImageProcessor(1), seed=0)
    assert isinstance(data.train, Images)
    assert isinstance(data.held_out, Images)
    train, held_out = ({int(value) for value in images.pixels.ravel()} for images in (data.train, data.held_out))
    assert len(data.held_out) == 8
    assert train | held_out == {60 + 5 * i for i in range(20)}
    assert not train & held_out


def test_inputs_by_hand() -> None:
    """Gray 51 is 0.2; red (255, 0, 51) is (1, 0, 0.2).  Less the mean, by the deviation."""
    processor = HubImageProcessor(1, mean=(0.2, 0.5, 0.0), std=(0.5, 0.25, 0.1))
    pairs = Pairs("classification", ("x", "y"), ("b", "a"), ("", ""), ("a", "b"), (filed(GRAY), filed(RED)))
    images, kept, cuts = tokenised(pairs, processor, 8)
    assert isinstance(images, Images)
    assert (images.pixels.shape, images.pixels.dtype, kept.tolist(), cuts) == ((2, 3, 1, 1), np.uint8, [0, 1], Cuts())
    batch = collate(images, np.array([1, 0]), mask_prompt=True, pad=0)
    assert batch["labels"].tolist() == [0, 1]
    expected = [[(1 - 0.2) / 0.5, (0 - 0.5) / 0.25, 0.2 / 0.1], [0.0, (0.2 - 0.5) / 0.25, 0.2 / 0.1]]
    torch.testing.assert_close(batch["pixel_values"], torch.tensor(expected)[:, :, None, None])
    assert images.take(np.array([1])).classes.tolist() == [0]


def test_gray_images_are_stored_with_one_channel_and_read_as_three() -> None:
    pairs = Pairs("classification", ("x",), ("a",), ("",), ("a", "b"), (filed(GRAY),))
    images, _, _ = tokenised(pairs, HubImageProcessor(4), 8)
    assert isinstance(images, Images)
    assert images.pixels.tolist() == np.full((1, 1, 4, 4), 51).tolist()
    assert sum(array.nbytes for array in images.arrays) == 16 + 8
    inputs = collate(images, np.array([0]), mask_prompt=True, pad=0)["pixel_values"]
    torch.testing.assert_close(inputs, torch.full((1, 3, 4, 4), (0.2 - 0.5) / 0.5))


def test_whole_image_is_resized_without_a_crop() -> None:
    wide = Image.new("L", (8, 2))
    wide.paste(255, (4, 0, 8, 2))  # the right half is white
    (pixels,) = HubImageProcessor(2).pixels(filed(wide))
    assert (pixels[:, 0] < 30).all()
    assert (pixels[:, 1] > 225).all()


# --- tables


@pytest.mark.parametrize("form", ["bytes", "mapping"])
def test_both_forms_of_cells_are_read(form: str, tmp_path: Path) -> None:
    files = [filed(drawn(kind, 0)) for kind in KINDS]
    cells = files if form == "bytes" else [{"bytes": file, "path": None} for file in files]
    pairs = table_pairs(table(tmp_path / "rows.parquet", cells, list(KINDS)), None)
    assert (pairs.images, pairs.answers, pairs.class_names) == (tuple(files), KINDS, KINDS)
    assert pairs.questions == tuple(digest(drawn(kind, 0)) for kind in KINDS)


def test_datasets_images_have_their_files_and_class_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file and a folder in the form of the hub: an Image column, and classes as numbers with names."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["z", "b"])})
    pictures = [drawn("disc", 0), drawn("cross", 0)]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [1, 0]}, features=features)
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set" / "rows.parquet")
    for path in (tmp_path / "set", tmp_path / "set" / "rows.parquet"):
        pairs = table_pairs(Task(name="table", path=str(path), image="image", label="label"), "label")
        assert pairs.class_names == ("b", "z")
        assert pairs.answers == pairs.keys == ("b", "z")
        assert pairs.questions == tuple(map(digest, pictures))


def test_broken_images_are_skipped_by_name_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = [filed(drawn("disc", i)) for i in range(3)]
    cells = [good[0], b"torn", None, good[1], b"", good[2]]
    names = ["0.png", "1.png", None, "3.png", "4.png", "5.png"]
    with caplog.at_level(logging.WARNING):
        pairs = table_pairs(table(tmp_path / "rows.parquet", cells, ["a", "b"] * 3, file=names), None)
    assert (pairs.images, pairs.answers) == (tuple(good), ("a", "b", "b"))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("task.image: 3 of 6 images cannot be read; skipped: 1.png (cannot identify image")
    assert "row 3 of rows.parquet (empty)" in message
    assert "4.png (empty)" in message


def test_every_broken_image_is_named_by_its_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cells = [{"bytes": filed(GRAY), "path": None}, *({"bytes": b"x", "path": f"{i}.png"} for i in range(5))]
    with caplog.at_level(logging.WARNING):
        table_pairs(table(tmp_path / "rows.parquet", cells), None)
    assert "5 of 6 images" in caplog.text
    assert all(f"{i}.png" in caplog.text for i in range(5))


def test_pixels_of_unknown_range_and_paths_are_refused() -> None:
    """The range of 32-bit pixels is unknown; cut to a byte, different images would become the same."""
    deep = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)).save(deep, format="TIFF")
    with pytest.raises(ValueError, match="32-bit pixels"):
        decoded(deep.getvalue())
    with pytest.raises(ValueError, match=r"'a/b\.png' is text, not an image's bytes"):
        encoded("a/b.png")


def test_rows_without_a_label_are_counted_separately(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cells = [filed(drawn("disc", 0)), filed(drawn("disc", 1)), b"torn", b"torn"]
    with caplog.at_level(logging.WARNING):
        pairs = table_pairs(table(tmp_path / "rows.parquet", cells, ["a", None, "b", None]), None)
    assert pairs.answers == ("a",)
    assert "2 of 4 images cannot be read" in caplog.text
    assert "1 of 4 rows have no label or key; dropped" in caplog.text


def test_broken_images_are_counted_in_thousands(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        table_pairs(table(tmp_path / "rows.parquet", [filed(GRAY), *[b""] * 1001]), None)
    assert "1,001 of 1,002 images cannot be read" in caplog.text


def test_no_image_left(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        table_pairs(table(tmp_path / "rows.parquet", [b"torn", b""]), None)
    assert caught.value.field == "task.image"
    assert "row 1 of rows.parquet (cannot identify" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"label": None}, "task.label"),
        ({"prompt": "{x}"}, "task.prompt"),
        ({"answer": "x"}, "task.answer"),
        ({"image": "x"}, "task.image"),
    ],
)
def test_image_task_accepts_only_a_label(fields: dict[str, Any], field: str, tmp_path: Path) -> None:
    task = table(tmp_path / "rows.parquet", [filed(GRAY), filed(RED)]).model_copy(update=fields)
    with pytest.raises(UserError) as caught:
        table_pairs(task, None)
    assert caught.value.field == field


def test_same_pixels_count_once_in_any_file_and_label(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A disc three times, two of them saved anew, one of these with another label; a cross."""
    disc = drawn("disc", 0)
    cells = [filed(disc), filed(disc, "BMP"), filed(disc, "PNG", compress_level=0), filed(drawn("cross", 0))]
    assert len(set(cells)) == 4
    pairs = table_pairs(table(tmp_path / "rows.parquet", cells, ["round", "round", "flat", "flat"]), None)
    with caplog.at_level(logging.WARNING):
        kept = distinct(pairs)
    assert (kept.images, kept.answers) == ((cells[0], cells[3]), ("round", "flat"))
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 rows have the pixels of a row before them; dropped (1 of them with another label)"
    ]


# --- image processors


def processor(folder: Path, numbers: dict[str, Any], **fields: Any) -> Model:
    """A model's folder with its configuration and, if `fields` are given, that of its image processor."""
    numbers = dict(numbers)
    transformers.AutoConfig.for_model(numbers.pop("type"), **numbers).save_pretrained(folder)
    if fields:
        (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return Model(path=str(folder))


def test_numbers_come_from_the_model_s_processor(tmp_path: Path) -> None:
    fields = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"shortest_edge": 40}}
    model = processor(tmp_path, DINOV2, **fields, crop_size={"height": 24, "width": 24})
    assert load_image_processor(model) == HubImageProcessor(24, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert load_image_processor(model, 12).side == 12


@pytest.mark.parametrize(
    ("numbers", "fields", "expected"),
    [
        (DINOV2, {"size": 20}, HubImageProcessor(20)),  # a plain number, as in older files
        (DINOV2, {"size": {"height": 22, "width": 22}}, HubImageProcessor(20)),  # 5 patches of 4
        (DINOV2, {}, HubImageProcessor(32)),  # no processor: the model's own size
        (VIT, {"size": {"height": 224, "width": 224}}, HubImageProcessor(16)),  # the only size that its positions allow
        (SIGLIP, {}, HubImageProcessor(16)),
        (VIT, {"do_normalize": False}, HubImageProcessor(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))),
        (VIT, {"image_mean": 0.5, "image_std": 1.0}, HubImageProcessor(16, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0))),
        (VIT, {"image_mean": [0.5], "image_std": [1.0]}, HubImageProcessor(16, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0))),
    ],
)
def test_all_forms_of_processor_fields_are_read(
    numbers: dict[str, Any], fields: dict[str, Any], expected: HubImageProcessor, tmp_path: Path
) -> None:
    assert load_image_processor(processor(tmp_path, numbers, **fields)) == expected


def test_processor_of_texts_and_images_has_the_images_part(tmp_path: Path) -> None:
    """As transformers 5 saves CLIP's and SigLIP's; the other file then counts no more."""
    model = processor(tmp_path, SIGLIP, image_mean=0.1, image_std=0.2)
    whole = tmp_path / "processor_config.json"
    whole.write_text(json.dumps({"processor_class": "SiglipProcessor"}))
    assert load_image_processor(model).mean == (0.1, 0.1, 0.1)
    whole.write_text(json.dumps({"image_processor": {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.7, 0.8, 0.9]}}))
    assert load_image_processor(model) == HubImageProcessor(16, (0.4, 0.5, 0.6), (0.7, 0.8, 0.9))


def test_means_that_are_no_colours_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"image_mean and image_std are numbers, one or three"):
        load_image_processor(processor(tmp_path, VIT, image_mean=[0.1, 0.2]))


@pytest.mark.parametrize(
    "fields",
    [
        {"feature_extractor_type": "MobileViTFeatureExtractor", "do_flip_channel_order": True},  # as it is published
        {"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": False},
        {"image_processor_type": "BitImageProcessor", "do_rescale": False},
        {"image_processor_type": "LevitImageProcessorFast", "rescale_factor": 1 / 127.5},
        {"image_processor_type": "ViTImageProcessor", "do_normalize": None},
    ],
    ids=lambda fields: next(iter(fields.values())),
)
def test_values_are_those_that_transformers_gives_the_model(fields: dict[str, Any], tmp_path: Path) -> None:
    """Of the model's own file, and of the one that is exported."""
    from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

    size = {"do_resize": False, "do_center_crop": False, "size": {"height": 16, "width": 16}}
    made = load_image_processor(processor(tmp_path, VIT, **fields, **size))
    image = Image.new("RGB", (16, 16), (250, 100, 5))
    mine = Images.of([made.pixels(filed(image))], [0], made.mean, made.std).inputs(np.array([0]))
    made.save(tmp_path)
    for content in ({**fields, **size}, json.loads((tmp_path / "preprocessor_config.json").read_text())):
        name = content.get("image_processor_type", "MobileViTImageProcessor").removesuffix("Fast")
        theirs = get_image_processor_class_from_name(f"{name}Pil")(
            **{key: value for key, value in content.items() if value is not None}
        )
        np.testing.assert_allclose(mine, theirs(image, return_tensors="np")["pixel_values"], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("numbers", "size", "allowed"),
    [
        (DINOV2, 30, "a multiple of 4, the pixels of a patch of this model; set task.image_size=32"),
        (DINOV2, 1, "a multiple of 4, the pixels of a patch of this model; set task.image_size=4"),
        (VIT, 20, "16, the only size that this model reads; remove it"),
        (SIGLIP, 32, "16, the only size that this model reads; remove it"),
    ],
)
def test_unreadable_sizes_are_refused(numbers: dict[str, Any], size: int, allowed: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_image_processor(random_model(numbers), size)
    assert str(caught.value).startswith(f"task.image_size: got {size}; allowed: {allowed}")


@pytest.mark.parametrize("fields", [{"rescale_offset": True}, {"do_flip_channel_order": True, "image_mean": 0.5}])
def test_values_that_no_mean_gives_are_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.path: got .*; allowed: a model whose images have no rescale_offset"):
        load_image_processor(processor(tmp_path, VIT, **fields))


def test_broken_processor_and_gray_image_model_are_refused(tmp_path: Path) -> None:
    model = processor(tmp_path, VIT)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match=r"model.path: .*preprocessor_config.json can be read; JSONDecodeError"):
        load_image_processor(model)
    with pytest.raises(UserError, match=r"model.path: got 'random'; allowed: .*3 channels; it reads 1"):
        load_image_processor(random_model({**VIT, "num_channels": 1}))


def test_language_model_refuses_images(tmp_path: Path) -> None:
    """Refuse before reading all images as squares of 224 pixels."""
    processor(tmp_path, {"type": "llama", **SMALL})
    allowed = "an architecture that transformers has for image-classification; llama is not one; take another model"
    for model, field in (
        (Model(path=str(tmp_path)), "model.path"),
        (random_model({"type": "llama"}), "model.random.type"),
    ):
        with pytest.raises(UserError) as caught:
            load_image_processor(model)
        assert caught.value.field == field
        assert allowed in str(caught.value)


@pytest.mark.parametrize("name", ANY_PATCHES)
def test_some_models_interpolate_their_positions(name: str) -> None:
    bones = architecture(random_model({**DINOV2, "type": name}), "image-classification", KINDS)
    module = build(bones.hf_config, bones.kind, "cpu")
    for side in (4, 12, 40):
        assert module(torch.zeros(1, 3, side, side)).logits.shape == (1, 4)


@pytest.mark.parametrize("numbers", [VIT, SIGLIP])
def test_other_models_read_their_own_size_only(numbers: dict[str, Any]) -> None:
    bones = architecture(random_model(numbers), "image-classification", KINDS)
    assert [layer.name.split(".")[-1] for layer in bones.shape.targets] == ["fc1", "fc1"]
    assert [layer.name for layer in bones.shape.head] == ["classifier"]
    module = build(bones.hf_config, bones.kind, "cpu")
    assert module(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 4)
    with pytest.raises((ValueError, RuntimeError), match="size"):
        module(torch.zeros(1, 3, 20, 20))


# --- training


def test_pack_of_images_matches_the_reference() -> None:
    """Three clients with different numbers of rows, DINOv2 at another size than its own."""
    tiny, optimizer = dinov2(), Optimizer()
    for start in (lora_start(tiny, 2), galore_start(tiny, Subspace(2, 3))):
        batches = [draw_batches(tiny, client, 4, rows=3 + client) for client in range(3)]
        ours = run_pack(tiny, [start] * 3, batches, optimizer, lr=1e-2)
        theirs = run_reference(tiny, [start] * 3, batches, optimizer, lr=1e-2)
        for one, other in zip(ours, theirs, strict=True):
            assert one.failure is other.failure is None
            deltas = change(tiny, start, one)
            assert worst(deltas, change(tiny, start, other)) < 1e-4
            assert all(delta.norm() > 1e-3 for delta in deltas.values())


def configured(path: str, numbers: dict[str, Any], method: str, **task: Any) -> Config:
    return load_config(
        {
            "model": {"path": "random", "random": numbers},
            "task": {"name": "table", "path": path, "image": "image", "label": "label", "test_share": 0.2, **task},
            "federation": {
                **{"clients": 4, "rounds": 5, "local_steps": 6, "batch_size": 8},
                "partition": {"kind": "dirichlet", "alpha": 5.0},
            },
            "method": {"name": method, "rank": 4},
            "optimizer": {"lr": 0.01},
            "resources": {"workers": 0, "cpus_per_worker": 0.5, "pack_size": 2},
            "evaluation": {"every": 5},
        }
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    return album(tmp_path_factory.mktemp("album") / "rows.parquet", 40)


Runs = Callable[[str], tuple[Summary, Path]]


@pytest.fixture(scope="module")
def runs(pictures: str, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A finished run per method, made on first request."""
    made: dict[str, tuple[Summary, Path]] = {}

    def of(method: str) -> tuple[Summary, Path]:
        if method not in made:
            folder = tmp_path_factory.mktemp("runs") / method
            made[method] = run(configured(pictures, DINOV2, method, image_size=16), folder), folder
        return made[method]

    return of


@pytest.mark.parametrize("method", [pytest.param("fedftg", marks=pytest.mark.slow), "fedit"])
def test_run_learns_to_classify_four_kinds_of_images(method: str, runs: Runs) -> None:
    """Starts near ln 4 = 1.39 nats."""
    summary, _ = runs(method)
    assert summary.metrics["held_out_loss_before"] == pytest.approx(1.39, abs=0.5)
    assert summary.metrics["held_out_loss"] < 0.7


@pytest.mark.slow
def test_model_of_one_size_trains_too(pictures: str, ray_session: None, tmp_path: Path) -> None:
    config = configured(pictures, SIGLIP, "fedit", max_rows=60)
    config = config.model_copy(update={"federation": config.federation.model_copy(update={"rounds": 1})})
    summary = run(config, tmp_path / "run")
    assert summary.metrics["held_out_loss"] < summary.metrics["held_out_loss_before"]


@pytest.mark.parametrize("numbers", [DINOV2, VIT, SIGLIP])
def test_run_of_images_is_planned(numbers: dict[str, Any], pictures: str) -> None:
    """The data set: 32 of 160 rows are held out; all are gray squares of 16 x 16 with an int64 class."""
    size = {"image_size": 16} if numbers is DINOV2 else {}
    job = prepare(configured(pictures, numbers, "fedftg", **size))
    planned = plan_of(job)
    assert planned.rows.side == 16
    assert planned.data >= 160 * (16 * 16 + 8)
    assert planned.worker.process > planned.worker.tensors > 0
    assert backbone_bytes(job.architecture) == wire_bytes(load_weights(job.config.model, job.architecture, seed=0))


def test_plan_counts_pixels(
    pictures: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.json"  # JSON is YAML
    file.write_text(configured(pictures, VIT, "fedit").model_dump_json(exclude_none=True))
    monkeypatch.setattr(sys, "argv", ["rayfed-sub", "plan", str(file)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code in (0, None)
    assert "16 x 16 pixels" in capsys.readouterr().out


def test_more_pixels_take_more_memory(pictures: str) -> None:
    small, large = (
        need(job_parts(prepare(configured(pictures, DINOV2, "fedit", image_size=side)))).worker(2) for side in (16, 32)
    )
    assert large.tensors > 2 * small.tensors


@pytest.mark.parametrize("form", ["hf", "peft"])
def test_exported_run_has_the_measured_loss(form: str, runs: Runs, tmp_path: Path) -> None:
    summary, folder = runs("fedit")
    if form == "hf":
        export_hf(folder, tmp_path / "out")
        model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        assert model.config.id2label == dict(enumerate(KINDS))
        assert model.config.label2id == {kind: number for number, kind in enumerate(KINDS)}
    else:
        from peft import PeftModel

        export_peft(folder, tmp_path / "out")
        base = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "base")
        model = PeftModel.from_pretrained(base, tmp_path / "out")
    job = prepare(load_config(folder / "config.yaml"))
    held_out = job.dataset.held_out
    batch = collate(held_out, np.arange(len(held_out)), mask_prompt=True, pad=0)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"])
    assert float(loss) == pytest.approx(summary.metrics["held_out_loss"], rel=1e-4)


def test_exported_processor_matches_the_run(runs: Runs, pictures: str, tmp_path: Path) -> None:
    _, folder = runs("fedit")
    export_hf(folder, tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (fields["size"], fields["image_mean"]) == ({"height": 16, "width": 16}, [0.5, 0.5, 0.5])
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", use_fast=False)
    picture = drawn("disc", 3)
    expected = theirs(images=picture.convert("RGB"), return_tensors="np")["pixel_values"]
    processor = load_image_processor(Model(path=str(tmp_path / "out")), 16)
    pixels = processor.pixels(filed(picture))[None]
    ours = Images(pixels, np.zeros(1, np.int64), np.float32(processor.mean), np.float32(processor.std)).inputs(
        np.array([0])
    )
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_image_size_without_images_is_refused() -> None:
    with pytest.raises(UserError, match=r"task.image_size: got 16; allowed: nothing where the task has no images"):
        prepare(load_config({"task": {"image_size": 16}}))


def test_named_task_of_images(tmp_path: Path) -> None:
    """Its classes are numbers, as in its file; the default column is the class itself."""
    cells = [filed(drawn(kind, number)) for number in range(6) for kind in KINDS]
    table(tmp_path / "rows.parquet", cells, [3, 0, 1, 2] * 6)
    task = Task(name="brain-tumor", path=str(tmp_path / "rows.parquet"))
    dataset = load_dataset(task, Federation(clients=4), load_image_processor(random_model(VIT)), seed=0)
    assert dataset.class_names == ("glioma", "meningioma", "notumor", "pituitary")
    assert dataset.client_names == dataset.class_names
    assert dataset.train.pixels.shape == (24 - 2, 1, 16, 16)  # type: ignore[union-attr]
    for client, name in enumerate(dataset.client_names):
        assert set(dataset.train.classes[dataset.rows_of(client)]) == {dataset.class_names.index(name)}


def test_pixels_have_the_model_s_dtype() -> None:
    """BEiT's first layer is a convolution that needs bfloat16 input; ViT converts it itself."""
    numbers = {"type": "beit", **SMALL, "intermediate_size": 48, "image_size": 16, "patch_size": 4}
    bones = architecture(random_model(numbers), "image-classification", ("a", "b"))
    model = build(bones.hf_config, "image-classification").to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    batch = {"pixel_values": torch.rand(3, 3, 16, 16), "labels": torch.tensor([0, 1, 1])}
    assert [prediction.labels for prediction in predictions(model, batch, 0)] == [(0,), (1,), (1,)]
