"""How a process ends while a thread is at work that cannot be called off."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys, threading
from phi3_jax.system.leaving import begin, leave
forever = threading.Event()
begin(forever.wait if sys.argv[1] == "works" else lambda: None, "a compiler").join(0.01)
print("phi3-jax: what was wrong", end="")
leave(2)
print(", and went on")
"""


@pytest.mark.parametrize(("what", "said", "status"), [("works", "", 2), ("is done", ", and went on\n", 0)])
def test_a_process_does_not_wait_for_a_compiler(what, said, status):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == (f"phi3-jax: what was wrong{said}", "", status)
