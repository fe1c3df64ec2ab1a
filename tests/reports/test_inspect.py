"""`delora inspect`: figures against the dense update, names of blocks and kinds, table, JSON and picture."""

from __future__ import annotations

import builtins
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from delora_diffusion import (
    Adapter,
    DeloraConfig,
    delora_state_dict,
    export_peft,
    inject_delora,
    read_adapter,
    save_delora_weights,
)
from delora_diffusion.cli import main
from delora_diffusion.method.inject import delora_adapters
from delora_diffusion.reports.inspect import (
    as_json,
    as_table,
    block_of,
    inspect_adapter,
    kind_of,
    kinds_of,
    relative_update,
)
from delora_diffusion.reports.inspect_plot import PlotError, draw_inspections, plot_inspections

from .. import tiny


def trained(module: nn.Module, **config: Any) -> nn.Module:
    torch.manual_seed(1)
    inject_delora(module, DeloraConfig(**{"r": 3, "delora_lambda": 2.0, **config}))
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of the tiny pipeline: a residual one with biases for both components, and one for the UNet."""
    folder = tmp_path_factory.mktemp("inspect")
    pipe, again = (tiny.stable_diffusion(folder / name) for name in "ab")
    both = {
        "unet": trained(pipe.unet, init_weights="residual", lambda_pattern={"to_q": 5.0}),
        "text_encoder": trained(pipe.text_encoder, bias="delora_only"),
    }
    save_delora_weights(folder / "dog", both, provenance={"base_model": "some/base", "instance_prompt": "a sks dog"})
    save_delora_weights(folder / "style", {"unet": trained(again.unet, r=2, target_modules=["to_q", "to_v"])})
    return {"dog": folder / "dog", "style": folder / "style"}


@pytest.mark.parametrize("init_weights", ["zero", "residual"])
def test_every_figure_is_that_of_the_dense_update(init_weights: str) -> None:
    module = nn.Sequential(nn.Linear(9, 14), nn.Linear(14, 5))
    trained(module, target_modules="all-linear", init_weights=init_weights, lambda_pattern={"1": 4.0})
    adapter = Adapter({"": delora_state_dict(module)}, {"": module._delora.configs["default"]})  # type: ignore[union-attr]
    found = inspect_adapter(adapter, "mine")
    assert [layer.layer for layer in found.layers] == ["0", "1"]
    for layer, (name, live) in zip(found.layers, delora_adapters(module).items(), strict=True):
        down, up = live.factors()
        dw, W = (up.double() @ down.double()).detach(), module[int(name)].weight.detach()
        s = torch.linalg.svdvals(dw)
        p = s[s > 1e-9] / s.sum()
        assert layer.update_norm == pytest.approx(float(dw.norm()), rel=1e-5)
        assert layer.relative_update == pytest.approx(float(dw.norm() / W.norm()), rel=1e-5)
        assert layer.effective_rank == pytest.approx(math.exp(float(-(p * p.log()).sum())), rel=1e-3)
        allowed = float(live.delora_lambda.abs()) + (layer.lambda_initial if init_weights == "residual" else 0.0)
        largest = float(W.norm(dim=0).max())
        assert layer.bound_share == pytest.approx(float(dw.norm()) / (allowed * largest), rel=1e-5)
        assert 0 < layer.bound_share < 1
        assert (layer.lambda_initial, layer.lambda_final) == (
            {"0": 2.0, "1": 4.0}[name], pytest.approx(float(live.delora_lambda)),
        )  # fmt: skip
        assert layer.rank == (6 if init_weights == "residual" else 3)
    together = relative_update(found.layers)
    norms = [(layer.update_norm, layer.weight_norm) for layer in found.layers]
    assert together == pytest.approx(math.hypot(*(u for u, _ in norms)) / math.hypot(*(w for _, w in norms)))
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert found.parameters == {"": trainable}


def test_an_adapter_that_does_nothing_has_no_update_and_no_direction() -> None:
    module = nn.Sequential(nn.Linear(9, 14))
    inject_delora(module, DeloraConfig(r=2, target_modules=["0"]))
    (layer,) = inspect_adapter(Adapter({"": delora_state_dict(module)}, {"": DeloraConfig(r=2)}), "new").layers
    assert (layer.update_norm, layer.relative_update, layer.bound_share, layer.effective_rank) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "layer, block, kind",
    [
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "down 1", "q"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0", "mid", "out"),
        ("up_blocks.2.attentions.1.transformer_blocks.0.ff.net.2", "up 2", "net.2"),
        ("transformer_blocks.11.attn.add_k_proj", "transformer 11", "k"),
        ("text_model.encoder.layers.10.self_attn.out_proj", "layers 10", "out"),
        ("model.layers.3.self_attn.o_proj", "layers 3", "out"),
        ("encoder.layer.0.attention.self.value", "layer 0", "v"),
        ("time_embedding.linear_1", "time_embedding", "linear_1"),
        ("0", "0", "0"),
    ],
)
def test_where_a_layer_is_and_what_it_projects(layer: str, block: str, kind: str) -> None:
    assert (block_of(layer), kind_of(layer)) == (block, kind)


def test_layers_come_in_their_order(files: dict[str, Path]) -> None:
    layers = inspect_adapter(read_adapter(files["dog"]), "dog").of("text_encoder")
    assert kinds_of(layers) == ["q", "k", "v", "out"]
    assert [layer.kind for layer in layers] == ["q", "k", "v", "out"] * 2
    assert [layer.block for layer in layers] == ["layers 0"] * 4 + ["layers 1"] * 4
    many = {f"layers.{n}.{leaf}": t for n in (10, 9) for leaf, t in _layer().items()}
    assert [la.layer for la in inspect_adapter(Adapter({"": many}, {"": DeloraConfig(r=2)}), "x").layers] == [
        "layers.9", "layers.10",
    ]  # fmt: skip


def _layer() -> dict[str, torch.Tensor]:
    return {
        "delora_A": torch.randn(2, 4), "delora_B": torch.randn(3, 2), "delora_lambda": torch.ones(1),
        "delora_w_norm": torch.rand(4),
    }  # fmt: skip


def _single(layer: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"0.{leaf}": tensor for leaf, tensor in layer.items()}


def test_the_command_prints_both_adapters_side_by_side_and_writes_json_and_a_picture(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [str(files["dog"]), str(files["style"])]
    figures, picture = tmp_path / "figures.json", tmp_path / "sub" / "plot.png"
    assert main(["inspect", "--adapter", *sources, "--json", str(figures), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert f"[1] {sources[0]}" in lines and "    base_model: some/base" in lines
    assert "    instance_prompt: a sks dog" in lines
    assert any(line.startswith("    text_encoder: 8 parameters trained in full, such as") for line in lines)
    told = json.loads(figures.read_text())
    assert [one["source"] for one in told] == sources
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    first, second = ({la["layer"]: la for la in one["layers"] if la["component"] == "unet"}[name] for one in told)
    (row,) = [line.split() for line in lines if line.startswith(f"{name} ")]
    shown = [(la["rank"], la["relative_update"], la["bound_share"], la["effective_rank"]) for la in (first, second)]
    assert [row[1], row[5], row[6], row[7]] == [str(shown[0][0]), *_formatted(shown[0])]
    assert [row[8], row[12], row[13], row[14]] == [str(shown[1][0]), *_formatted(shown[1])]
    assert row[2:5] == ["5", "->", f"{first['lambda_final']:.4g}"]
    lacking = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
    (row,) = [line.split() for line in lines if line.startswith(f"{lacking} ")]
    assert row[8:] == ["-"] * 5
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > image.height > 300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 4


def _formatted(shown: tuple[int, float, float, float]) -> list[str]:
    return [f"{shown[1]:.4f}", f"{shown[2]:.1%}", f"{shown[3]:.1f}"]


def test_bars_are_the_figures(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn = []
    real = Axes.bar
    monkeypatch.setattr(
        Axes, "bar", lambda axis, x, height, **rest: drawn.append(height) or real(axis, x, height, **rest)
    )
    found = inspect_adapter(read_adapter(files["style"]), "style")
    plot_inspections([found], tmp_path / "plot.png")
    groups = {(la.block, la.kind): [] for la in found.layers}
    for layer in found.layers:
        groups[layer.block, layer.kind].append(layer)
    assert sorted(drawn) == pytest.approx(sorted(relative_update(group) for group in groups.values()))


def test_many_blocks_are_lines_below_each_other_and_many_kinds_look_different() -> None:
    leaves = [f"kind_{number}" for number in range(11)]
    names = [f"blocks.{block}.{leaf}" for block in range(20) for leaf in leaves if (block, leaf) != (7, "kind_3")]
    here = {f"{name}.{leaf}": tensor for name in names for leaf, tensor in _layer().items()}
    found = inspect_adapter(Adapter({"": here}, {"": DeloraConfig(r=2)}), "many")
    figure = draw_inspections([found, found])
    upper, lower = figure.axes
    assert upper.get_position().y0 > lower.get_position().y0
    lines = {line.get_label(): line for line in upper.get_lines()}
    assert len({(line.get_color(), line.get_linestyle()) for line in lines.values()}) == len(leaves)
    for kind in leaves:
        heights = lines[kind].get_ydata()
        for block in range(20):
            group = [la for la in found.layers if (la.block, la.kind) == (f"blocks {block}", kind)]
            assert heights[block] == pytest.approx(relative_update(group)) if group else math.isnan(heights[block])
    assert [label.get_text() for label in upper.get_xticklabels()] == ["blocks 0", *map(str, range(1, 20))]
    few = {name: t for name, t in here.items() if name.startswith("blocks.1.")}
    bars = draw_inspections([inspect_adapter(Adapter({"": few}, {"": DeloraConfig(r=2)}), "few")]).axes[0].patches
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars}) == len(leaves)


def test_the_table_of_one_peft_folder_names_no_component(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(9, 14))
    export_peft(trained(module, target_modules=["0"]), tmp_path)
    found = inspect_adapter(read_adapter(tmp_path), "peft")
    assert "(one module): " in as_table([found]) and "[1] rank" not in as_table([found])
    assert "delora_lambda 2.0" in as_table([found]), "the strength that was used, and no other"
    relative = DeloraConfig(r=2, relative_lambda=0.05)
    told = as_table([inspect_adapter(Adapter({"": _single(_layer())}, {"": relative}), "x")])
    assert "relative_lambda 0.05" in told and "delora_lambda" not in told
    assert json.loads(as_json([found]))[0]["layers"][0]["layer"] == "0"


def test_a_plot_without_matplotlib_names_the_extra(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["inspect", "--adapter", str(files["dog"]), "--plot", str(tmp_path / "x.png")]) == 1
    assert 'pip install "delora_diffusion[plots]"' in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_to_inspect_or_to_plot_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect"])
    assert "give --adapter" in capfd.readouterr().err
    with pytest.raises(PlotError, match="nothing to plot"):
        plot_inspections([inspect_adapter(Adapter({}, {}), "none")], tmp_path / "x.png")
