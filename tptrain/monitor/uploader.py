"""Uploads a W&B recording while it is written, in a process of its own, so that no server can hold up the training.

    python -m tptrain.monitor.uploader RECORDING PARENT

reads the recording as `wandb beta sync --live` does, until the run has ended and all of it is uploaded. It never prompts, gives up where
the server does not answer, and dies with the training's process. What it says is in the recording's `logs/upload.log`.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from tptrain.lifeline import die_with_parent

_ANSWER_SECONDS = 0.5
"""How long the server may take to answer once the run has ended, before the upload is left to `wandb sync`."""
_PATIENCE_SECONDS, _PAUSES_SECONDS = 10.0, (0, 5, 15)
"""How long each of the first questions waits for an answer, and what lies before each of them."""
_QUERY = b'{"query": "query ServerInfo { serverInfo { cliVersionInfo } }"}'
_UPLOADED = ".wandb.synced"
"""The end of the name of a file that wandb leaves beside a recording which is uploaded as a whole."""


class Uploader:
    """The uploading process of one recording, seen from the training's process."""

    def __init__(self, recording: Path) -> None:
        """Starts it. wandb must be set up in this process. recording: the folder."""
        import wandb

        self._server = str(wandb.setup().settings.base_url)
        self._log = recording / "logs" / "upload.log"
        self._failure: str | None = None
        # Without WANDB_SERVICE, which would have it use this process's wandb-core rather than one that can be killed.
        command = ["env", "-u", "WANDB_SERVICE", sys.executable, "-m", __name__, str(recording), str(os.getpid())]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def link(self) -> str | None:
        """Where the run is to be seen, once the server has said so."""
        found = re.search(r"View run .* at (\S+)", self._said())
        return found[1] if found else None

    def failure(self) -> str | None:
        """Why the run is not uploaded, in words; None while that is still open, and where it is uploaded."""
        if self._failure is None and self._process.poll() not in (None, 0):
            self._failure = _complaint(self._said())
        return self._failure

    def finish(self, seconds: float) -> None:
        """Wait for the end of the upload, for so long at most, and only where the server answers; then end the process."""
        if self._process.poll() is None and seconds > 0:
            self._failure = trouble(self._server, min(_ANSWER_SECONDS, seconds))
            if self._failure is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(seconds)
        if self._process.poll() is None and self._failure is None:
            self._failure = f"it was not all uploaded within {seconds:g} s"
        self.kill()

    def kill(self) -> None:
        """End the process, and wandb's with it."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _said(self) -> str:
        try:
            return self._log.read_text(errors="replace")
        except OSError:
            return ""


def _complaint(said: str) -> str:
    """The first error among what wandb said, else its last line."""
    lines = [line.removeprefix("wandb:").strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR").strip() for line in lines if line.startswith("ERROR")]
    return (errors or lines[-1:] or ["its upload ended without a word"])[0].rstrip(".")


def trouble(server: str, seconds: float) -> str | None:
    """What is wrong with a W&B server, or None where it answers a plain question in time, whoever asks."""
    found: list[str | None] = []

    def ask() -> None:
        request = urllib.request.Request(f"{server}/graphql", _QUERY, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=2 * seconds):
                found.append(None)
        except urllib.error.HTTPError as error:
            found.append(f"{server} answers HTTP {error.code}" if error.code >= 500 else None)
        except (OSError, ValueError, http.client.HTTPException) as error:
            known = "CERTIFICATE_VERIFY_FAILED" in str(error)  # a server is there; wandb has certificates of its own
            found.append(None if known else f"{server} cannot be reached")

    thread = threading.Thread(target=ask, name="ask W&B", daemon=True)  # looking a name up knows no limit
    thread.start()
    thread.join(seconds)
    return found[0] if found else f"{server} does not answer"


def upload(recording: Path) -> str | None:
    """Upload a recording until its end. Returns why not all of it was uploaded, or None."""
    import wandb

    # wandb's own limits would have it try for an hour before it says what is wrong.
    limits = wandb.Settings(program="tptrain", x_graphql_retry_max=3, x_graphql_timeout_seconds=20)
    settings = wandb.setup(settings=limits).settings
    reason = None
    for pause_seconds in _PAUSES_SECONDS:
        time.sleep(pause_seconds)
        try:
            wandb.Api(timeout=int(_PATIENCE_SECONDS))  # asks the server whose key it is
            break
        except wandb.errors.UsageError as error:  # there is no key
            return _line(error)
        except Exception as error:
            reason = trouble(settings.base_url, _PATIENCE_SECONDS) or _line(error)
    else:
        return reason
    try:
        importlib.import_module("wandb.cli.cli").cli.main(["beta", "sync", "--live", str(recording)], standalone_mode=False)
    except Exception as error:
        return _line(error)
    return None if any(recording.glob(f"*{_UPLOADED}")) else ""


def _line(error: Exception) -> str:
    """One line, whatever the error's text looks like."""
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    folder = Path(sys.argv[1])
    os.chdir(folder.parents[1])  # wandb's command keeps a log in `wandb/` below the folder where it runs: that of the run
    tempfile.tempdir = str(folder / "logs")  # what wandb leaves there when it is killed is found again
    why = upload(folder)
    if why is not None:
        print(why, flush=True)
        sys.exit(1)
