"""What a configuration of speculation asks for, before anything is loaded. No torch."""

from __future__ import annotations

from eagleray.core.config import SpeculationConfig
from eagleray.core.errors import ConfigError
from eagleray.engine.speculation.tree import DraftShape, fixed_tree


def draft_shape(config: SpeculationConfig) -> DraftShape:
    """The largest tree or chain that the configuration allows. Raises ``ConfigError``."""
    if config.tree_paths:
        try:
            return fixed_tree(config.tree_paths)
        except ValueError as error:
            raise ConfigError("speculation.tree_paths", len(config.tree_paths), str(error)) from None
    return DraftShape(config.num_speculative_tokens, config.tree_branching, config.tree_nodes)


def require_method(config: SpeculationConfig, held: str) -> None:
    """Raises ``ConfigError`` unless the folder holds a draft for the method that is configured."""
    if held != config.method:
        way_out = f"{config.folder} holds a draft for method {held}; set that, or another folder"
        raise ConfigError("speculation.method", config.method, way_out)


def require_fewer_layers(config: SpeculationConfig, num_layers: int) -> None:
    """Raises ``ConfigError`` unless those layers of a model that guess for it are some of its ``num_layers``."""
    if config.early_exit_layers is not None and config.early_exit_layers >= num_layers:
        way_out = f"the model has {num_layers} layers; set fewer"
        raise ConfigError("speculation.early_exit_layers", config.early_exit_layers, way_out)
