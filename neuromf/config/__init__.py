"""The settings of a run: typed, frozen, unknown keys refused.

Precedence: `key=value` on the command line > `NEUROMF_*` environment > `--config` YAML > preset > defaults.
"""

from neuromf.config.presets import find_preset, preset_files, preset_folders, preset_header, read_yaml
from neuromf.config.resolve import from_values, from_yaml, load, parse_overrides
from neuromf.config.schema import RESERVED_ENVIRONMENT, TrainConfig, known_keys
from neuromf.config.sections import (
    AdaptersConfig,
    EmaConfig,
    GuardsConfig,
    GuidanceConfig,
    IntervalsConfig,
    MitConfig,
    MlpConfig,
    NetworkConfig,
    ObjectiveConfig,
    TimesConfig,
    TrackingConfig,
    TrainingConfig,
    UNetConfig,
)

__all__ = [
    "RESERVED_ENVIRONMENT",
    "AdaptersConfig",
    "EmaConfig",
    "GuardsConfig",
    "GuidanceConfig",
    "IntervalsConfig",
    "MitConfig",
    "MlpConfig",
    "NetworkConfig",
    "ObjectiveConfig",
    "TimesConfig",
    "TrackingConfig",
    "TrainConfig",
    "TrainingConfig",
    "UNetConfig",
    "find_preset",
    "from_values",
    "from_yaml",
    "known_keys",
    "load",
    "parse_overrides",
    "preset_files",
    "preset_folders",
    "preset_header",
    "read_yaml",
]
