"""The decoder models, one file a family. load_model is the way in; decoder.py says how to run."""

from twilight_engine.layers.attention import Attend
from twilight_engine.layers.rope import Rotary
from twilight_engine.models.decoder import DecoderModel
from twilight_engine.models.load import LoadedModel, load_model, read_config

__all__ = ["Attend", "DecoderModel", "LoadedModel", "Rotary", "load_model", "read_config"]
