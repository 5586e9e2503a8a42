"""`phi3-jax evaluate` as a script."""

import sys

from phi3_jax.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
