"""python -m realm_jax.cli"""

from realm_jax.cli import main

main()
