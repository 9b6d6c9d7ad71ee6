"""Campaigns: what the faults of a plan do to a model's answers, counted, stored, resumable and with intervals."""

from rom.campaign.blocks import Blocks
from rom.campaign.errors import CampaignError
from rom.campaign.records import OUTCOMES, RESULT
from rom.campaign.store import Results, Store, read

__all__ = ["OUTCOMES", "RESULT", "Blocks", "CampaignError", "Results", "Store", "read"]
