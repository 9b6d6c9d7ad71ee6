"""Fault plans: which bits of which values are wrong, reproducibly; `rom.inject` puts a plan into a model."""

from rom.faults.allocation import neyman
from rom.faults.layers import Layer, Survey, survey
from rom.faults.plan import FaultPlan, Faults, model_fingerprint
from rom.faults.population import Stratum
from rom.faults.records import ALL, LOG, SITE, UPPER, Target, bits_of, flip, log_records, set_bits, sites, stuck_at

__all__ = [
    "ALL",
    "LOG",
    "SITE",
    "UPPER",
    "FaultPlan",
    "Faults",
    "Layer",
    "Stratum",
    "Survey",
    "Target",
    "bits_of",
    "flip",
    "log_records",
    "model_fingerprint",
    "neyman",
    "set_bits",
    "sites",
    "stuck_at",
    "survey",
]
