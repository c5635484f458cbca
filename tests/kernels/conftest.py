import pytest
from backends import BLOCK, triton_backend


@pytest.fixture
def short_blocks(monkeypatch):
    """Rows of the tests span several blocks of the Triton kernels."""
    if triton_backend is not None:
        monkeypatch.setattr(triton_backend, "MAX_BLOCK", BLOCK)
