"""What an adapter does to each layer: `delora inspect --adapter runs/my_dog`.

Everything follows from the file alone, without the base model and without forming dW (see `method/lowrank.py`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..adapters.adapter import Adapter, adapted, in_full, layer_tensors, update_of
from ..method.lowrank import effective_rank

#: What a projection is, by the last part of a layer's name; other names stand for themselves.
_KINDS = {
    "q": ("to_q", "q_proj", "add_q_proj", "query", "q"),
    "k": ("to_k", "k_proj", "add_k_proj", "key", "k"),
    "v": ("to_v", "v_proj", "add_v_proj", "value", "v"),
    "out": ("out_proj", "o_proj", "to_add_out", "o", "out"),
}
_KIND = {leaf: kind for kind, leaves in _KINDS.items() for leaf in leaves}


@dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """One adapted layer.

    Attributes:
        block: where it is in the model, e.g. "down 1", "mid", "layers 3".
        kind: q, k, v, out, or the last part of its name.
        rank: number of components; 2r for a residual adapter.
        update_norm, weight_norm: |dW|_F and |W|_F.
        relative_update: |dW|_F / |W|_F.
        bound_share: |dW|_F / (|lambda| max_j w_j), the part used of what lambda allows.
        effective_rank: exp of the entropy of the singular values' shares (Roy and Vetterli 2007).
    """

    component: str
    layer: str
    block: str
    kind: str
    rank: int
    lambda_initial: float
    lambda_final: float
    update_norm: float
    weight_norm: float
    relative_update: float
    bound_share: float
    effective_rank: float


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """An adapter's figures: where it comes from, its settings by component, its layers, parameters trained in full."""

    source: str
    provenance: dict[str, str]
    settings: dict[str, dict[str, Any]]
    layers: list[LayerFigures]
    parameters: dict[str, int]
    trained_in_full: dict[str, list[str]]

    def components(self) -> list[str]:
        """Names of the components, in the file's order."""
        return list(self.settings)

    def of(self, component: str) -> list[LayerFigures]:
        """The layers of one component."""
        return [layer for layer in self.layers if layer.component == component]


def inspect_adapter(adapter: Adapter, source: str) -> Inspection:
    """The figures of every layer of an adapter; `source` is what to call it."""
    layers, parameters, full = [], {}, {}
    for component, tensors in adapter.tensors.items():
        config = adapter.configs[component]
        for name in sorted(adapted(tensors), key=_natural):
            layer_values = layer_tensors(name, tensors)
            factors = update_of(f"{component}.{name}", layer_values)
            values = factors.singular_values()
            lam, lam_0 = float(layer_values["delora_lambda"]), layer_values.get("delora_lambda_init")
            w = layer_values["delora_w_norm"].float()
            update, weight = float(values.norm()), float(w.norm())
            bound = (abs(lam) + abs(float(lam_0) if lam_0 is not None else 0.0)) * float(w.max())
            start = config.lambda_of(name, len(w)) if lam_0 is None else float(lam_0)
            layers.append(
                LayerFigures(
                    component=component,
                    layer=name,
                    block=block_of(name),
                    kind=kind_of(name),
                    rank=factors.rank,
                    lambda_initial=start,
                    lambda_final=lam,
                    update_norm=update,
                    weight_norm=weight,
                    relative_update=update / weight if weight else 0.0,
                    bound_share=update / bound if bound else 0.0,
                    effective_rank=effective_rank(values),
                )
            )
        trained = {name: t for name, t in tensors.items() if not name.endswith(("w_norm", "_init"))}
        parameters[component] = sum(tensor.numel() for tensor in trained.values())
        full[component] = list(in_full(tensors))
    settings = {component: config.to_dict() for component, config in adapter.configs.items()}
    return Inspection(
        source=source,
        provenance=adapter.provenance,
        settings=settings,
        layers=layers,
        parameters=parameters,
        trained_in_full=full,
    )


def kind_of(layer: str) -> str:
    """q, k, v, out, or the last part of the name (the last two where that is a number, e.g. "net.2")."""
    if layer.endswith("to_out.0"):
        return "out"
    *before, leaf = layer.split(".")
    return ".".join([*before[-1:], leaf]) if leaf.isdecimal() else _KIND.get(leaf, leaf)


def block_of(layer: str) -> str:
    """The first numbered container of a name, e.g. "up 2" of up_blocks.2.attentions.1...; else its first part."""
    if match := re.search(r"(?:^|\.)(\w+)\.(\d+)\.", layer):
        before = layer[: match.start()].split(".")[0]
        if not before.endswith("_block"):
            return f"{match.group(1).removesuffix('_blocks')} {match.group(2)}"
    return layer.split(".")[0].removesuffix("_block")


