import nanochat  # noqa: F401 (says so where the environment is not active)
