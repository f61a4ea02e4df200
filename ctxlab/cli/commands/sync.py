"""`ctxlab sync`: uploads what offline runs have kept for Weights & Biases, one run after the other, each within a time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ctxlab.cli.flags import FlagParser, runs_folder
from ctxlab.errors import ConfigError
from ctxlab.units import format_seconds, parse_seconds

if TYPE_CHECKING:
    from ctxlab.records.run import Run

_HELP = """Uploads the Weights & Biases mirrors of offline runs: of the runs given, or of all that have not been uploaded.
A run that could not be uploaded whole is tried again the next time."""
_ANSWER_SECONDS = 10.0  # for a server to say anything at all
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def run(argv: list[str]) -> int:
    """Uploads and says of each run how it went: 0 all are there, 1 some are not. Raises ConfigError before the first."""
    parser = FlagParser("ctxlab sync", _HELP)
    parser.add_argument(
        "runs_to_upload", nargs="*", metavar="RUN", help="an id, a unique prefix of one, a path, or last"
    )
    parser.add_argument("--timeout", default="5min", metavar="TIME", help="for one run (default 5min)")
    parser.add_argument("--dry-run", action="store_true", help="only says what would be uploaded")
    parser.add_argument(
        "--workspace",
        metavar="ENTITY/PROJECT",
        help="saves the charts there, as a workspace and a report, and uploads nothing",
    )
    parser.add_argument("--again", action="store_true", help="also what has been uploaded before")
    given = parser.read(argv)
    try:
        timeout = parse_seconds(given.timeout)
    except ValueError as error:
        raise ConfigError(f"ctxlab sync: --timeout: {error}") from error
    if given.workspace:
        from ctxlab.records.workspace import save

        entity, _, project = given.workspace.partition("/")
        if not entity or not project or "/" in project:
            raise ConfigError(f"sync: --workspace: expected ENTITY/PROJECT, got '{given.workspace}'")
        require_server()
        for address in save((entity, project)):
            print(address)
        return 0
    from ctxlab.records.store import RunStore

    store = RunStore(runs_folder(given))
    runs = [store.resolve(selector) for selector in given.runs_to_upload] or store.runs()
    waiting = [(each, list(mirrors(each, uploaded=given.again))) for each in runs]
    waiting = [(each, folders) for each, folders in waiting if folders and each.record.status != "running"]
    if not waiting:
        print("nothing to upload: every offline run has been, or there is none", file=sys.stderr)
        return 0
    if given.dry_run:
        for each, folders in waiting:
            print(f"{each.id}: {', '.join(str(folder) for folder in folders)}")
        return 0
    require_server()
    n_failed = 0
    for place, (each, folders) in enumerate(waiting, 1):
        print(f"[{place}/{len(waiting)}] {each.id}", file=sys.stderr)
        problem = next(filter(None, (upload(folder, timeout) for folder in folders)), None)
        n_failed += problem is not None
        print(f"{each.id}: {problem or 'uploaded'}", flush=True)
    return 1 if n_failed else 0


def mirrors(run: Run, *, uploaded: bool) -> Iterator[Path]:
    """The offline mirrors of a run, in order of their start; a resumed run has several. `uploaded`: those too that were."""
    for folder in sorted((run.path / "wandb").glob("offline-run-*")):
        if uploaded or not list(folder.glob("*.wandb.synced")):
            yield folder


def require_server() -> None:
    """Raises ConfigError without a key, and where W&B's server does not answer."""
    import wandb

    from ctxlab.records.wandb_sink import require_key

    host = wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url
    try:
        require_key(wandb)
    except ConfigError as error:
        why = str(error).removeprefix("logger.mode: ").partition(";")[0]
        raise ConfigError(f"sync: {why.replace('online needs', 'uploading needs')}") from error
    try:
        urllib.request.urlopen(host, timeout=_ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"sync: {host} does not answer ({reason}); nothing was uploaded") from error


def upload(folder: Path, timeout: float) -> str | None:
    """Uploads one mirror by `wandb sync`; what went wrong, or None."""
    line = [sys.executable, "-m", "wandb", "sync", "--include-synced", str(folder)]
    child = subprocess.Popen(
        line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"not uploaded within {format_seconds(timeout)}; type it again to go on, or give --timeout more"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)  # with wandb's helper process; what the server has, it keeps
            child.wait()
    lines = [_COLOURS.sub("", line).strip() for line in said.splitlines() if line.strip()]
    if child.returncode == 0 and list(folder.glob("*.wandb.synced")):
        return None
    return lines[-1] if lines else f"exit code {child.returncode}"
