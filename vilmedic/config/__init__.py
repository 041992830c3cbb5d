"""From YAML files and command-line overrides to one checked configuration."""

from vilmedic.config.build import build, build_calls
from vilmedic.config.load import Config, load

__all__ = ["Config", "build", "build_calls", "load"]
