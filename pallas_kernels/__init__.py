"""Kernels for language models on JAX. Depends on jax alone; never imports realm_jax."""
