"""Runnable studies: Hydra entry points that compose predictors and the offload runtime."""
