"""Which calibration an LLM runs under."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from twilight_engine.loaders.calibration_file import (
    Calibration,
    path_beside,
    read_calibration,
)
from twilight_engine.loaders.config import ModelConfig
from twilight_engine.models.fingerprint import fingerprint
from twilight_engine.models.load import LoadFormat

CalibrationChoice = Literal["auto"] | str | Path | None


def pick_calibration(
    model: str | Path | ModelConfig,
    choice: CalibrationChoice,
    load_format: LoadFormat = "auto",
    preset: str | None = None,
    configs_given: bool = False,
) -> Calibration | None:
    """The calibration to use, checked against the model; None for none.

    Args:
        choice: "auto" takes the file beside the model, if there is one and neither configs nor
            another preset than the file's are given; a path names a file; None: none.
        preset: the caller's, None: the caller leaves it open.
        configs_given: the caller has a KVConfig or a SparseConfig of its own.
    Raises:
        ValueError: for a named file that is not there or that the other arguments contradict; for
            a file of another model.
        CheckpointError: for a broken file.
    """
    if choice is None or (choice == "auto" and configs_given):
        return None
    named = choice != "auto"
    if named and configs_given:
        raise ValueError(
            f"calibration is {str(choice)!r}, and settings of the cache or of attention are given "
            "as well; give one of them"
        )
    path = Path(choice).expanduser() if named else _beside(model, load_format)
    if path is None:
        return None
    if named and not path.is_file():
        raise ValueError(
            f"calibration is {str(choice)!r}, which is no file here; allowed: 'auto', None, or the "
            "path of a file that `twilight calibrate` wrote"
        )
    found = read_calibration(path)
    if preset not in (None, found.preset):
        if named:
            raise ValueError(f"preset is {preset!r}; the calibration {path} is of {found.preset!r}")
        return None
    _check_model(found, model, load_format)
    return found


def _beside(model: str | Path | ModelConfig, load_format: LoadFormat) -> Path | None:
    """The file beside a model whose weights are read, if there is one."""
    if isinstance(model, ModelConfig) or load_format == "dummy":
        return None
    path = path_beside(Path(model).expanduser())
    return path if path.is_file() else None


def _check_model(
    found: Calibration, model: str | Path | ModelConfig, load_format: LoadFormat
) -> None:
    if isinstance(model, ModelConfig) or load_format == "dummy":
        raise ValueError(
            f"{found.path} is a calibration of {found.fingerprint.name}; load_format 'dummy' makes "
            "up another model's weights"
        )
    here = fingerprint(model, load_format)
    differences = found.fingerprint.differences(here)
    if differences:
        raise ValueError(
            f"{found.path} is a calibration of another model: of {found.fingerprint.name}, not of "
            f"{here.name} ({'; '.join(differences)}); calibrate this model, or use calibration None"
        )
