# SPDX-License-Identifier: Apache-2.0
import platform
import subprocess
import sys

import pytest

# Eight threads that take memory at once; glibc tells how many heaps they took it from.
CODE = """
import ctypes, sys, tempfile, threading
from virst_ros.heap import use_one_heap
assert not sys.argv[1:] or use_one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
barrier = threading.Barrier(8)
def take():
    barrier.wait()
    kept = [libc.malloc(1000) for _ in range(1000)]
    barrier.wait()
    for address in kept:
        libc.free(address)
threads = [threading.Thread(target=take) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc.fopen.restype = ctypes.c_void_p
with tempfile.NamedTemporaryFile() as file:
    opened = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
    libc.malloc_info(0, opened)
    libc.fclose(opened)
    print(open(file.name).read().count("<heap nr"))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has a heap per thread")
def test_all_threads_share_one_heap():
    def heaps(*arguments):
        done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert heaps("one") == 1
    assert heaps() > 1
