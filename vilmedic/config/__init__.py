"""Configuration: YAML files and command-line overrides resolved and validated."""

from vilmedic.config.load import Config, build, build_calls, fetch, load

__all__ = ["Config", "build", "build_calls", "fetch", "load"]
