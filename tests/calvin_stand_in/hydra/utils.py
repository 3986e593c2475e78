"""`instantiate` of a config."""

from pydoc import locate


def instantiate(config, **more):
    arguments = {**config, **more}
    return locate(arguments.pop("_target_"))(**arguments)
