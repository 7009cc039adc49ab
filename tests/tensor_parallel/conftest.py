from __future__ import annotations

import pytest

from tests.tensor_parallel.support import Check, run_checks


class Outcomes:
    """What came of the session's checks on ranks: those of a layout all run in one start of ranks, at the first question."""

    def __init__(self, session: pytest.Session) -> None:
        self._session = session
        self._known: dict[str, dict[Check, str | None]] = {}

    def error(self, layout: str, check: Check) -> str | None:
        """A check's traceback, None if it passed."""
        if layout not in self._known:
            items = [item for item in self._session.items if isinstance(item, pytest.Function) and hasattr(item.function, "check")]
            chosen = [item.function.check for item in items if item.callspec.params["layout"] == layout]
            self._known[layout] = run_checks(layout, [(function.__module__, function.__name__) for function in chosen])
        return self._known[layout][check]


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return Outcomes(request.session)
