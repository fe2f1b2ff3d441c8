"""The engine: a host loop with its scheduler, pages and tenants, and the runner that it drives."""
