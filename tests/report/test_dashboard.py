"""The dashboard: the views it answers with, what it learns while runs train, and whom it does not answer."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from ctxlab.report.dashboard import HEADER, MOST, Dashboard
from ctxlab.report.listing import Listed
from tests.records.builders import make_run
from tests.report.builders import repetitions
from tests.report.test_page import EVIL, Elements, hostile, with_everything

TOKEN, PORT = "the-right-token", 7777
SECRET = "nobody may read this"


def client(root: Path, **headers: str) -> TestClient:
    dashboard = Dashboard(root, TOKEN, PORT, "/* vega */")
    return TestClient(dashboard.app(), base_url=f"http://127.0.0.1:{PORT}", headers=headers, follow_redirects=False)


def view(root: Path, query: str = "") -> dict[str, Any]:
    answer = client(root, **{HEADER: TOKEN}).get(f"/api/view?{query}")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def drawn(told: dict[str, Any], figure: str) -> list[dict[str, Any]]:
    """The points of a figure."""
    return [
        row
        for spec in told["figures"][figure]
        for layer in spec["layer"]
        if layer.get("name") == "points"
        for row in layer["data"]["values"]
    ]


def test_the_page_brings_its_own_script_and_lets_no_other_run(tmp_path: Path) -> None:
    first, second = (client(tmp_path).get(f"/?token={TOKEN}") for _ in range(2))
    policies = [answer.headers["content-security-policy"] for answer in (first, second)]
    assert policies[0] != policies[1]  # a number used once
    nonce = policies[0].partition("'nonce-")[2].partition("'")[0]
    assert len(nonce) >= 16
    assert "script-src 'nonce-" in policies[0]
    assert "unsafe-eval" not in policies[0]
    assert "frame-ancestors 'none'" in policies[0]
    scripts = [a for tag, a in Elements(first.text).elements if tag == "script" and a.get("type") != "application/json"]
    assert len(scripts) == 4
    assert {a["nonce"] for a in scripts} == {nonce}
    assert first.headers["referrer-policy"] == "no-referrer"  # the token is in the address
    assert first.headers["cache-control"] == "no-store"
    assert first.headers["x-content-type-options"] == "nosniff"


def test_a_view_is_what_the_query_says(tmp_path: Path) -> None:
    runs = repetitions(tmp_path)
    told = view(tmp_path)
    assert set(told["chosen"]) == {run.id for run in runs}
    assert {row["line"] for row in drawn(told, "perplexity-by-context")} == {"rope", "alibi"}
    told = view(tmp_path, f"runs={runs[0].id},{runs[1].id}&group=seed&metric=bits_per_byte")
    assert set(told["chosen"]) == {runs[0].id, runs[1].id}
    assert {row["line"] for row in drawn(told, "bits-per-byte-by-context")} == {"seed 1", "seed 2"}
    assert all(run.id in told["main"] for run in runs)  # the table has every run, to choose from
    assert {"position", "seed"} <= set(told["keys"])
    assert ">position</button>" in told["main"]


def test_a_copied_link_shows_the_same_in_another_browser(tmp_path: Path) -> None:
    runs = with_everything(tmp_path)
    query = f"runs={runs[0].id}&group=position&smooth=0.5&log=xy&outliers=hide"
    assert view(tmp_path, query) == view(tmp_path, query)
    assert view(tmp_path, query)["figures"] != view(tmp_path, f"runs={runs[0].id}")["figures"]


def test_it_learns_what_a_run_writes_and_is_quiet_when_nothing_has_changed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for step in (1, 2):
        run.log(
            {"step": step, "tokens": 10 * step, "split": "train", "nats_per_token": 4.0, "attempt": 1, "seconds": 1.0}
        )
    told = view(tmp_path)
    assert [row["x"] for row in drawn(told, "train-loss")] == [10, 20]
    again = view(tmp_path, f"stamp={told['stamp']}")
    assert again == {"stamp": told["stamp"]}
    run.log({"step": 3, "tokens": 30, "split": "train", "nats_per_token": 3.0, "attempt": 1, "seconds": 1.0})
    now = view(tmp_path, f"stamp={told['stamp']}")
    assert [(row["x"], row["y"]) for row in drawn(now, "train-loss")] == [(10, 4.0), (20, 4.0), (30, 3.0)]
    assert view(tmp_path, f"stamp={told['stamp']}&group=seed")["stamp"] != now["stamp"]
    run.finish("failed", "the disk is full")
    assert "the disk is full" in view(tmp_path, f"stamp={now['stamp']}")["main"]


def test_a_new_run_and_one_that_is_gone(tmp_path: Path) -> None:
    first = make_run(tmp_path, status="done")
    told = view(tmp_path)
    second = make_run(tmp_path, status="done")
    assert second.id in view(tmp_path, f"stamp={told['stamp']}")["main"]
    assert view(tmp_path, "runs=nowhere-abcd")["chosen"] == []
    assert view(tmp_path, f"runs={first.id},nowhere-abcd")["chosen"] == [first.id]
    assert "There are no runs here yet" in view(tmp_path / "empty")["facts"][0]


def test_the_table_is_filtered_and_sorted_where_all_runs_are_known(tmp_path: Path) -> None:
    """Best first, those without a result last, either way round; a filter's words are all asked for, of any column."""
    runs = repetitions(tmp_path)  # three seeds of rope, then of alibi, each a little better
    waiting = make_run(tmp_path, status="waiting", config={"position": {"name": "alibi"}})
    best = [runs[n].id for n in (3, 0, 4, 1, 5, 2)]
    assert view(tmp_path, "sort=perplexity")["found"] == [*best, waiting.id]
    assert view(tmp_path, "sort=perplexity:descending")["found"] == [*best[::-1], waiting.id]
    assert view(tmp_path, "sort=perplexity&filter=ALIBI%20done")["found"] == [runs[n].id for n in (3, 4, 5)]
    told = view(tmp_path, "filter=no-such-word")
    assert told["found"] == []
    assert "0 of 7" in told["main"]
    assert view(tmp_path, f"runs={runs[2].id}")["found"][0] == runs[2].id  # the chosen ones first