def kinds_of(layers: Iterable[LayerFigures]) -> list[str]:
    """The kinds there are: q, k, v, out, then others as they come."""
    found = dict.fromkeys(layer.kind for layer in layers)
    return [*(kind for kind in _KINDS if kind in found), *(kind for kind in found if kind not in _KINDS)]


def _natural(name: str) -> list[tuple[int, str]]:
    """Orders layers.10 after layers.9, and q, k, v, out as one says them."""
    parts = name.split(".")
    order = {"q": "0", "k": "1", "v": "2", "out": "3"}.get(kind_of(name))
    parts = parts if order is None else [*parts[:-2], *parts[-2:-1][: not name.endswith("to_out.0")], order]
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def relative_update(layers: Iterable[LayerFigures]) -> float:
    """|dW| / |W| of several layers together: the root of the summed squares of one over that of the other."""
    chosen = list(layers)
    weight = math.sqrt(sum(layer.weight_norm**2 for layer in chosen))
    return math.sqrt(sum(layer.update_norm**2 for layer in chosen)) / weight if weight else 0.0


# ---- as text and as JSON -------------------------------------------------------------------------


def as_json(inspections: Sequence[Inspection]) -> str:
    """All figures, one object for each adapter."""
    return json.dumps([dataclasses.asdict(inspection) for inspection in inspections], indent=2)


_HEADINGS = ("rank", "lambda", "|dW|/|W|", "bound used", "eff. rank")


def as_table(inspections: Sequence[Inspection]) -> str:
    """Where each adapter comes from, then a line for each layer, with several adapters side by side."""
    lines = []
    for number, inspection in enumerate(inspections, 1):
        lines += [f"[{number}] {inspection.source}", *_origin(inspection), ""]
    for component in dict.fromkeys(name for inspection in inspections for name in inspection.components()):
        rows = [{layer.layer: layer for layer in inspection.of(component)} for inspection in inspections]
        names = list(dict.fromkeys(name for row in rows for name in row))
        width = max(len(name) for name in [component, *names])
        titles = [f"[{number}]" if len(rows) > 1 else "" for number in range(1, len(rows) + 1)]
        lines.append("  ".join([f"{component:{width}}", *(_cells(_HEADINGS, title) for title in titles)]).rstrip())
        lines += ["  ".join([f"{name:{width}}", *(_row(row.get(name)) for row in rows)]).rstrip() for name in names]
        lines += ["  ".join([f"{'all':{width}}", *(_total(row) for row in rows)]).rstrip(), ""]
    text = "\n".join(lines).rstrip()  # texts of a file, which could steer a terminal
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text) + "\n"


def _cells(values: Sequence[str], title: str = "") -> str:
    widths = (4, 16, 10, 11, 10)
    return f"{title:3} " + " ".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=True))


def _row(layer: LayerFigures | None) -> str:
    if layer is None:
        return _cells(("-",) * 5)
    lam = f"{layer.lambda_initial:.4g} -> {layer.lambda_final:.4g}"
    share, directions = f"{layer.bound_share:.1%}", f"{layer.effective_rank:.1f}"
    return _cells((str(layer.rank), lam, f"{layer.relative_update:.4f}", share, directions))


def _total(row: Mapping[str, LayerFigures]) -> str:
    if not row:
        return _cells(("-",) * 5)
    layers = list(row.values())
    share = sum(layer.bound_share for layer in layers) / len(layers)
    directions = sum(layer.effective_rank for layer in layers) / len(layers)
    return _cells(("", f"{len(layers)} layers", f"{relative_update(layers):.4f}", f"{share:.1%}", f"{directions:.1f}"))


def _origin(inspection: Inspection) -> list[str]:
    lines = [f"    {name}: {value}" for name, value in sorted(inspection.provenance.items()) if value]
    for component, settings in inspection.settings.items():
        unused = "delora_lambda" if settings.get("relative_lambda") is not None else ""
        text = ", ".join(
            f"{name} {value}"
            for name, value in settings.items()
            if value not in (None, {}, [], 0.0) and name != unused
        )
        full = inspection.trained_in_full[component]
        lines.append(f"    {component or '(one module)'}: {inspection.parameters[component]:,} parameters; {text}")
        if full:
            lines.append(f"    {component}: {len(full)} parameters trained in full, such as {full[0]}")
    return lines
