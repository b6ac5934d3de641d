"""The exceptions that mean: the user can mend this."""

from collections.abc import Sequence


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


def check_all_done(failures: Sequence[str], total: int, what: str) -> None:
  """Raises the UserError of work of which some failed and the rest went on.

  Args:
    failures: a message each.
    total: how many there were to do.
    what: they are, and what they were not: "images were not predicted".
  """
  if failures:
    more = "; ..." if len(failures) > 3 else ""
    raise UserError(
      f"{len(failures)} of {total} {what}: {'; '.join(failures[:3])}{more}"
    )
