"""The receiver of the documentation, and an API that dies when there is something to tell."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers.service import Service
from ops_cli.main import main
from ops_cli.up import free_port

MONITORING = Path(__file__).parents[2] / "docs" / "monitoring.md"


@pytest.mark.slow
def test_an_end_is_told_though_the_api_was_killed_then(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPS_API_URL", service.url)
    monkeypatch.setenv("OPS_API_TOKEN", service.token)

    def ops(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["ops", "webhooks", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        assert not left.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    port = free_port()
    hook = json.loads(ops("add", f"http://127.0.0.1:{port}/", "--label", "told=here", "--json"))
    with receiver(hook["secret"], port) as process:
        assert "It arrived: 204" in ops("test", hook["id"][:8])
        assert told(process)["type"] == "webhook.test"

        id = service.client.submit(
            {"workload": "digits", "execution": {"max_epochs": 1}, "labels": {"told": "here"}}
        ).id
        service.wait(id, "completed")
        service.server.kill()
        service.server.close()
        service.restart_server()

        body = told(process)
    assert (body["type"], body["data"]["id"]) == ("operation.completed", str(id))
    assert "completed" in ops("list")
    assert str(id)[:8] in ops("deliveries", hook["id"])
    assert hook["id"] in ops("remove", hook["id"][:6])
    assert ops("list", "--json").strip() == "[]"


@contextmanager
def receiver(secret: str, port: int) -> "Iterator[subprocess.Popen[str]]":
    [code] = re.findall(r"```python\n(.+?webhook-signature.+?)```", MONITORING.read_text(), flags=re.DOTALL)
    serving = f"""server = http.server.HTTPServer(("127.0.0.1", {port}), Receiver)
print("ready", flush=True)
server.serve_forever()"""
    code, replaced = re.subn(r"^http\.server\.HTTPServer.+$", serving, code, flags=re.MULTILINE)
    assert replaced == 1
    command, environ = [sys.executable, "-c", code], {"WEBHOOK_SECRET": secret}
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def told(process: "subprocess.Popen[str]") -> Any:
    assert process.stdout
    return json.loads(process.stdout.readline().partition(" ")[2])
