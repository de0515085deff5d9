"""Redone steps in the running service: after a kill, and on demand."""

import sys

import pytest

from helpers.service import LONG, LONG_STEPS, Service, kill
from ops_cli.main import main


@pytest.mark.slow
def test_what_is_redone_after_a_kill_or_on_demand_is_the_same_bit_for_bit(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    id = service.submit(**LONG, checkpoint_every={"steps": 1000})
    service.until_step(id, 20)
    kill(service.attempts(id)[0].trainer_pid)
    service.wait(id, "completed")

    check = service.attempts(id)[1].replay
    assert check is not None
    assert (check.compared >= 40, check.differing) == (True, 0)
    assert "replay_diverged" not in service.events(id)

    monkeypatch.setattr(sys, "argv", ["ops", "replay", str(id), "--url", service.url, "--token", service.token])
    with pytest.raises(SystemExit) as left:
        main()

    first, *_, verdict = capsys.readouterr().out.splitlines()
    values = sum(map(len, service.curves(id).values()))
    assert (left.value.code, verdict) == (0, f"steps 0 to {LONG_STEPS - 1}: all {values} values equal bit for bit")
    replay = service.get(service.client.resolve(first.split()[-1]))
    assert replay.progress is not None
    assert (replay.replay_of, replay.progress.percent) == (id, 100)
