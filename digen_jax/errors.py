"""The one exception that means: the user can mend this."""


class UserError(ValueError):
  """Bad input. The message is one line: what, where, and how to mend it.

  Launch scripts print it without a traceback and exit with status 2.
  """
