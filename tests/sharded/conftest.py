"""These tests see eight CPU devices. They run in a process of their own, which tests/test_sharded.py starts."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
