"""`OmegaConf.load` of a YAML file."""

from pathlib import Path

import yaml


class OmegaConf:
    @staticmethod
    def load(file):
        return yaml.safe_load(Path(file).read_text())
