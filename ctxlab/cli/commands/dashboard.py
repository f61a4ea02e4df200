"""`ctxlab dashboard`: the runs of a folder in the browser, live, on this machine alone."""

from __future__ import annotations

import contextlib
import secrets
import socket
import sys
from pathlib import Path

from ctxlab.cli.flags import FlagParser, runs_folder
from ctxlab.errors import ConfigError, RecordError

_HELP = """The runs of a folder in the browser: the page of `ctxlab report`, live while they train.

It listens on 127.0.0.1 alone and answers whoever has the address that it prints, token and all. The address holds the view:
which runs are drawn, how they are grouped, scales, filter and order. Reads files only; Ctrl-C ends it."""
_PORT = 7341  # asked for first, so that an address is easy to recognise


def run(argv: list[str]) -> int:
    """Serves until it is interrupted. Raises RecordError for a folder that is not there, ConfigError for a port that is taken."""
    parser = FlagParser("ctxlab dashboard", _HELP)
    parser.add_argument("folder", nargs="?", metavar="DIR", help="folder of the run records, instead of --runs")
    parser.add_argument("--port", type=int, metavar="N", help=f"instead of {_PORT}, or a free one where that is taken")
    parser.add_argument("--open", action="store_true", help="opens the browser too")
    given = parser.read(argv)
    if given.port is not None and not 0 <= given.port < 65536:
        raise ConfigError(f"--port: expected a number from 0 to 65535, got {given.port}")
    root = Path(given.folder).expanduser() if given.folder else runs_folder(given)
    if not root.is_dir():
        raise RecordError(f"dashboard: there is no folder {root}")
    import uvicorn

    from ctxlab.cache import default_cache
    from ctxlab.report.dashboard import Dashboard
    from ctxlab.report.vega import bundle

    with _listening(given.port) as listener:
        port = listener.getsockname()[1]
        dashboard = Dashboard(root, secrets.token_urlsafe(24), port, bundle(default_cache()))
        dashboard.library.read()  # before anybody waits for it
        print(f"{dashboard.address()}\n{root}, on this machine alone; Ctrl-C ends it", flush=True)
        if given.open:
            import webbrowser

            webbrowser.open(dashboard.address())
        config = uvicorn.Config(
            dashboard.app(), log_level="warning", access_log=False, server_header=False, proxy_headers=False, ws="none",
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    print("ended", file=sys.stderr)
    return 0


def _listening(port: int | None) -> socket.socket:
    """A socket that listens on the loopback interface. Raises ConfigError where the port that was asked for is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", _PORT if port is None else port))
    except OSError as error:
        if port is not None:
            listener.close()
            raise ConfigError(f"--port: {port} cannot be listened on: {error.strerror or error}") from error
        listener.bind(("127.0.0.1", 0))
    listener.listen()  # before its address is said
    return listener
