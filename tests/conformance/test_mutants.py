"""Whether these tests would notice a bug: small ones are put into copies of the package, and every copy has to fail.

A mutant is one change in the syntax tree of a file of a positional scheme or of attention: a sign, a border moved by one, a
comparison that takes in its border, sine for cosine. Some are mistakes that have been made before and are written out
(CLASSICS), the others are drawn with a fixed seed from all that can be made (`mutants`). A change that changes no result is
either of a kind that is never made (SKIPPED) or is listed with the reason (EQUIVALENT).

    pytest -n 0 -m slow tests/conformance/test_mutants.py

lists them all, with the test that caught each. For a survivor either the tests lack one, or EQUIVALENT lacks a line.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from ctxlab.model.position.base import POSITIONS

ROOT = Path(__file__).parents[2]
SEED = 9
SCHEMES = [f"position/{name}.py" for name in POSITIONS.names()]
MECHANISMS = [
    f"attention/{name}.py" for name in ("blockwise", "bias", "visible", "fused", "merge", "local", "linear", "flex")
]
DRAWN_OF_A_SCHEME, DRAWN_OF_A_MECHANISM = 1, 3
AT_A_TIME = 2
PATIENCE = 10  # times what all tests take without a mutant: one that has not ended by then never does, and is caught
BYTES = 16 * 2**30  # of address space: one that takes up memory for ever is caught

KERNELS = "tests/model/attention_kernels"
CONFORMANCE = [f"tests/conformance/test_{name}.py" for name in ("positions", "identities", "attentions", "recurrence")]
LOCAL = [CONFORMANCE[2], "-k", "sliding_window or chunked or recurrent"]
EVERYTHING = [*CONFORMANCE, "tests/model"]
# Where a mutant of a file is looked for first; for a scheme, what has its name in CONFORMANCE.
FIRST = {
    "attention/blockwise.py": [f"{KERNELS}/test_blockwise.py"],
    "attention/bias.py": [f"{KERNELS}/test_blockwise.py"],
    "attention/fused.py": [f"{KERNELS}/test_fused.py"],
    "attention/merge.py": [f"{KERNELS}/test_merge.py"],
    "attention/visible.py": LOCAL,
    "attention/local.py": LOCAL,
    "attention/flex.py": [f"{KERNELS}/test_flex.py"],
    "attention/linear.py": [CONFORMANCE[2], "-k", "linear"],
    "attention/full.py": [CONFORMANCE[2], "-k", "full"],
    "attention/base.py": [CONFORMANCE[2], "-k", "full"],
    "position/base.py": [CONFORMANCE[0], "-k", "rope"],
}


class Classic(NamedTuple):
    """In `scope` of `file`, the one expression or statement that reads `found` becomes `put`."""

    file: str
    scope: str
    found: str
    put: str


CLASSICS = [
    # The sign of ALiBi's slope; the slopes in reverse order.
    Classic("position/alibi.py", "slopes", "2 ** (-8 * h / whole)", "-(2 ** (-8 * h / whole))"),
    Classic("position/alibi.py", "slopes", "range(1, whole + 1)", "range(whole, 0, -1)"),
    # T5's buckets: a distance at a border falls into the one before; a bucket begins one too late.
    Classic("position/t5.py", "bucket", "torch.bucketize(size, edges, right=True)", "torch.bucketize(size, edges)"),
    Classic(
        "position/t5.py", "bucket_starts",
        "d ** growing < exact ** (growing - k) * max_distance ** k",
        "d ** growing <= exact ** (growing - k) * max_distance ** k",
    ),
    # RoPE: the other layout; the gradient turned on instead of back; angles too coarse for far positions.
    Classic("position/rope.py", "_turn", "layout == 'interleaved'", "layout != 'interleaved'"),
    Classic("position/rope.py", "_Rotate.backward", "turns.conj()", "turns"),
    Classic(
        "position/rope.py", "Rope.tables",
        "positions.to(torch.float64)[:, None] * self.frequencies(positions.device)",
        "(positions[:, None] * self.frequencies(positions.device)).to(torch.bfloat16)",
    ),
    # Ramps the wrong way round: the slow frequencies kept, the fast pairs decaying least; a head's ladder for its part.
    Classic(
        "position/p_rope.py", "PRope.frequencies",
        "kept[int(self.config.p * len(kept)):] = 0.0", "kept[:-int(self.config.p * len(kept)) or None] = 0.0",
    ),
    Classic("position/xpos.py", "XPos.tables", "k / n + gamma", "1 - k / n + gamma"),
    Classic(
        "position/partial_rope.py", "PartialRope.frequencies",
        "inverse_frequencies(rotated(self.config, self.model), self.config.theta, device)",
        "super().frequencies(device)[:rotated(self.config, self.model) // 2]",
    ),
    # FoX forgets the near and keeps the far; XL's distances, and the sums of Sandwich, begin one off.
    Classic(
        "attention/bias.py", "_DifferenceTiles.block",
        "rows.unsqueeze(-1) + columns.unsqueeze(-2)", "-rows.unsqueeze(-1) - columns.unsqueeze(-2)",
    ),
    Classic(
        "position/transformer_xl.py", "TransformerXL.bias",
        "torch.arange(n_keys, device=q.device)", "torch.arange(1, n_keys + 1, device=q.device)",
    ),
    Classic("position/sandwich.py", "Sandwich.distance_bias", "10000.0 ** (-m / width)", "10000.0 ** (m / width)"),
    # The cached past forgotten: queries counted from the first key; torch's kernel with its other corner.
    Classic("attention/blockwise.py", "_Plan.tiles", "self.span.S - self.span.T", "0"),
    Classic("attention/fused.py", "fused_attention", "causal and T < S", "causal and T > S"),
    # A tile that stops before the query's own key, or leaves one out between itself and the next.
    Classic("attention/blockwise.py", "_Plan.tiles", "min(stop, queries[0] + 1)", "min(stop, queries[0])"),
    Classic("attention/blockwise.py", "_Plan.tiles", "stop = start", "stop = start - 1"),
    # Powers of 2 taken for powers of e; a running sum not scaled to its new maximum.
    Classic("attention/blockwise.py", "_Blockwise.forward", "scale * LOG2_E", "scale"),
    Classic("attention/blockwise.py", "_forward", "total.mul_(decay)", "total"),
    # Weights of merged parts without the largest taken off first.
    Classic("attention/merge.py", "merge", "torch.softmax(lses, dim=0)", "torch.exp(lses) / torch.exp(lses).sum(0)"),
    # A window one too large; chunks that begin one too early; every n-th layer counted from 0; the sink twice.
    Classic("attention/visible.py", "Window.sees", "(i - j).abs() < self.size", "(i - j).abs() <= self.size"),
    Classic("attention/visible.py", "Chunk.sees", "i // self.size == j // self.size",
            "(i + 1) // self.size == (j + 1) // self.size"),
    Classic("attention/visible.py", "Chunk.low", "first // self.size * self.size", "(first + 1) // self.size * self.size"),
    # A memory one segment shorter, one token shorter.
    Classic("attention/visible.py", "Remembered.sees", "self.memory // self.size", "self.memory // self.size - 1"),
    Classic("attention/visible.py", "Remembered.low", "self.memory", "self.memory - 1"),
    Classic("attention/local.py", "is_global", "(layer + 1) % config.global_every", "layer % config.global_every"),
    Classic("attention/base.py", "Attention.attend", "lse - with_sink", "2 * (lse - with_sink)"),
    # The width of the model for that of a head.
    Classic("position/base.py", "Position.scale", "self.model.head_dim", "self.model.d_model"),
]  # fmt: skip

# Functions, classes and variables that nothing is changed in.
SKIPPED = {
    "check": "refuses settings: its messages and limits have tests of their own",
    "n_parameters": "counted against the model itself in tests/model/test_count.py",
    "initialize": "draws parameters, whose values these tests draw themselves",
    "check_position": "refuses schemes, as check does settings",
    "check_training": "refuses rows, as check does settings",
    "_kernel": "which kernel a device has",
    "can_flex": "what a device has a kernel for",
    "_compiled": "needs a CUDA device",
    "_cuda_half": "needs a CUDA device",
    "_cuda_single": "needs a CUDA device",
    "_Scratch": "sizes of buffers that are cut to a tile's shape",
    "side": "how large tiles are: those of any size give the same result",
    "side_of": "how large tiles are",
    "_blocks": "how large tiles are",
    "_options": "needs a CUDA device",
}

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "position/alibi.py",
        "slopes",
        "range(1, 2 * whole + 1, 2) -> range(1, 2 * whole + 2, 2)",
    ): "one slope more at the end of `between`, of which fewer than all are taken",
    (
        "position/t5.py",
        "bucket_starts",
        "(n // 2, n - n // 2) -> (-(-n // 2), n - n // 2)",
    ): "buckets are a multiple of 4, so n is even",
    (
        "position/xpos.py",
        "XPos.tables",
        "positions - self.n_positions // 2 -> positions - -(-self.n_positions // 2)",
    ): "positions count from anywhere: a query's factor and a key's cancel",
    (
        "attention/blockwise.py",
        "_plan",
        "Span(T, S, causal, blocks[0], high, q.device, training) -> "
        "Span(T, S, causal, blocks[1], high, q.device, training)",
    ): "tiles of another size give the same result",
    (
        "attention/fused.py",
        "fused_attention",
        "causal and T > 1 -> causal and T >= 1",
    ): "one query sees every key either way, only not through torch's kernel",
    (
        "position/sandwich.py",
        "Sandwich.distance_bias",
        "range(2, width + 1, 2) -> range(2, width + 2, 2)",
    ): "the width is even, so the last of the numbers is the width either way",
    (
        "position/cope_ctx.py",
        "_ContextualTiles.finished",
        "(self.sums >= self.last).all -> (self.sums > self.last).all",
    ): "sums that are at the last row exactly stay there when one tile more is looked at",
    (
        "attention/flex.py",
        "_by_distance",
        "max(n_own, S - bias.first) -> max(n_own, bias.first - S)",
    ): "far distances that share one number instead of a copy each: the same sums, only all added in one place",
    (
        "attention/bias.py",
        "no_bias",
        "0 if span.causal else 1 - span.T -> 0 if span.causal else 1 + span.T",
    ): "from which distance on the bias 0 is called constant: it is 0 at all of them",
    (
        "attention/bias.py",
        "no_bias",
        "0 if span.causal else 1 - span.T -> 1 if span.causal else 1 - span.T",
    ): "as above",
    (
        "position/fire.py",
        "_pieces",
        "torch.where(turns, w1, 1.0) -> torch.where(turns, w1, 2.0)",
    ): "a divisor where there is no knot to find: any but 0 will do",
    (
        "attention/local.py",
        "Local._hides_nothing",
        "self.rule.low(n_keys - 1) -> self.rule.low(n_keys + 1)",
    ): "a rule that hides nothing hides nothing blockwise either",
    (
        "attention/local.py",
        "Local._hides_nothing",
        "self.rule.high(0) >= n_keys -> self.rule.high(0) > n_keys",
    ): "a rule that hides nothing hides nothing blockwise either",
    (
        "attention/linear.py",
        "Linear.mix",
        "q.shape[1] // k.shape[1] -> -(-q.shape[1] // k.shape[1])",
    ): "key-value heads divide the heads",
    (
        "attention/blockwise.py",
        "_Hidden.__call__",
        "self.future is not None and tile.nearest < 0 -> self.future is not None and tile.nearest < 1",
    ): "a tile that ends at the query itself has no future to hide",
    ("attention/merge.py", "merge", "parts[0][0].dtype -> parts[1][0].dtype"): "parts of one attention have one dtype",
}


class Site(NamedTuple):
    """A place in a syntax tree: a node and where it hangs."""

    tree: ast.Module
    above: tuple[ast.AST, ...]  # from the module down to the parent
    field: str
    index: int | None
    node: ast.AST
    scope: str  # Class.method

    def _put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.above[-1], self.field, node)
        else:
            getattr(self.above[-1], self.field)[self.index] = node

    def replaced(self, new: ast.AST, shown: ast.AST) -> str:
        """The source of `shown`, a part of the tree or all of it, with `new` in this place."""
        self._put(new)
        text = ast.unparse(shown)
        self._put(self.node)
        return text


class Mutant(NamedTuple):
    file: str
    site: Site
    new: ast.AST

    @property
    def source(self) -> str:
        return self.site.replaced(self.new, self.site.tree)

    @property
    def what(self) -> str:
        """The change with enough around it to be recognized."""
        if isinstance(self.site.node, ast.stmt):
            return f"{ast.unparse(self.site.node)} -> {ast.unparse(self.new)}"
        shown: ast.AST = self.site.node
        for node in reversed(self.site.above):
            if isinstance(node, (ast.stmt, ast.comprehension, ast.FormattedValue)) or len(ast.unparse(shown)) > 24:
                break
            shown = node
        if shown is self.site.node:
            return f"{ast.unparse(shown)} -> {ast.unparse(self.new)}"
        return f"{ast.unparse(shown)} -> {self.site.replaced(self.new, shown)}"

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.site.scope, self.what

    def __str__(self) -> str:
        return f"{self.file}:{getattr(self.site.node, 'lineno', 0)} {self.site.scope}: {self.what}"


def sites(file: str) -> Iterator[Site]:
    """Every node of a file, in the order of the file."""
    tree = ast.parse((ROOT / "ctxlab" / "model" / file).read_text())

    def below(above: tuple[ast.AST, ...], scope: str) -> Iterator[Site]:
        for field, value in ast.iter_fields(above[-1]):
            for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(node, ast.AST):
                    inner = scope
                    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                        inner = f"{scope}.{node.name}".lstrip(".")
                    yield Site(tree, above, field, index, node, scope)
                    yield from below((*above, node), inner)

    yield from below((tree,), "")


def computes(site: Site) -> bool:
    """Whether a place is in a function and part of what it computes: no annotation, message, check or setting."""
    names = site.scope.split(".")
    if not any(isinstance(node, ast.FunctionDef) for node in site.above) or set(names) & {*SKIPPED, "Config"}:
        return False
    for node, child in zip(site.above, (*site.above[1:], site.node)):
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.arg)) or isinstance(child, ast.arguments):
            return False
        if isinstance(node, ast.FunctionDef) and (child in node.decorator_list or child is node.returns):
            return False
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in SKIPPED:
            return False
        if isinstance(node, ast.AnnAssign) and child is node.annotation:
            return False
    number = site.node.operand if isinstance(site.node, ast.UnaryOp) else site.node
    return not (isinstance(number, ast.Constant) and is_axis(site))


def is_axis(site: Site) -> bool:
    """Whether a number counts axes: another one seldom runs at all."""
    nodes = [*site.above, site.node]
    while isinstance(nodes[-2], (ast.UnaryOp, ast.Tuple)):
        nodes.pop()
    match nodes[-2]:
        case ast.Subscript(ast.Attribute(_, "shape")) | ast.keyword("dim"):
            return True
        case ast.Slice():
            return isinstance(nodes[-3], ast.Subscript) and "shape" in ast.unparse(nodes[-3].value)
        case ast.Call(ast.Attribute(_, name)):
            return name in AXES
    return False


OTHERS = {"sin": "cos", "cos": "sin", "real": "imag", "imag": "real", "floor": "ceil", "min": "max", "max": "min"}
OTHERS |= {"maximum": "minimum", "amax": "amin"}
DROPPED = {"clamp", "clamp_", "flip", "transpose", "masked_fill"}  # x.clamp(...) becomes x
AXES = {"amax", "chunk", "cumsum", "flatten", "flip", "gather", "index_add_", "new_empty", "scatter_add_", "stride"}
AXES |= {"sum", "transpose", "unflatten", "unsqueeze", "view"}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What a node may be mistaken for."""
    match node:
        case ast.BinOp(left, ast.Add(), right):
            yield ast.BinOp(left, ast.Sub(), right)
        case ast.BinOp(left, ast.Sub(), right):
            yield ast.BinOp(left, ast.Add(), right)
            yield ast.BinOp(right, ast.Sub(), left)
        case ast.AugAssign(target, ast.Add() | ast.Sub() as op, value):
            yield ast.AugAssign(target, ast.Sub() if isinstance(op, ast.Add) else ast.Add(), value)
        case ast.UnaryOp(ast.USub(), operand):
            yield operand
        case ast.Constant(bool()):
            return
        case ast.Constant(int(value)):
            yield ast.Constant(value + 1)
            if value > 2:
                yield ast.Constant(2 * value)
        case ast.Constant(float(value)) if value:
            yield ast.Constant(2 * value)
        case ast.Compare(left, [op], right) if type(op) in COMPARISONS:
            yield ast.Compare(left, [COMPARISONS[type(op)]()], right)
        case ast.Attribute(value, "T" | "mT") if not ast.unparse(value).endswith("span"):
            yield value
        case ast.Attribute(value, name, context) if name in OTHERS:
            yield ast.Attribute(value, OTHERS[name], context)
        case ast.Name("min" | "max" as name, context):
            yield ast.Name(OTHERS[name], context)
        case ast.Call(ast.Attribute(value, name)) if name in DROPPED:
            yield value
        case ast.BinOp(left, ast.FloorDiv(), right) if not isinstance(left, ast.UnaryOp):
            yield up(left, right)
        case ast.Call(ast.Name("int"), [value]):
            yield ast.Call(ast.Name("int"), [up(value, ast.Constant(1))], [])


