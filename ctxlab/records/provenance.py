"""Where a run's numbers come from: code, libraries and machine, found without importing any of them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import ctxlab
from ctxlab.cores import available_cores
from ctxlab.records.schema import Provenance

LIBRARIES = (
    "torch", "lightning", "hydra-core", "omegaconf", "wandb", "sentencepiece", "pydantic", "numpy", "safetensors",
)  # fmt: skip
# What makes a processor's bf16 and vector products fast, by the names that Linux gives it on x86 and on ARM.
FLAGS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512f", "avx2", "bf16", "i8mm", "sve", "sve2", "asimd")
_CPUINFO = Path("/proc/cpuinfo")


def collect(**known: Any) -> Provenance:
    """Everything that can be found out here, and what the caller knows (`seed`, `precision`, `data`, ...)."""
    found = {
        "ctxlab": ctxlab.__version__,
        "commit": git_commit(Path(ctxlab.__file__).parent),
        "python": platform.python_version(),
        "libraries": library_versions(),
        "hardware": hardware(),
        "threads": _threads(),
    }
    return Provenance.model_validate({**found, **known})


def library_versions() -> dict[str, str]:
    """name -> version of the libraries that results depend on, of those that are installed."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit(package: Path) -> str | None:
    """The commit of the checkout that `package` lies in, `+dirty` when tracked files differ; None outside one."""
    if not (package.parent / ".git").exists():
        return None
    commit = _git(package, "rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit[:12]}+dirty" if _git(package, "status", "--porcelain", "--untracked-files=no") else commit[:12]


def hardware() -> dict[str, Any]:
    """Host, system, processor with the flags that matter to matrix products, cores, memory."""
    facts: dict[str, Any] = {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "processor": platform.processor() or platform.machine(),
        "flags": [],
        "cores": os.cpu_count(),
        "usable_cores": available_cores(),
    }
    if _CPUINFO.exists():
        facts |= processor(_CPUINFO.read_text(encoding="utf-8", errors="replace"))
    elif platform.system() == "Darwin":
        brand = _output("sysctl", "-n", "machdep.cpu.brand_string")
        facts |= {"processor": brand} if brand else {}
    try:
        facts["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        facts["memory_bytes"] = None
    return facts


def processor(cpuinfo: str) -> dict[str, Any]:
    """The processor's name, where there is one, and the flags of FLAGS that it has."""
    fields = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    present = (fields.get("flags") or fields.get("Features") or "").split()
    facts: dict[str, Any] = {"flags": [flag for flag in FLAGS if flag in present]}
    return facts | ({"processor": fields["model name"]} if "model name" in fields else {})


def _threads() -> int | None:
    """What OMP_NUM_THREADS says; a list (one number a nesting level) begins with ours."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdigit() and int(first) > 0 else None


def _git(folder: Path, *words: str) -> str | None:
    # A hook's GIT_DIR and GIT_INDEX_FILE are another repository's.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return _output("git", "-C", str(folder), *words, env=clean)


def _output(*command: str, env: dict[str, str] | None = None) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
