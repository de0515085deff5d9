"""Where `ops` begins, `python -m ops_cli` too: a ctrl-C is quiet even while it is still importing."""

import sys


def main() -> None:
    try:
        from ops_cli.main import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
