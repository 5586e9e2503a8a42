"""`phi3-jax chat` as a script."""

import sys

from phi3_jax.cli import main

sys.exit(main(["chat", *sys.argv[1:]]))
