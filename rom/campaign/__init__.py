"""Campaigns: what the faults of a plan do to a model's answers, counted, stored, resumable and with intervals."""

from rom.campaign.records import OUTCOMES, RESULT

__all__ = ["OUTCOMES", "RESULT"]
