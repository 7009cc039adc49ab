"""Optimizers, learning-rate schedules, and the whole model's gradient norm."""
