"""All SQL. Every transition is one statement, guarded by the status, that moves and records."""
