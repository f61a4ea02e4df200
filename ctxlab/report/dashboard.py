"""The page of `ctxlab report`, live: what runs come to while they train, any of them, grouped and drawn as one likes.

Two answers: the page itself, and what a view of it shows. A view is a query, so that an address opens the same view anywhere.

It listens on this machine alone, and a browser is no friend: any page that it has open may send requests here. So every request
has to name this machine as its host, in so many words (a name that an attacker has pointed here is not one), and to bring a
token that only who started the dashboard has seen; answers may be framed, sniffed and referred to by nobody, and scripts run
only those of the page, by a number used once. No path is ever taken from a request: runs are looked for by their ids among those
in the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ctxlab.errors import ConfigError, RecordError
from ctxlab.records.index import RunIndex, Summary
from ctxlab.records.run import MEASUREMENTS_FILE, METRICS_FILE, RUN, Run
from ctxlab.report.figures import figures
from ctxlab.report.groups import METRICS, View, differing
from ctxlab.report.listing import Listed, noted, runs_table
from ctxlab.report.markup import Html, tag
from ctxlab.report.page import Told, file_text, fill, tell
from ctxlab.report.results import settings
from ctxlab.report.subjects import SPLITS, Curve, Subject, subjects_of

HEADER = "x-ctxlab-token"
MOST = 100  # runs that are drawn at once
_ROWS = 200  # of the table of runs; the others are found by its filter
_NEWEST = 12  # that are drawn when none is chosen
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; script-src 'nonce-{nonce}'"
)
_HEADERS = {
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


_METRIC_WORDS = {
    "perplexity": "perplexity", "nats_per_token": "loss", "bits_per_byte": "bits per byte",
    "word_perplexity": "perplexity per word",
}  # fmt: skip


class Library:
    """The runs of a folder as the dashboard reads them: all of them in a list, some of them with their results and curves."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.index = RunIndex(root)
        self._rows: dict[str, tuple[str, str, Listed]] = {}
        self._differing: tuple[list[Listed], list[str]] = ([], [])

    def read(self) -> None:
        """Reads all that a first view wants to know of every run."""
        self.differing(self.rows(self.summaries()))

    def summaries(self) -> list[Summary]:
        return self.index.summaries()

    def rows(self, summaries: Sequence[Summary]) -> list[Listed]:
        """A row of the table for each; those whose files are as they were are not made again."""
        kept, now = self._rows, {}
        for one in summaries:
            known = kept.get(one.id)
            if known is None or known[:2] != (one.written, one.measured):
                known = (one.written, one.measured, _row(one))
            now[one.id] = known
        self._rows = now
        return [row for _, _, row in now.values()]

    def differing(self, rows: list[Listed]) -> list[str]:
        """The settings in which rows differ, what they can be grouped by; looked for anew when a row is another."""
        known, keys = self._differing
        if len(known) != len(rows) or any(a is not b for a, b in zip(known, rows)):
            keys = differing([row.settings for row in rows])
            self._differing = (rows, keys)
        return keys

    def subjects(self, chosen: Sequence[Summary]) -> list[Subject]:
        """The chosen runs with their results and thinned curves, oldest first."""
        runs = []
        for one in chosen:
            try:
                runs.append(Run(one.path))
            except RecordError:  # gone since it was listed
                continue
        found = subjects_of(runs[::-1])
        curves: dict[str, dict[str, Curve]] = {}
        for split in SPLITS:
            for name in ("nats_per_token", "loss"):
                for run_id, curve in self.index.curves(chosen, name, split=split).items():
                    points = [(int(x), y) for x, y in zip(curve.tokens, curve.values, strict=True)]
                    curves.setdefault(run_id, {}).setdefault(split, points)
        for subject in found:
            if subject.own is None:
                subject.thinned = curves.get(subject.id, {})
        return found


def _row(one: Summary) -> Listed:
    record = json.loads(one.written)
    results = {name: r.value for (name, at), r in one.results.items() if at == one.context and r.value is not None}
    return Listed(
        one.id, one.status, settings(record["config"]), results, one.context, None, record["reason"],
        record["parameters"].get("all"), record["wall_seconds"], record["started"] or "", noted(record["tags"], record["note"]),
    )  # fmt: skip


