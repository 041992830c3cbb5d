"""From YAML files and command-line overrides to one checked configuration."""

from vilmedic.config.load import Config, build, build_calls, fetch, load

__all__ = ["Config", "build", "build_calls", "fetch", "load"]
