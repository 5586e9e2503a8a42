"""`phi3-jax train` as a script."""

import sys

from phi3_jax.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
