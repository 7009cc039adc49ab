"""Schedules as data, their validator, and the engine that runs them over send and receive."""
