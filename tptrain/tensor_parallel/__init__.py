"""Layers, loss and collectives of a model whose tensors are split over a group of ranks."""
