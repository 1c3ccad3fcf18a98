"""The exceptions that a launch script tells in one line."""


class UserError(ValueError):
  """Bad input. The message is one line: what, where, and how to mend it.

  Launch scripts print it without a traceback and exit with status 2.
  """


class LaneLost(RuntimeError):
  """The process behind a lane has died, and with it what the lane held.

  Attributes:
    lane: its name; "" if only its silence was noticed.
  """

  def __init__(self, lane: str, message: str):
    super().__init__(message)
    self.lane = lane
