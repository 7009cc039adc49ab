"""Saving, finding and loading training states."""
