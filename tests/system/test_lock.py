"""One run at a time in a folder."""

import subprocess
import sys

import pytest

from phi3_jax import InputError
from phi3_jax.system.lock import RunLock, check_not_held

HOLD = """
import sys, pathlib
from phi3_jax.system.lock import RunLock
RunLock.take(pathlib.Path(sys.argv[1])); print("held", flush=True); sys.stdin.read()
"""


def test_a_folder_is_held_until_its_process_lets_go(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"another run is writing there \(process {other.pid} on "):
            check_not_held(tmp_path)
        other.communicate()
    check_not_held(tmp_path)
    lock = RunLock.take(tmp_path)
    lock.release()
    assert list(tmp_path.iterdir()) == []
