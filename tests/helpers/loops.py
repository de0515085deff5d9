"""The loops beside the API, for tests that do by hand what these would do."""

import asyncio

import pytest

LOOPS = (
    "Dispatcher",
    "Reaper",
    "Family",
    "Sweeper",
    "OrphanSweeper",
    "Exporter",
    "Announcer",
    "Auditor",
    "Streams",
    "Provisioner",
)


def stop_loops(patch: pytest.MonkeyPatch, but: tuple[str, ...] = ()) -> None:
    """Of every app that is made under `patch`; those named in `but` run."""
    for loop in LOOPS:
        if loop not in but:
            patch.setattr(f"ops_backend.app.{loop}.run", asyncio.Event().wait)
