"""The shipped configuration, alerts and dashboard in a real Prometheus that scrapes a running service."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from helpers.service import Service, eventually
from ops_cli.up import free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="no Prometheus here: apt install prometheus"),
]


def promtool(*arguments: str, told: str = "") -> None:
    done = subprocess.run(["promtool", *arguments], input=told, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def configuration(service: Service, tmp_path: Path) -> Path:
    """As shipped, but for the address and the interval."""
    shutil.copytree(DEPLOY / "prometheus", tmp_path, dirs_exist_ok=True)
    (tmp_path / "relight.token").write_text(service.token)
    config = tmp_path / "prometheus.yml"
    text = config.read_text().replace("127.0.0.1:8470", service.url.removeprefix("http://")).replace("15s", "1s")
    config.write_text(text)
    return config


@pytest.fixture
def prometheus(configuration: Path) -> Iterator[httpx.Client]:
    port, directory = free_port(), configuration.parent
    options = [f"--config.file={configuration}", f"--storage.tsdb.path={directory / 'data'}"]
    with (directory / "prometheus.log").open("wb") as log:
        command = ["prometheus", *options, f"--web.listen-address=127.0.0.1:{port}"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", trust_env=False) as client:
            yield client
    finally:
        process.kill()
        process.wait()
        sys.stdout.write((directory / "prometheus.log").read_text()[-3000:])


def test_promtool_finds_no_fault_in_what_is_shipped_and_scraped(service: Service, configuration: Path) -> None:
    answer = service.http.get(f"{service.url}/metrics")
    dashboard = json.loads((DEPLOY / "grafana" / "relight.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = [
        {"record": f"panel:{n}", "expr": e.replace("$__rate_interval", "5m").replace("$job", ".+")}
        for n, e in enumerate(asked)
    ]
    as_rules = configuration.with_name("dashboard.json")  # JSON is YAML
    as_rules.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))

    promtool("check", "metrics", told=answer.text)
    promtool("check", "config", str(configuration))
    promtool("check", "rules", str(configuration.with_name("alerts.yml")), str(as_rules))


def test_a_real_prometheus_scrapes_the_service_with_the_shipped_configuration(
    service: Service, prometheus: httpx.Client
) -> None:
    """The rate counts a training's points as they come in."""

    def value(query: str) -> float | None:
        try:
            answer = prometheus.get("/query", params={"query": query}).raise_for_status()
        except httpx.HTTPError:  # it is still starting
            return None
        found = answer.json()["data"]["result"]
        return float(found[0]["value"][1]) if found else None

    eventually(lambda: value('up{job="relight"}') == 1, "Prometheus has scraped the API")
    before = value("relight_metric_points_total")
    service.wait(service.submit(max_epochs=1), "completed")
    eventually(lambda: value("rate(relight_metric_points_total[1m]) > 0"), "the ingest rate is seen")
    eventually(lambda: value('relight_operations_ended_total{status="completed"}'), "the end is counted")

    assert before is not None
    assert (value("relight_metric_points_total") or 0) > before
    assert value("sum(relight_worker_live)") == 2
    groups = prometheus.get("/rules").json()["data"]["groups"]
    assert groups
    assert [rule["lastError"] for group in groups for rule in group["rules"] if rule.get("lastError")] == []