def test_of_many_runs_the_table_has_some_and_the_filter_finds_the_others(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, status="done", note=f"number-{n}-") for n in range(205)]
    told = view(tmp_path)
    assert told["main"].count("data-run=") == 200
    assert "205 of 205, the first 200 shown" in told["main"]
    for n in (0, 204):
        assert view(tmp_path, f"filter=number-{n}-")["found"] == [runs[n].id]


def test_so_many_runs_and_no_more_are_drawn_at_once(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, status="done") for _ in range(MOST + 3)]
    told = view(tmp_path, "runs=" + ",".join(run.id for run in runs))
    assert len(told["chosen"]) == MOST
    assert f"3 are not here, or more than {MOST}" in told["facts"][1]


@pytest.mark.parametrize("query", ["smooth=2", "smooth=x", "metric=loss", "metric=%3Cscript%3E"])
def test_a_query_that_says_nothing_is_answered_with_why(tmp_path: Path, query: str) -> None:
    answer = client(tmp_path, **{HEADER: TOKEN}).get(f"/api/view?{query}")
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    assert query.partition("=")[0] in answer.json()["problem"]


def test_nothing_of_a_record_becomes_an_element_or_a_script(tmp_path: Path) -> None:
    with_everything(tmp_path / "plain")
    hostile(tmp_path / "evil")
    plain, evil = (view(tmp_path / name) for name in ("plain", "evil"))
    elements = Elements(evil["main"])
    assert elements.scripts == []
    assert {tag for tag, _ in elements.elements} == {tag for tag, _ in Elements(plain["main"]).elements}
    assert not [name for _, attributes in elements.elements for name in attributes if name.startswith("on")]
    assert evil["main"].count("&lt;script&gt;alert(2)") > 10
    assert EVIL in json.dumps(evil["keys"], ensure_ascii=False).replace('\\"', '"')


@pytest.mark.parametrize("path", ["/", "/api/view", "/nowhere", "/page.js"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({HEADER: ""}, 401),
        ({HEADER: TOKEN[:-1]}, 401),
        ({HEADER: TOKEN + "x"}, 401),
        ({"cookie": f"token={TOKEN}"}, 401),
        ({"host": f"evil.example:{PORT}", HEADER: TOKEN}, 421),
        ({"host": "127.0.0.1", HEADER: TOKEN}, 421),  # another port
        ({"host": f"127.0.0.1.evil.example:{PORT}", HEADER: TOKEN}, 421),
        ({"host": "", HEADER: TOKEN}, 421),
        ({"origin": "http://evil.example", HEADER: TOKEN}, 403),
        ({"origin": "null", HEADER: TOKEN}, 403),
    ],
)
def test_nobody_else_is_answered(tmp_path: Path, path: str, headers: dict[str, str], status: int) -> None:
    run = make_run(tmp_path)
    answer = client(tmp_path, **headers).get(path)
    assert answer.status_code == status
    assert run.id not in answer.text
    assert answer.headers["cache-control"] == "no-store"


def test_the_token_is_read_where_it_belongs(tmp_path: Path) -> None:
    """In the address of the page, in a header of what its script asks: an address alone gets no data."""
    assert client(tmp_path).get(f"/?token={TOKEN}").status_code == 200
    assert client(tmp_path, **{HEADER: TOKEN}).get("/").status_code == 401
    assert client(tmp_path).get(f"/api/view?token={TOKEN}").status_code == 401
    for name in ("localhost", "[::1]", "LOCALHOST"):
        assert client(tmp_path, host=f"{name}:{PORT}", **{HEADER: TOKEN}).get("/api/view").status_code == 200


