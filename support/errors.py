"""What the user can put right ends as one line. Imports nothing, so that it is there at once."""


class UserError(Exception):
    """Something the user can put right: the message names the file, field or flag, and how."""


def require(fits, message):
    """UserError with this message unless `fits`."""
    if not fits:
        raise UserError(message)
