"""What a user can put right: the command line prints these without a traceback and exits with code 2."""


class TrainingError(Exception):
    """A problem with what was given to a training run; the message names it and the remedy."""


class CorpusError(TrainingError):
    """The training text cannot be used."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be read or written."""
