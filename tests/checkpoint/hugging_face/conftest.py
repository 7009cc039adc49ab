"""A process group of one, as the tests of the model have it."""

from __future__ import annotations

from tests.model.conftest import mesh as mesh
