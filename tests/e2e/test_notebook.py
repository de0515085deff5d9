"""The example notebook, cell by cell in a real kernel, against the service."""

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from helpers.service import Service

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own packages
def test_the_notebook_runs_from_its_first_cell_to_its_last(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("OPS_API_URL", service.client.server.url)
    monkeypatch.setenv("OPS_API_TOKEN", service.client.server.token or "")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(NOTEBOOK, as_version=4)

    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()

    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown), "the loss"
    bars = [output for output in shown if "from-a-notebook" in str(output.get("data", {}).get("text/plain", ""))]
    assert any("completed" in str(output["data"]) for output in bars), "the bar at its end"
    assert "completed" in str(notebook.cells[-2].outputs)
    assert load_file(tmp_path / "weights" / "model.safetensors")
