"""Markers that the common tests of transformers carry (`test_transformers_common.py`)."""

THEIR_MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "generate",
    "order",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config):
    for name in THEIR_MARKERS:
        config.addinivalue_line("markers", f"{name}: set by the common tests of transformers")
