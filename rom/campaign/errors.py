"""What a user of a campaign can put right."""


class CampaignError(Exception):
    """A problem with what was given to a campaign, or with its file; the message names it and the remedy."""