def up(a: ast.expr, b: ast.expr) -> ast.expr:
    """a / b rounded up."""
    return ast.UnaryOp(ast.USub(), ast.BinOp(ast.UnaryOp(ast.USub(), a), ast.FloorDiv(), b))


def mutants(file: str) -> list[Mutant]:
    """All that can be made of a file, in its order."""
    return [Mutant(file, site, new) for site in sites(file) if computes(site) for new in changes(site.node)]


def drawn() -> list[Mutant]:
    """Some of every file. A change of one file changes nothing in what is drawn from the others."""
    chosen = []
    for file in [*SCHEMES, *MECHANISMS]:
        able = mutants(file)
        picked: list[int] = []
        for number in random.Random(f"{SEED} {file}").sample(range(len(able)), len(able)):
            if len(picked) == (DRAWN_OF_A_MECHANISM if file in MECHANISMS else DRAWN_OF_A_SCHEME):
                break
            if able[number].key not in EQUIVALENT:
                picked.append(number)
        chosen += [able[number] for number in sorted(picked)]
    return chosen


def classics() -> list[Mutant]:
    """Those of CLASSICS; an AssertionError where the place of one is not there any more, or there twice."""
    made = []
    for file, scope, found, put in CLASSICS:
        (old,), (new,) = ast.parse(found).body, ast.parse(put).body
        if isinstance(old, ast.Expr) and isinstance(new, ast.Expr):
            old, new = old.value, new.value  # type: ignore[assignment]
        able = [site for site in sites(file) if site.scope == scope and isinstance(site.node, type(old))]
        places = [site for site in able if ast.unparse(site.node) == ast.unparse(old)]
        assert len(places) == 1, f"{file}, {scope}: {found} is there {len(places)} times; write its mutant anew"
        made.append(Mutant(file, places[0], new))
    return made


