"""The file that `twilight calibrate` writes beside a model; docs/calibration.md has its fields."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twilight_engine.config import PRESETS, KVConfig, SparseConfig
from twilight_engine.loaders.errors import CheckpointError
from twilight_engine.loaders.json_file import read_json

SCHEMA = "twilight-engine/calibration/1"
FILE_NAME = "twilight_calibration.json"
KEYS = (
    *("schema", "model", "preset", "attn_top_p", "index_top_p", "by_layer"),
    *("dense_layers", "hot_kv_share", "hot_shares", "measured", "sweep"),
)
SHARE_DECIMALS = 6


@dataclass(frozen=True)
class Fingerprint:
    """What tells a model from others, whatever dtype it is stored or run in.

    Attributes:
        name: of its file or directory; not compared.
        norms_sha256: of all norm weights, rounded to bfloat16: checkpoints keep them unquantised.
    """

    name: str
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    norms_sha256: str

    def differences(self, other: Fingerprint) -> list[str]:
        """'num_layers 30, not 24' for each field that is not the other's."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "name"]
        found = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name} {_short(a)}, not {_short(b)}" for name, a, b in found if a != b]


@dataclass(frozen=True)
class Calibration:
    """Settings chosen for a model from texts.

    Attributes:
        fingerprint: of the model.
        preset: what the settings change.
        attn_top_p, index_top_p: of all layers but those of by_layer.
        by_layer: layer -> (attn_top_p, index_top_p).
        dense_layers, hot_kv_share, hot_shares: as in KVConfig.
        measured: tolerances, budget, sample, and what was measured on both halves of it.
        sweep: what was measured of each setting that was tried.
        path: the file it was read from.
    """

    fingerprint: Fingerprint
    preset: str
    attn_top_p: float
    index_top_p: float | None
    dense_layers: tuple[int, ...]
    hot_kv_share: float
    hot_shares: tuple[float, ...] | None
    by_layer: Mapping[int, tuple[float, float | None]] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    sweep: tuple[Mapping[str, Any], ...] = ()
    path: Path | None = None

    def kv_config(self) -> KVConfig:
        """Where the KV cache lives."""
        return KVConfig.preset(
            self.preset,
            dense_layers=self.dense_layers,
            hot_kv_share=self.hot_kv_share,
            hot_shares=self.hot_shares,
        )

    def sparse_config(self) -> SparseConfig:
        """How steps attend."""
        main = self._layer_config(self.attn_top_p, self.index_top_p)
        layers = {i: self._layer_config(*masses) for i, masses in self.by_layer.items()}
        return main.replace(by_layer=layers)

    def _layer_config(self, attn_top_p: float, index_top_p: float | None) -> SparseConfig:
        return SparseConfig.preset(self.preset, attn_top_p=attn_top_p, index_top_p=index_top_p)

    def describe(self) -> str:
        """The settings in one line."""
        lower = f" ({len(self.by_layer)} layers differ)" if self.by_layer else ""
        index = "" if self.index_top_p is None else f", index_top_p {self.index_top_p:g}"
        dense = ",".join(map(str, self.dense_layers)) or "none"
        return (
            f"{self.preset}, attn_top_p {self.attn_top_p:g}{lower}{index}, dense layers {dense}, "
            f"hot rows {self.hot_kv_share:.1%} of the KV"
        )

    def to_json(self) -> dict[str, Any]:
        """The file's content, after docs/calibration.md."""
        layers = sorted(self.by_layer.items())
        return {
            "schema": SCHEMA,
            "model": dataclasses.asdict(self.fingerprint),
            "preset": self.preset,
            "attn_top_p": self.attn_top_p,
            "index_top_p": self.index_top_p,
            "by_layer": {str(i): {"attn_top_p": p, "index_top_p": q} for i, (p, q) in layers},
            "dense_layers": list(self.dense_layers),
            "hot_kv_share": round(self.hot_kv_share, SHARE_DECIMALS),
            "hot_shares": self.hot_shares and [round(x, SHARE_DECIMALS) for x in self.hot_shares],
            "measured": dict(self.measured),
            "sweep": list(self.sweep),
        }


