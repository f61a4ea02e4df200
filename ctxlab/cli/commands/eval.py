"""`ctxlab eval`: recorded runs, evaluated again, side by side. The record is a new one whose parent is the run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from ctxlab.cli.main import DONE
from ctxlab.cli.mirror import recording
from ctxlab.cli.scoring import measure_cost, memory_source, prepare_text, score, step_point
from ctxlab.data.corpora.base import CORPORA
from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS
from ctxlab.records.provenance import collect
from ctxlab.records.store import Run
from ctxlab.report.tables import show_evaluation
from ctxlab.train.checkpoint import open_run
from ctxlab.train.optim.base import OPTIMIZERS
from ctxlab.train.precision import resolve_device, resolve_precision
from ctxlab.train.settings import TrainerConfig

if TYPE_CHECKING:
    from ctxlab.cli.invocation import Invocation
    from ctxlab.config.schema import EvalConfig
