"""`python -m ops_cli`: the same as `ops`, wherever that was installed."""

from ops_cli.main import main

main()