PROGRAM = """
import resource, sys
import pytest
import ctxlab
assert ctxlab.__file__.startswith(sys.argv[1]), ctxlab.__file__
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
sys.exit(pytest.main(sys.argv[3:]))
"""


def failure(copy: Path, selection: list[str], seconds: float | None = None) -> str | None:
    """What the tests of a copy end with: the first that failed, or None where all passed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    environment |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = ["-o", "addopts=", "-m", "not slow", "-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
    options += ["-p", "no:hypothesispytest"]  # whose import takes as long as many of these tests
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(copy), str(BYTES), *options, *selection],
            cwd=copy, env=environment, capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no end within {seconds:.0f} s"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}"
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    assert done.returncode in (1, 2), f"{selection}: {done.stdout}{done.stderr}"
    assert failed, f"{selection}: {done.stdout}{done.stderr}"
    return str(failed[0])


def caught(mutant: Mutant, base: Path, folder: Path, seconds: float) -> str | None:
    """The test that fails with this mutant, in a copy of its own, or None."""
    shutil.copytree(base, folder)
    path = folder / "ctxlab" / "model" / mutant.file
    path.write_text(mutant.source)
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
    first = FIRST.get(mutant.file) or [*CONFORMANCE, "-k", Path(mutant.file).stem]
    found = failure(folder, first, seconds) or failure(folder, EVERYTHING, seconds)
    shutil.rmtree(folder)
    return found


def copied(folder: Path) -> Path:
    """A copy of all that the tests read."""
    for name in ("ctxlab", "conf", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", folder)
    return folder


def test_every_place_that_is_named_is_there() -> None:
    assert len(classics()) == len(CLASSICS)
    scopes = {(file, scope) for file, scope, _ in EQUIVALENT}
    able = [mutant for file in {file for file, _ in scopes} for mutant in mutants(file)]
    assert not EQUIVALENT.keys() - {mutant.key for mutant in able if (mutant.file, mutant.site.scope) in scopes}
    assert {mutant.file for mutant in drawn()} == {*SCHEMES, *MECHANISMS} - {"position/nope.py"}  # it computes nothing


@pytest.mark.slow
def test_every_mutant_is_caught(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = copied(tmp_path / "base")
    begun = time.monotonic()
    assert failure(base, EVERYTHING) is None, "the tests fail without any mutant"
    seconds = PATIENCE * (time.monotonic() - begun)
    made = [*classics(), *drawn()]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        jobs = [pool.submit(caught, mutant, base, tmp_path / str(n), seconds) for n, mutant in enumerate(made)]
        found = [job.result() for job in jobs]
    lines = [f"{mutant}\n    {by or 'SURVIVED'}" for mutant, by in zip(made, found)]
    with capsys.disabled():
        print("", *lines, f"{len(made)} mutants, {found.count(None)} survived", sep="\n")
    assert len(made) >= 30
    assert not [line for line, by in zip(lines, found) if by is None]
