"""What several test files share: real processes, a real Postgres, and a store driver."""
