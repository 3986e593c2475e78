"""`OmegaConf.load` of a YAML file, and `to_container`."""

from pathlib import Path

import yaml


class OmegaConf:
    @staticmethod
    def load(file):
        return yaml.safe_load(Path(file).read_text())

    @staticmethod
    def to_container(config):
        return config
