"""Predictor families: one file each."""
