"""`python -m phi3_jax COMMAND …`, the same as `phi3-jax COMMAND …`."""

import sys

from phi3_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
