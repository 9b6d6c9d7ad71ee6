"""Campaigns: what the faults of a plan do to a model's answers, counted, stored, resumable and with intervals."""

from rom.campaign import report, statistics
from rom.campaign.blocks import Blocks
from rom.campaign.engine import Engine
from rom.campaign.errors import CampaignError
from rom.campaign.last_layer import (
    Exhaustive,
    exhaustive_head_inputs,
    exhaustive_head_weights,
    exhaustive_last_layer,
)
from rom.campaign.outcomes import Golden
from rom.campaign.records import OUTCOMES, RESULT
from rom.campaign.runner import Stop, Summary, data_fingerprint, merge, run
from rom.campaign.store import Results, Store, read

__all__ = [
    "OUTCOMES",
    "RESULT",
    "Blocks",
    "CampaignError",
    "Engine",
    "Exhaustive",
    "Golden",
    "Results",
    "Stop",
    "Store",
    "Summary",
    "data_fingerprint",
    "exhaustive_head_inputs",
    "exhaustive_head_weights",
    "exhaustive_last_layer",
    "merge",
    "read",
    "report",
    "run",
    "statistics",
]
