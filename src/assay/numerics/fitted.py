"""What an estimator says before it was fitted."""


class NotFittedError(ValueError, AttributeError):
    """A fitted attribute was read before there was one: `hasattr` is then False, as for others."""
