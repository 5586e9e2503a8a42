"""`phi3-jax export` as a script: `export_peft.py ADAPTER --merge --output DIR`."""

import sys

from phi3_jax.cli import main

sys.exit(main(["export", *sys.argv[1:]]))
