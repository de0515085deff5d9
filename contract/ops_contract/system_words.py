"""What an operating system refused, in words. Nothing heavy is imported here: `ops` says it while it starts."""


def system_words(error: OSError) -> str:
    """What the system said, and of which file, without the number of the error."""
    said = error.strerror or str(error)
    return f"{error.filename}: {said}" if error.filename else said
