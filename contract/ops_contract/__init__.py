"""The words that the parts of Relight share: schemas, error codes, the state machine. No I/O."""
