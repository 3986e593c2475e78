"""Unpickle data that others pickled: nothing but numpy's types and plain values.

A pickle may call any function. CALVIN's annotations and LeRobot's messages to a policy server are pickles.
"""

import importlib
import pickle
import re

__all__ = ["NumpyUnpickler"]

# All that numpy needs to unpickle arrays and scalars.
NUMPY_PICKLES = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


class NumpyUnpickler(pickle.Unpickler):
    """Refuses everything but numpy's types, plain values and the classes of `allowed`."""

    allowed: frozenset[type] = frozenset()

    def find_class(self, module: str, name: str):
        """The class or function that a pickle names."""
        module = re.sub(r"^numpy\.core\b", "numpy._core", module)  # as numpy before 2 called it
        for kind in self.allowed:
            if (module, name) == (kind.__module__, kind.__qualname__):
                return kind
        if (module, name) not in NUMPY_PICKLES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return getattr(importlib.import_module(module), name)
