"""The jobs of a sweep, read from their folders once they have ended: which there are, how each went, as a table, a file and a picture."""
