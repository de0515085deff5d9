"""Who may read what is published: whoever may enter the directory in which it is, so at last the storage root.

Whatever the umask of the process that writes: a root that is 0700 keeps all below it private, one that is 2770 is
shared by those of its group, workers and backends of several users among them. Everybody may write nowhere.
"""

import stat


def directory_mode(above: int) -> int:
    return above & (stat.S_ISGID | 0o775) | 0o700


def file_mode(above: int) -> int:
    return above & 0o664 | 0o600
