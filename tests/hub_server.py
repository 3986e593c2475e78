"""A Hub on this machine: the server that FORESIGHT_HUB_SERVER names, seen by the client of this process.

FORESIGHT_HUB_SERVER is a Python file with a class `HubServer` that speaks the Hub's API.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from huggingface_hub import constants, hf_api


@contextmanager
def running_hub(monkeypatch) -> Iterator:
    """The server, or a skip; the client has the token `hf_test`, which may write."""
    path = os.environ.get("FORESIGHT_HUB_SERVER")
    if not path:
        pytest.skip("FORESIGHT_HUB_SERVER names no server")
    spec = importlib.util.spec_from_file_location("hub_server", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.HubServer() as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)  # of the functions that need no HfApi
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield hub
