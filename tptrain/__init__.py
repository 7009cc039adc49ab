"""tptrain trains a GPT split over processes by tensor, pipeline and data parallelism."""

__version__ = "0.1.0"
