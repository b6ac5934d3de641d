"""The exceptions that mean: the user can mend this."""


class UserError(ValueError):
  """A mistake in a config, data set, checkpoint or command line.

  The message is one line that says what is wrong, where, and what to do.
  `main` prints it as `error: MESSAGE` and exits with status 2; every other
  exception is a bug of ours and keeps its traceback.
  """


class DiskError(UserError):
  """A file that cannot be written: whatever the run is, it is not at fault.

  Where the disk has room again, or the folder its permissions, the same command
  goes on.
  """
