"""`ctxlab doctor`: what this machine offers, and what would stand in the way of a run."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from ctxlab.errors import ConfigError
from ctxlab.units import format_bytes

USAGE = """What this machine offers: versions, cores, memory, speed, folders.

  ctxlab doctor

Exit code 1 when something would keep a run from working."""

_LIBRARIES = ("torch", "lightning", "hydra-core", "pydantic", "wandb", "sentencepiece", "numpy")
_ENOUGH_SECONDS = 1.0  # for the rate of a matrix product

Check = tuple[str, str, bool]  # what, what was found, whether it is fine


def run(argv: list[str]) -> int:
    """Prints one line a check; 1 when any of them would stop a run."""
    if argv in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if argv:
        raise ConfigError(f"doctor: takes no arguments, got '{argv[0]}'")
    from rich.table import Table
    from rich.text import Text

    from ctxlab.cli import console
    from ctxlab.cli.environment import set_process_defaults

    asked = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    set_process_defaults()
    table = Table(box=None, show_header=False, pad_edge=False)
    fine = True
    for what, found, good in (*_software(), *_machine(asked), *_speed(), *_folders(), *_mirror()):
        fine = fine and good
        table.add_row(what, Text("ok" if good else "no", style="green" if good else "bold red"), Text(found))
    console.stdout().print(table)
    return 0 if fine else 1


def _software() -> Iterator[Check]:
    from ctxlab import __version__

    yield "ctxlab", __version__, True
    yield "python", platform.python_version(), sys.version_info >= (3, 11)
    for name in _LIBRARIES:
        try:
            yield name, metadata.version(name), True
        except metadata.PackageNotFoundError:
            yield name, "not installed", False
    said = os.environ.get("CXX", "").split()  # maybe several words: `ccache g++`
    compiler = next(filter(None, map(shutil.which, (*said[:1], "c++", "g++", "clang++"))), None)
    yield "C++ compiler", compiler or "none: trainer.compile=true is not possible", True


def _machine(asked: dict[str, str | None]) -> Iterator[Check]:
    from ctxlab.cores import available_cores

    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}", True
    yield "cores", f"{available_cores()} available of {os.cpu_count()}", True
    for name, value in asked.items():
        source = "set by you" if value is not None else "ctxlab's default"
        yield name, f"{os.environ.get(name, '')} ({source})", True
    total, free = memory()
    yield "memory", f"{format_bytes(total)} in all" + (f", {format_bytes(free)} free" if free else ""), True
    if not Path("/proc/self/status").exists():
        yield "peak memory", "no VmHWM here: ru_maxrss stands in, and records say so", True
    flags = _cpu_flags()
    if flags:
        units = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags]
        yield "vector units", ", ".join(units) or "none of amx_bf16, avx512_bf16, avx512f, avx2", True


def memory() -> tuple[int, int]:
    """Total and free bytes of this machine or container; free is 0 where the system does not say."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = 0
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(rows["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, max(0, total - used))
    return total, free


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return set()
    for line in path.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    return set()


def _speed() -> Iterator[Check]:
    """Matrix products, timed, beside what `trainer.precision=auto` picks."""
    import torch

    from ctxlab.profiling.point import matmul_rate
    from ctxlab.train.precision import resolve_device, resolve_precision

    yield "threads of torch", str(torch.get_num_threads()), True
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        yield "GPU", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}", True
    cpu = torch.device("cpu")
    fp32, bf16 = (matmul_rate(precision, cpu, _ENOUGH_SECONDS)["flops_per_second"] for precision in ("fp32", "bf16"))
    yield "fp32 matmul", f"{fp32 / 1e9:.3g} GFLOP/s", True
    yield "bf16 matmul", f"{bf16 / 1e9:.3g} GFLOP/s, {bf16 / fp32:.2g} x fp32", True
    from ctxlab.model.attention import native

    reason = native.why_not()
    state = "built" if native.is_built() else "not built yet: a long training on CPU or profile does it, in ten seconds"
    yield "attention kernel", state if reason is None else f"none, attention runs in torch: {reason}", True
    yield "precision", f"trainer.precision=auto is {resolve_precision('auto', resolve_device('auto'))} here", True


def _folders() -> Iterator[Check]:
    from ctxlab.cache import default_cache

    runs = Path(os.environ.get("CTXLAB_RUNS") or "runs").expanduser().absolute()
    for what, folder in (("runs", runs), ("cache", default_cache())):
        problem = _why_not_writable(folder)
        existing = _nearest_existing(folder)
        free = shutil.disk_usage(existing).free
        yield f"{what} folder", f"{folder} ({problem or f'{format_bytes(free)} free'})", not problem


def _why_not_writable(folder: Path) -> str:
    """Tries it, since permission bits do not tell the whole truth (read-only mounts, quotas, root)."""
    try:
        with tempfile.TemporaryFile(dir=_nearest_existing(folder)):
            return ""
    except OSError as error:
        return f"not writable: {error.strerror}"


def _nearest_existing(folder: Path) -> Path:
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _mirror() -> Iterator[Check]:
    mode = os.environ.get("WANDB_MODE", "offline (WANDB_MODE is not set)")
    yield "W&B", f"mode {mode}; runs go to their own folder and are uploaded with ctxlab sync", True
