"""The one exception that means: the user can mend this."""


class UserError(ValueError):
  """A mistake in a config, data set, checkpoint or command line.

  The message is one line that says what is wrong, where, and what to do.
  `main` prints it as `error: MESSAGE` and exits with status 2; every other
  exception is a bug of ours and keeps its traceback.
  """
