import pytest
from published_networks import CODE


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "published_nets.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "published_nets", raising=False)
    return tmp_path
