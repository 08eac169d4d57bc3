"""Tasks that work on large arrays use their memory again instead of having the kernel clear new pages each time."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from cluster.memory import keep_freed_memory

def faults_of_64_mib():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

new = [faults_of_64_mib() for _ in range(2)][1]
keep_freed_memory()
print(new, [faults_of_64_mib() for _ in range(2)][1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    new, kept = map(int, done.stdout.split())
    assert kept < new / 4
