"""What deploy/ tells Prometheus and Grafana must fit what the roles' pages have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from pagewire.runtime.metrics_page import own_registry
from tools.site.metrics import COLLECTORS

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PROMETHEUS, GRAFANA = DEPLOY / "prometheus", DEPLOY / "grafana"
SERIES = re.compile(r"\b(?:pagewire|process)_[a-z0-9_]+")


def page(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


@pytest.fixture(scope="module")
def names() -> set[str]:
    """Every family of the three pages, with the endings that its type gives to series."""
    pages = [page(own_registry(make())) for make in COLLECTORS.values()]
    found = set()
    for family, kind in re.findall(r"^# TYPE (\S+) (\S+)$", "\n".join(pages), re.MULTILINE):
        endings = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}.get(kind, ("",))
        found.update(family + ending for ending in endings)
    return found


def dashboard_expressions() -> Iterator[str]:
    dashboard = json.loads((GRAFANA / "dashboards/pagewire.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]


def alert_expressions() -> Iterator[str]:
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]


def test_every_series_that_dashboard_and_alerts_ask_for_exists(names: set[str]) -> None:
    asked = {name for text in (*dashboard_expressions(), *alert_expressions()) for name in SERIES.findall(text)}
    assert len(asked) > 25
    assert asked <= names


def test_the_dashboard_shows_every_family_of_the_scheduler() -> None:
    text = page(own_registry(COLLECTORS["scheduler"]()))
    families = {name.removesuffix("_total") for name in re.findall(r"^# TYPE (pagewire_\S+)", text, re.MULTILINE)}
    shown = " ".join(dashboard_expressions())
    assert {family for family in families if family not in shown} == set()


def test_panels_do_not_overlap_and_use_the_provisioned_source() -> None:
    dashboard = json.loads((GRAFANA / "dashboards/pagewire.json").read_text())
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        where = panel["gridPos"]
        taken = {(where["x"] + x, where["y"] + y) for x in range(where["w"]) for y in range(where["h"])}
        assert not taken & cells, panel["title"]
        assert all(x < 24 for x, _ in taken)
        cells |= taken
        assert all(target["datasource"]["uid"] == source["uid"] for target in panel.get("targets", ()))


def test_prometheus_scrapes_the_ports_that_compose_gives_to_the_roles() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    services = yaml.safe_load((DEPLOY.parent / "docker-compose.yml").read_text())["services"]
    scraped = {
        name: place["port"]
        for job in config["scrape_configs"]
        for place in job["dns_sd_configs"]
        for name in place["names"]
    }
    assert scraped.keys() == {"scheduler", "worker", "worker-gpu", "gateway"}
    for name, port in scraped.items():
        command = " ".join(services[name]["command"]).replace("=", " ")
        assert f"--metrics-host 0.0.0.0 --metrics-port {port}" in command, name


@pytest.mark.parametrize("arguments", [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml")])
def test_promtool_accepts_what_prometheus_is_given(arguments: tuple[str, ...]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    *verb, file = arguments
    done = subprocess.run([promtool, *verb, str(PROMETHEUS / file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
