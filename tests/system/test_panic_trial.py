"""The process in which texts are tokenised to see whether the library gives up."""

import json
import subprocess
import sys

from tests.helpers.tokenizers import phi3_tokenizer


def test_what_can_be_tokenised_is_silent():
    state = phi3_tokenizer(None).backend_tokenizer.to_str()
    command = [sys.executable, "-m", "phi3_jax.system.panic_trial"]
    done = subprocess.run(command, input=json.dumps([state, ["the cat"]]), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
