"""`ctxlab dashboard`: an address that works until it is interrupted, on this machine alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.cli.lines import ctxlab
from tests.records.builders import make_run


def test_it_serves_the_address_that_it_prints_and_ends_in_peace(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    code = (
        "import sys; from ctxlab.cli.main import main; import ctxlab.report.vega as vega; vega.bundle = lambda cache: ''; "
        "sys.exit(main(['dashboard', 'runs', '--port', '0']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            address = child.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:")
            page = urllib.request.urlopen(address, timeout=30).read().decode()
            assert "Draw the newest" in page
            base, _, token = address.partition("?token=")
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(base, timeout=30)
            asked = urllib.request.Request(f"{base}api/view", headers={"x-ctxlab-token": token})
            assert run.id in urllib.request.urlopen(asked, timeout=30).read().decode()
        finally:
            os.kill(child.pid, signal.SIGINT)
        assert child.wait(timeout=30) == 0


def test_it_listens_to_this_machine_alone() -> None:
    from ctxlab.cli.commands.dashboard import _listening

    with _listening(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_what_is_refused_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ctxlab("dashboard", "nowhere").errors == ["dashboard: there is no folder nowhere"]
    assert ctxlab("dashboard", "--port", "70000", ".").errors == [
        "--port: expected a number from 0 to 65535, got 70000"
    ]
    monkeypatch.setattr("ctxlab.report.vega.bundle", lambda cache: "")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = ctxlab("dashboard", "--port", str(port), ".")
    assert done.code == 2
    assert done.errors[0].startswith(f"--port: {port} cannot be listened on: ")