def path_beside(model: Path) -> Path:
    """Where a model's calibration is looked for: in its directory, or beside its file."""
    if model.is_dir():
        return model / FILE_NAME
    return model.with_name(f"{model.name}.{FILE_NAME}")


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write the file, over one that may be there."""
    text = json.dumps(calibration.to_json(), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_calibration(path: Path) -> Calibration:
    """Read and check a file.

    Raises: CheckpointError for one that is broken, of another version, or has values out of range;
        the message names the file.
    """
    raw = read_json(path)
    try:
        return dataclasses.replace(_parse(raw), path=path)
    except ValueError as error:
        raise CheckpointError(f"{path} is no calibration to use: {error}") from error


def _parse(raw: Mapping[str, Any]) -> Calibration:
    if raw.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {raw.get('schema')!r}; this version reads {SCHEMA!r}")
    missing = [key for key in KEYS if key not in raw]
    unknown = [key for key in raw if key not in KEYS]
    if missing or unknown:
        raise ValueError(f"it lacks {missing or 'nothing'} and has unknown keys {unknown}")
    if raw["preset"] not in PRESETS:
        raise ValueError(f"its preset is {raw['preset']!r}; allowed: {', '.join(PRESETS)}")
    fingerprint = _parse_fingerprint(_object(raw, "model"))
    num_layers = fingerprint.num_layers
    dense = [_layer("dense_layers", i, num_layers) for i in _list(raw, "dense_layers")]
    made = Calibration(
        fingerprint=fingerprint,
        preset=raw["preset"],
        attn_top_p=_number("attn_top_p", raw["attn_top_p"]),
        index_top_p=_optional("index_top_p", raw["index_top_p"]),
        by_layer=_parse_layers(_object(raw, "by_layer"), num_layers),
        dense_layers=tuple(dense),
        hot_kv_share=_number("hot_kv_share", raw["hot_kv_share"]),
        hot_shares=_parse_shares(raw, num_layers, dense),
        measured=_object(raw, "measured"),
        sweep=tuple(_list(raw, "sweep")),
    )
    made.kv_config()  # they check the ranges
    made.sparse_config()
    return made


def _parse_fingerprint(raw: Mapping[str, Any]) -> Fingerprint:
    types = {f.name: str if f.type == "str" else int for f in dataclasses.fields(Fingerprint)}
    wrong = [name for name, kind in types.items() if type(raw.get(name)) is not kind]
    if wrong:
        raise ValueError(f"its model lacks {', '.join(wrong)}, or has them in another type")
    return Fingerprint(**{name: raw[name] for name in types})


def _parse_shares(
    raw: Mapping[str, Any], num_layers: int, dense: Sequence[int]
) -> tuple[float, ...] | None:
    if raw["hot_shares"] is None:
        return None
    shares = tuple(_number("hot_shares", share) for share in _list(raw, "hot_shares"))
    if len(shares) != num_layers:
        raise ValueError(f"hot_shares has {len(shares)} entries for {num_layers} layers")
    wasted = [layer for layer in dense if shares[layer]]
    if wasted:
        raise ValueError(f"hot_shares gives hot rows to layers {wasted}, which are dense")
    return shares


def _parse_layers(raw: Mapping[str, Any], num_layers: int) -> dict[int, tuple[float, float | None]]:
    found = {}
    for name, masses in raw.items():
        layer = _layer("by_layer", int(name) if name.isdecimal() else name, num_layers)
        if not isinstance(masses, dict) or set(masses) != {"attn_top_p", "index_top_p"}:
            raise ValueError(f"by_layer has {masses!r}; it must have attn_top_p and index_top_p")
        where = f"by_layer.{name}."
        found[layer] = (
            _number(where + "attn_top_p", masses["attn_top_p"]),
            _optional(where + "index_top_p", masses["index_top_p"]),
        )
    return found


def _layer(name: str, value: object, num_layers: int) -> int:
    if type(value) is not int or not 0 <= value < num_layers:
        raise ValueError(f"{name} names layer {value!r}; the model has {num_layers}")
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {value!r}; it must be a number")
    return value


def _optional(name: str, value: object) -> float | None:
    return None if value is None else _number(name, value)


def _object(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = raw[name]
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}; it must be a JSON object")
    return value


def _list(raw: Mapping[str, Any], name: str) -> list[Any]:
    value = raw[name]
    if not isinstance(value, list):
        raise ValueError(f"{name} is {value!r}; it must be a list")
    return value


def _short(value: object) -> str:
    return value[:8] + "..." if isinstance(value, str) else str(value)
