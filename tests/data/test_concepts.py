"""Several concepts, kohya's folders and TOML, captions with places and tags: what comes of them as examples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from delora_diffusion.data.concepts import expanded_prompts, orders_of
from delora_diffusion.data.config import DataConfig
from delora_diffusion.data.image_files import DataError
from delora_diffusion.data.photos import class_captions, class_examples, instance_examples
from delora_diffusion.options import OptionError, parse
from delora_diffusion.training.check import Checked
from delora_diffusion.training.config import GROUPS
from delora_diffusion.training.diffusers_flags import DiffusersFlags
from delora_diffusion.training.loss import Examples, picks

from .. import tiny


def shaped(folder: Path) -> DataConfig:
    """Two concepts and images of a class, of 2, 3 and 2 photos."""
    for seed, (name, count) in enumerate({"dog": 2, "cat": 3, "class": 2}.items()):
        tiny.photos(folder / name, count, seed=seed)
    (folder / "dog" / "00.txt").write_text("[trigger] dog beside a [cat] cat, [sic]")
    return DataConfig(
        resolution=16,
        prior_loss_weight=0.5,
        concepts={
            "dog": {"folder": str(folder / "dog"), "prompt": "a [trigger] dog", "trigger": "sks", "repeats": "3"},
            "cat": {"folder": str(folder / "cat"), "trigger": "zwx", "weight": "2"},
            "cats": {"folder": str(folder / "class"), "prompt": "a cat", "role": "class"},
        },
    )


def examples(config: DataConfig, **more: Any) -> Examples:
    return Examples(
        instances=instance_examples(config, seed=0), classes=class_examples(config, seed=0), latents={},
        conditioning=None, encode=lambda captions: {}, **more,
    )  # fmt: skip


def test_concepts_have_captions_weights_and_repeats_of_their_own(tmp_path: Path) -> None:
    config = shaped(tmp_path)
    found = [(e.concept, e.caption, e.weight, e.repeats) for e in instance_examples(config, seed=0)]
    assert found == [
        ("dog", "sks dog beside a zwx cat, [sic]", 1.0, 3), ("dog", "a sks dog", 1.0, 3),
        *[("cat", "zwx", 2.0, 1)] * 3,
    ]  # fmt: skip
    assert [(e.concept, e.caption, e.weight) for e in class_examples(config, seed=0)] == [("cats", "a cat", 0.5)] * 2
    assert class_captions(config) == ["a cat"] * 2


def test_a_photo_comes_in_a_pass_as_often_as_it_repeats(tmp_path: Path) -> None:
    all_of_it = examples(shaped(tmp_path))
    places = picks(all_of_it, seed=0, step=0, count=18)
    counts = Counter(place[0].example.path for place in places)
    assert sorted(counts.values()) == [2, 2, 2, 6, 6], "two passes of 3 + 3 + 1 + 1 + 1"
    assert {place[1].example.concept for place in places} == {"cats"}
    first, second = ([p[0].example.path for p in places[k : k + 9]] for k in (0, 9))
    assert first != second and sorted(first) == sorted(second)


def test_prompts_of_previews_stand_for_one_of_each_concept(tmp_path: Path) -> None:
    config = shaped(tmp_path)
    prompts = ["[trigger] on a beach", "[dog] and [cat]", "a house"]
    assert expanded_prompts(prompts, config, trigger="tok", option="validation_prompt") == [
        "sks on a beach", "zwx on a beach", "sks and zwx", "a house",
    ]  # fmt: skip
    alone = DataConfig(instance_data_dir=str(tmp_path / "dog"), instance_prompt="a [trigger] dog")
    assert expanded_prompts(prompts[:1], alone, trigger="tok", option="") == ["tok on a beach"]
    assert [e.caption for e in instance_examples(alone, seed=0, trigger="tok")][1] == "a tok dog"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"dog": {"repeats": "0"}}, r"concepts\[dog\]: repeats is 0; it must be at least 1"),
        ({"dog": {"weight": "-1"}}, r"concepts\[dog\]: weight is -1.0; it must be positive"),
        ({"cat": {"trigger": "SKS"}}, "concepts dog and cat have one trigger, 'SKS'; give each its own"),
        ({"dog": {"folder": ""}}, r"concepts\[dog\]: folder is missing"),
        ({"dog": {"fodler": "x"}}, r"concepts\[dog\]: unknown option 'fodler'; known are folder, prompt"),
        ({"dog": {"role": "clas"}}, r"concepts\[dog\]: role is 'clas'; choose one of subject, class"),
        ({"dog": {"role": "class"}, "cat": {"role": "class"}}, "concepts holds images of a class only"),
    ],
)
def test_a_concept_that_cannot_be_meant_is_refused(
    tmp_path: Path, change: dict[str, dict[str, str]], said: str
) -> None:
    concepts = shaped(tmp_path).concepts
    with pytest.raises(OptionError, match=said):
        DataConfig(concepts={name: values | change.get(name, {}) for name, values in concepts.items()})


def test_what_is_not_used_beside_concepts_is_refused(tmp_path: Path) -> None:
    concepts = shaped(tmp_path).concepts
    for beside, said in {
        "instance_data_dir": "instance_data_dir and concepts are given; photos come from one of them",
        "instance_prompt": "instance_prompt do nothing beside concepts",
        "caption_column": "caption_column do nothing without dataset_name",
    }.items():
        with pytest.raises(OptionError, match=said):
            DataConfig(concepts=concepts, **{beside: "x"})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="instance_data_dir is missing"):
        DataConfig()


def test_a_concept_without_photos_or_without_a_word_for_trigger_is_named(tmp_path: Path) -> None:
    config = shaped(tmp_path)
    (tmp_path / "empty").mkdir()
    values = {"folder": str(tmp_path / "empty"), "prompt": "a thing"}
    with pytest.raises(DataError, match=r"concepts\[thing\] .*empty has no images: it is empty"):
        instance_examples(DataConfig(concepts=config.concepts | {"thing": values}), seed=0)
    values = {"folder": str(tmp_path / "class"), "prompt": "a [trigger] thing"}
    with pytest.raises(DataError, match=r"has \[trigger\] in 'a \[trigger\] thing', and its concept has none"):
        instance_examples(DataConfig(concepts={"thing": values}), seed=0)


def test_figures_are_of_the_concept_whose_word_they_go_by(tmp_path: Path) -> None:
    data = shaped(tmp_path)
    instances = instance_examples(data, seed=0)
    for token, concepts in {"zwx": ["cat"] * 3, "tok": ["dog"] * 2 + ["cat"] * 3}.items():
        options = SimpleNamespace(data=data, validation=SimpleNamespace(trigger_token=token))
        rest: Any = dict.fromkeys(("family", "pipe", "objective", "config"))
        checked = Checked(options=options, instances=instances, **rest)  # type: ignore[arg-type]
        assert [example.concept for example in checked.measured] == concepts


# ---- tags, and places without a caption -----------------------------------------------------------


def test_tags_are_shuffled_behind_those_that_stay(tmp_path: Path) -> None:
    config = DataConfig(instance_data_dir="x", shuffle_caption=True, keep_tokens=1, num_caption_orders=20)
    orders = orders_of("sks dog, red,  happy, outside", config, seed=0, content="a")
    assert len(set(orders)) == len(orders) == 6, "every order of three, each once"
    assert all(order.startswith("sks dog, ") and len(order.split(", ")) == 4 for order in orders)
    assert orders == orders_of("sks dog, red,  happy, outside", config, seed=0, content="a")
    assert orders != orders_of("sks dog, red,  happy, outside", config, seed=1, content="a")
    assert orders_of("sks dog, red", config, seed=0, content="a") == ()


def test_a_share_of_places_has_no_caption_and_the_others_one_of_the_orders(tmp_path: Path) -> None:
    config = shaped(tmp_path)
    (tmp_path / "dog" / "01.txt").write_text("a, b, c")
    config = DataConfig(instance_data_dir=str(tmp_path / "dog"), resolution=16, shuffle_caption=True,
                        num_caption_orders=40, instance_prompt="x")  # fmt: skip
    (tmp_path / "dog" / "00.txt").unlink()
    seen = [p[0] for p in picks(examples(config, caption_dropout=0.25), seed=0, step=0, count=400)]
    share = sum(p.caption == "" for p in seen) / len(seen)
    assert 0.15 < share < 0.35
    assert {p.caption for p in seen} > {"", "x"} and len({p.caption for p in seen}) == 2 + 6
    undropped = [p[0].caption for p in picks(examples(config), seed=0, step=0, count=400)]
    assert "" not in undropped


# ---- kohya ----------------------------------------------------------------------------------------


def resolved(*argv: str) -> DataConfig:
    needed = ["--pretrained_model_name_or_path=base"]
    configs = parse([*needed, *argv], *GROUPS, prog="train", description="", translation=DiffusersFlags())
    (data,) = [config for config in configs if isinstance(config, DataConfig)]
    return data


def kohya(folder: Path) -> Path:
    for seed, name in enumerate(("img/10_sks dog", "img/2_zwx cat", "reg/1_dog")):
        tiny.photos(folder / name, 2, seed=seed)
    return folder


@pytest.mark.parametrize("argv", [["{0}"], ["{0}/img", "--reg_data_dir={0}/reg"]], ids=["one", "two"])
def test_kohyas_folders_give_repeats_captions_and_images_of_classes(tmp_path: Path, argv: list[str]) -> None:
    kohya(tmp_path)
    first, *rest = (word.format(tmp_path) for word in argv)
    data = resolved(f"--train_data_dir={first}", *rest)
    found = {(e.caption, e.repeats) for e in instance_examples(data, seed=0)}
    assert found == {("sks dog", 10), ("zwx cat", 2)}
    assert {(e.caption, e.repeats, e.path.parent.name) for e in class_examples(data, seed=0)} == {("dog", 1, "1_dog")}


def test_kohyas_toml_gives_the_same_and_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kohya(tmp_path)
    file = tmp_path / "set.toml"
    text = f"""
        [general]
        shuffle_caption = true
        keep_tokens = 1
        enable_bucket = true
        min_bucket_reso = 256
        [[datasets]]
        resolution = 64
        batch_size = 2
        [[datasets.subsets]]
        image_dir = "{tmp_path}/img/10_sks dog"
        class_tokens = "sks dog"
        num_repeats = 10
        [[datasets.subsets]]
        image_dir = "{tmp_path}/reg/1_dog"
        class_tokens = "dog"
        is_reg = true
    """
    file.write_text(text)
    data = resolved(f"--dataset_config={file}", "--keep_tokens=0")
    assert {(e.caption, e.repeats) for e in instance_examples(data, seed=0)} == {("sks dog", 10)}
    assert len(class_examples(data, seed=0)) == 2
    assert (data.resolution, data.aspect_ratio_buckets, data.shuffle_caption) == (64, "auto", True)
    assert data.keep_tokens == 0, "the command line wins over the file"
    for wrong, said in {
        text.replace("num_repeats", "num_repeat"): "unknown key 'num_repeat'; did you mean num_repeats?",
        text + "\nflip_aug = true": "",
        text.replace("keep_tokens = 1", "color_aug = true"): "color_aug True is not offered here",
        text.replace("image_dir", "resolution"): "a subset has no image_dir",
        "[general]\n": "names no photos",
        "[general": "cannot read dataset_config",
        text.replace("num_repeats = 10", "num_repeats = 0"): "concepts[sks dog]: repeats is 0",
    }.items():
        file.write_text(wrong)
        if said:
            with pytest.raises(SystemExit):
                resolved(f"--dataset_config={file}")
            assert said in capsys.readouterr().err


def test_a_folder_without_repeats_and_settings_that_differ_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.photos(tmp_path / "photos")
    with pytest.raises(SystemExit):
        resolved(f"--train_data_dir={tmp_path / 'photos'}")
    assert "holds no folder called by repeats; photos lie in folders such as" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        resolved(f"--reg_data_dir={tmp_path / 'photos'}")
    assert "give train_data_dir" in capsys.readouterr().err
    subset = f'[[datasets.subsets]]\nimage_dir = "{tmp_path}/photos"\n'
    (tmp_path / "set.toml").write_text(f"[[datasets]]\n{subset}flip_aug = true\n{subset}flip_aug = false\n")
    with pytest.raises(SystemExit):
        resolved(f"--dataset_config={tmp_path / 'set.toml'}")
    assert "flip_aug is True in one part and False in another" in capsys.readouterr().err
