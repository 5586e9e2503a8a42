"""`phi3-jax generate` as a script."""

import sys

from phi3_jax.cli import main

sys.exit(main(["generate", *sys.argv[1:]]))
