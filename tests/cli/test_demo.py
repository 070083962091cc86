import re

import pytest
from commands import run


@pytest.mark.usefixtures("forked_peers")
def test_demo_in_small_writes_its_report_and_says_the_numbers(tmp_path, monkeypatch, capsys):
    from gigamorph.engine.mammography.demo import report
    from gigamorph.engine.mammography.demo import run as demo

    for module in (demo, report):
        monkeypatch.setattr(module, "HEIGHT", 256)
        monkeypatch.setattr(module, "WIDTH", 192)
    monkeypatch.setattr(demo, "_MODEL", "lesionnet?stages=2")
    monkeypatch.setattr(demo, "PATIENTS", {"train": 4, "val": 2, "test": 4})
    assert run("demo", "--out", tmp_path / "demo") == 0
    out = capsys.readouterr().out
    assert re.search(r"native resolution [01]\.\d{3}, 1/8 resolution [01]\.\d{3}", out)
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3 and page.count("src=") == 3
    for name in ("roc.png", "memory.png", "evidence.png"):
        assert (tmp_path / "demo" / name).read_bytes().startswith(b"\x89PNG")
    # The step that the budget bounds is the step that stock PyTorch takes.
    stock, ours = re.search(r">loss</td><td[^>]*>([\d.]+)</td><td[^>]*>([\d.]+)</td>", page).groups()
    assert float(stock) == pytest.approx(float(ours), abs=1e-5)
    assert re.search(r"native</td><td[^>]*>[01]\.\d{3}</td>", page)  # of four patients there is no interval
    assert len(list((tmp_path / "demo" / "overlays").iterdir())) == 2
    assert len(list((tmp_path / "demo" / "data" / "images").iterdir())) == 20


def test_demo_deletes_nothing_but_a_former_demo(tmp_path, monkeypatch, capsys):
    from gigamorph.engine.mammography.demo import run as demo

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "write_phantoms", stop)
    for name in ("data", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").write_text("x")
    assert run("demo", "--out", tmp_path) == 2
    assert "contains other files (notes)" in capsys.readouterr().err
    assert (tmp_path / "data" / "kept").exists() and (tmp_path / "notes" / "kept").exists()
    (tmp_path / "notes").rename(tmp_path / "low")
    assert run("demo", "--out", tmp_path) == 130
    assert not list(tmp_path.iterdir())
