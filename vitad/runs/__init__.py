"""Runs: what is asked for (`request`), how it is made (`pipeline`), its record (`record`) and its folder (`folder`)."""

from vitad.runs.folder import image_resamples_from_scores, load_model, read_history, read_maps, read_resamples
from vitad.runs.machine import describe_environment, environment, find_device, git_state
from vitad.runs.pipeline import find_or_run, run, run_variants, score
from vitad.runs.record import (
    by_hash,
    committed,
    committed_seeds,
    experiment,
    on_other_processors,
    read_record,
    read_records,
)
from vitad.runs.request import Request, hash_of, settings_of

__all__ = [
    "Request",
    "by_hash",
    "committed",
    "committed_seeds",
    "describe_environment",
    "environment",
    "experiment",
    "find_device",
    "find_or_run",
    "git_state",
    "hash_of",
    "image_resamples_from_scores",
    "load_model",
    "on_other_processors",
    "read_history",
    "read_maps",
    "read_record",
    "read_records",
    "read_resamples",
    "run",
    "run_variants",
    "score",
    "settings_of",
]
