"""Every notebook runs, and is committed in the form that Colab and git want."""

from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
CELL_SECONDS = 300

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.thorough
@each_notebook
def test_runs_in_quick_mode(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXREG_QUICK", "1")
    monkeypatch.setenv("XLA_FLAGS", "")  # they train: their code is worth optimizing
    notebook = nbformat.read(path, as_version=4)
    # Without folders to search for kernels, "python3" is the interpreter that runs this test.
    kernels = AsyncKernelManager(
        kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[])
    )
    NotebookClient(
        notebook,
        km=kernels,
        timeout=CELL_SECONDS,
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert any(cell.outputs for cell in code)


@each_notebook
def test_is_valid_and_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in notebook.cells:
        assert "outputs" not in cell or not cell.outputs
        assert cell.get("execution_count") is None


@each_notebook
def test_opens_in_colab_on_a_tpu(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.accelerator == "TPU"
    assert notebook.metadata.colab.gpuType == "V5E1"
    assert notebook.metadata.kernelspec.name == "python3"
    link = f"https://colab.research.google.com/github/jaxreg/jaxreg/blob/main/notebooks/{path.name}"
    assert f"]({link})" in notebook.cells[0].source.splitlines()[0]
    install = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert 'if "google.colab" in sys.modules:' in install
    assert "%pip install" in install
