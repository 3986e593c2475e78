import platform
import subprocess
import sys

import pytest

# In its own process: what other tests have freed would go back too.
HOLES = """
import re
from datasets_scripts.storage.videos.freed_memory import return_freed_memory

def own_mb():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) / 1e3

blocks = [bytearray(50_000) for _ in range(2000)]  # 100 MB, each too small for a mapping of its own
kept = blocks[::20]
del blocks
before_mb = own_mb()
return_freed_memory()
print(before_mb - own_mb())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators return memory by themselves")
def test_memory_between_kept_blocks_goes_back():
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 50
