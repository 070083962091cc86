"""A process answers by the class of a module, keeps what it made, and ends after an error."""

from gigamorph.engine.bench.process import Process
from gigamorph.engine.bench.results import FAILED, OK

SERVER = """
class Server:
    def __init__(self):
        self.kept = 0

    def add(self, number):
        print("not an answer")
        self.kept += number
        return {"sum": self.kept}

    def forget(self):
        self.kept = 0

    def fail(self):
        raise ValueError("no")
"""


def test_requests_are_methods(tmp_path):
    (tmp_path / "adding.py").write_text(SERVER)
    with Process("adding", folder=tmp_path) as process:
        assert process.ask("add", number=2) == {"status": OK, "sum": 2}
        assert process.ask("add", number=3)["sum"] == 5
        assert process.ask("forget") == {"status": OK}
        assert process.ask("fail") == {"status": FAILED, "reason": "ValueError: no"}
        assert process.ask("add", number=1)["status"] == FAILED
    with Process("adding") as process:
        answer = process.ask("add", number=1)
        assert answer["status"] == FAILED and "No module named 'adding'" in answer["reason"]