@pytest.mark.parametrize("method", ["post", "put", "delete", "options", "patch"])
def test_nothing_can_be_changed(tmp_path: Path, method: str) -> None:
    assert getattr(client(tmp_path, **{HEADER: TOKEN}), method)("/api/view").status_code == 405


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A real server over a folder of runs that has a secret beside it."""
    (tmp_path / "secret.txt").write_text(SECRET)
    make_run(tmp_path / "runs", note="in the folder")
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    config = uvicorn.Config(Dashboard(tmp_path / "runs", TOKEN, port, "").app(), log_level="critical", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield port, tmp_path
    server.should_exit = True
    thread.join(timeout=20)


def raw(port: int, request: bytes) -> bytes:
    """What comes back for these very bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
        line.sendall(request)
        answer = b""
        while part := line.recv(65536):
            answer += part
    return answer


def test_no_path_leads_out_of_the_folder(served: tuple[int, Path]) -> None:
    port, folder = served
    host = f"Host: 127.0.0.1:{port}\r\nConnection: close\r\n{HEADER}: {TOKEN}\r\n\r\n".encode()
    assert b"in the folder" in raw(port, b"GET /api/view HTTP/1.1\r\n" + host)
    ways = [
        "/../secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt", "//secret.txt", f"/{folder}/secret.txt",
        "/.%2e/%2e%2e/etc/passwd", "/api/../../secret.txt", "/api/view/../../../secret.txt", "/api/view?runs=../secret.txt",
        "/api/view?runs=..%2f..%2fetc%2fpasswd",
        f"/api/view?runs={folder}/secret.txt", "/api/view?runs=%00", "/runs", "/index.sqlite", f"http://127.0.0.1:{port}/../secret.txt",
        "/api/view?group=../../secret.txt", "/static/..%5c..%5csecret.txt",
    ]  # fmt: skip
    for way in ways:
        answer = raw(port, f"GET {way} HTTP/1.1\r\n".encode() + host)
        assert SECRET.encode() not in answer
        assert b"root:" not in answer
        status = answer.split(b" ", 2)[1] if answer else b"closed"
        assert status in ((b"200", b"404") if way.startswith("/api/view?") else (b"404", b"400", b"401", b"closed")), (
            way
        )


def test_bytes_that_no_browser_sends(served: tuple[int, Path]) -> None:
    """Two hosts, no host, the host of another in the request line, a token in pieces: nothing is served."""
    port, _ = served
    ours, token = f"Host: 127.0.0.1:{port}\r\n", f"{HEADER}: {TOKEN}\r\n"
    requests = [
        f"GET /api/view HTTP/1.1\r\n{token}\r\n",
        f"GET /api/view HTTP/1.0\r\n{token}\r\n",
        f"GET /api/view HTTP/1.1\r\nHost: evil.example\r\n{ours}{token}\r\n",
        f"GET /api/view HTTP/1.1\r\n{ours}Host: evil.example\r\n{token}\r\n",
        f"GET /api/view HTTP/1.1\r\nHost: evil.example:{port}\r\nX-Forwarded-Host: 127.0.0.1:{port}\r\n{token}\r\n",
        f"GET /api/view HTTP/1.1\r\n{ours}\r\n",
        f"GET /api/view HTTP/1.1\r\n{ours}{HEADER}: {TOKEN[:4]}\r\n{HEADER}: {TOKEN[4:]}\r\n\r\n",
        f"GET /api/view HTTP/1.1\r\n{ours}{HEADER}: \xff\xfe\r\n\r\n",
        f"GET /?token=%ff%fe HTTP/1.1\r\n{ours}\r\n",
        "\x16\x03\x01 not even HTTP\r\n\r\n",
    ]
    for request in requests:
        answer = raw(port, request.encode("latin-1").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        assert b"in the folder" not in answer
        assert b" 200 " not in answer.split(b"\r\n", 1)[0], request
    good = f"GET /api/view HTTP/1.1\r\n{ours}Connection: close\r\n{token}\r\n"
    assert b" 200 " in raw(port, good.encode()).split(b"\r\n", 1)[0]  # and it is still there


def test_rows_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ctxlab.report import dashboard

    runs = [make_run(tmp_path, status="done") for _ in range(3)]
    library = dashboard.Library(tmp_path)
    library.rows(library.summaries())
    made: list[str] = []
    whole = dashboard._row

    def counted(one: Any) -> Listed:
        made.append(one.id)
        return whole(one)

    monkeypatch.setattr(dashboard, "_row", counted)
    runs[1].update(note="changed")
    rows = library.rows(library.summaries())
    assert made == [runs[1].id]
    assert {row.note for row in rows} == {"", "changed"}


def test_it_is_made_from_records_alone() -> None:
    code = "import sys, ctxlab.report.dashboard; print({'torch', 'lightning', 'hydra', 'altair'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