@dataclass
class Dashboard:
    """One folder of runs, one token. `script` is what draws: `vega.bundle`."""

    root: Path
    token: str
    port: int
    script: str
    library: Library = field(init=False)

    def __post_init__(self) -> None:
        self.library = Library(self.root)

    @property
    def hosts(self) -> frozenset[str]:
        return frozenset(f"{name}:{self.port}" for name in ("127.0.0.1", "localhost", "[::1]"))

    def address(self, query: str = "") -> str:
        return f"http://127.0.0.1:{self.port}/?token={self.token}{'&' if query else ''}{query}"

    def app(self) -> ASGIApp:
        routes = [Route("/", self._page), Route("/api/view", self._view)]
        return Guard(Starlette(routes=routes), self)

    async def _page(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = _POLICY.format(nonce=nonce)
        text = fill(
            Told(tag("p", "Reading the runs …", class_="soft"), {}), heading=f"Runs in {self.root}", facts=(),
            scripts=[file_text("dashboard_first.js"), self.script, file_text("page.js"), file_text("dashboard.js")],
            policy=None, nonce=nonce, controls=_controls(),
        )  # fmt: skip
        return HTMLResponse(text, headers={"content-security-policy": policy})

    async def _view(self, request: Request) -> Response:
        query = dict(request.query_params)
        known = query.pop("stamp", "")
        try:
            view = View.of_query(query)
        except ConfigError as error:
            return JSONResponse({"problem": str(error)}, status_code=400)
        stamp, told = await run_in_threadpool(self._told, view, known)
        return JSONResponse({"stamp": stamp, **(told or {})})

    def _told(self, view: View, known: str) -> tuple[str, dict[str, Any] | None]:
        """What a view shows; None where it is what the browser has already."""
        summaries = self.library.summaries()
        chosen = _chosen(summaries, view)
        stamp = _stamp(summaries, chosen, view)
        if stamp == known:
            return stamp, None
        rows = self.library.rows(summaries)
        subjects = self.library.subjects(chosen)
        ids = [one.id for one in chosen]
        keys = self.library.differing(rows)
        table = runs_table(rows, ids, words=view.filter, sort=view.sort, most=_ROWS, differ=keys)
        told = tell(subjects, figures(subjects, view), table_of_runs=table.html)
        return stamp, {
            "main": told.main, "figures": told.figures, "chosen": ids, "found": table.found[:MOST], "keys": keys,
            "facts": _facts(rows, chosen, view, subjects),
        }  # fmt: skip


class Guard:
    """Lets pass what names this machine as host, comes from its own page or from none, and brings the token."""

    def __init__(self, app: ASGIApp, dashboard: Dashboard) -> None:
        self.app, self.dashboard = app, dashboard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        request = Request(scope)
        refusal = self._refusal(request)
        if refusal is not None:
            await refusal(scope, receive, _with_headers(send))
            return
        await self.app(scope, receive, _with_headers(send))

    def _refusal(self, request: Request) -> Response | None:
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self.dashboard.hosts:
            return PlainTextResponse("this host is not served here\n", status_code=421)
        origin = request.headers.get("origin")
        if origin is not None and origin.lower() not in {f"http://{host}" for host in self.dashboard.hosts}:
            return PlainTextResponse("another page may not ask\n", status_code=403)
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("there is nothing to be changed here\n", status_code=405)
        given = request.query_params.get("token") if request.url.path == "/" else request.headers.get(HEADER)
        if not secrets.compare_digest((given or "").encode(), self.dashboard.token.encode()):
            text = "open the address that `ctxlab dashboard` has printed: its token is missing here or an old one\n"
            return PlainTextResponse(text, status_code=401)
        return None


def _with_headers(send: Send) -> Send:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message = {**message, "headers": [*message["headers"], *own]}
        await send(message)

    return sending


def _chosen(summaries: Sequence[Summary], view: View) -> list[Summary]:
    """The runs of a view, newest first, with the evaluations of any; of no view's own those that have run last."""
    if not view.runs:
        return [one for one in summaries if one.status not in ("waiting", "skipped")][:_NEWEST]
    asked = set(view.runs)
    return [one for one in summaries if one.id in asked][:MOST]


def _stamp(summaries: Sequence[Summary], chosen: Sequence[Summary], view: View) -> str:
    """What changes whenever something does that the view shows."""
    about = hashlib.sha256(view.query().encode())
    for one in summaries:
        about.update(f"{one.id} {one.status} {hash((one.written, one.measured))}\n".encode())
    for one in chosen:
        for name in (RUN, METRICS_FILE, MEASUREMENTS_FILE):
            try:
                found = os.stat(one.path / name)
            except OSError:
                continue
            about.update(f"{name} {found.st_mtime_ns} {found.st_size}\n".encode())
    return about.hexdigest()[:24]


def _controls() -> Html:
    def labelled(text: str, *control: Html) -> Html:
        return tag("label", f"{text} ", *control)

    def box(name: str, text: str) -> Html:
        return tag("label", tag("input", type="checkbox", id=name), f" {text}")

    options = [tag("option", _METRIC_WORDS[name], value=name) for name in METRICS]
    return tag(
        "form",
        labelled("Group by", tag("select", tag("option", "what tells them apart", value=""), id="group")),
        labelled("Measure", tag("select", *options, id="metric")),
        labelled("Smooth", tag("input", type="range", id="smooth", min="0", max="0.99", step="0.01", value="0")),
        box("log-x", "log tokens"),
        box("log-y", "log loss"),
        box("outliers", "hide outliers"),
        tag("button", "Draw what the filter finds", type="button", id="draw-found"),
        tag("button", "Draw the newest", type="button", id="draw-newest"),
        tag("button", "Copy link", type="button", id="copy-link"),
        tag("output", "", id="state", role="status"),
        id="controls", class_="controls", aria_label="What is drawn, and how",
    )  # fmt: skip


def _facts(rows: Sequence[Listed], chosen: Sequence[Summary], view: View, subjects: Sequence[Subject]) -> list[str]:
    if not rows:
        return ["There are no runs here yet; make one with: ctxlab train"]
    statuses = [row.status.replace("_", " ") for row in rows]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    lines = [f"{len(rows)} run{'' if len(rows) == 1 else 's'}: {counts}"]
    missing = len(set(view.runs)) - len(chosen)
    if view.runs:
        lines.append(
            f"{len(chosen)} of them drawn" + (f"; {missing} are not here, or more than {MOST}" if missing else "")
        )
    elif len(chosen) < len(rows):
        lines.append(f"the newest {len(chosen)} drawn: choose others in the table")
    return lines
