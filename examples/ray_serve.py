"""A trained classifier behind HTTP, by Ray Serve: a DICOM file's bytes in, probabilities out.

    pip install 'ray[serve]'
    CHECKPOINT=run/best.ckpt PYTHONPATH=examples serve run ray_serve:app
    curl --data-binary @exam.dcm http://127.0.0.1:8000/

Each replica is a process with a network of its own; `num_replicas`, `num_gpus` and the rest are Serve's to say.
"""

import os
import tempfile
from pathlib import Path

import click
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

import gigamorph
from gigamorph.cli.main import cli
from gigamorph.engine.mammography.phantom import write_phantoms


@serve.deployment(ray_actor_options={"num_cpus": 1})
class Mammograms:
    def __init__(self, checkpoint: str, memory_budget: str = "1GiB") -> None:
        self.trained = gigamorph.load(checkpoint, memory_budget=memory_budget)

    async def __call__(self, request: Request) -> JSONResponse:
        try:
            return JSONResponse(self.predict(await request.body()))
        except (gigamorph.DataError, gigamorph.BudgetError) as error:  # of this image; one line
            return JSONResponse({"error": str(error)}, status_code=422)

    def predict(self, dicom: bytes) -> dict[str, float]:
        """Probability of each class."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "image.dcm"
            path.write_bytes(dicom)
            [found] = self.trained.predict(path).tolist()
        return dict(zip(self.trained.classes, found, strict=True))


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> list[dict[str, float]]:
    """A network trained on phantoms, and what the deployment says of two of them; without HTTP, in this process."""
    table = write_phantoms(folder / "dicom", patients=6, height=160, width=128, seed=1)
    settings = ["--model", "lesionnet", "--mean", "0.3", "--std", "0.1", "--epochs", "1", "--out", folder / "run"]
    cli.main(["train", str(table), *map(str, settings)], prog_name="gigamorph", standalone_mode=False)
    deployed = Mammograms.bind(str(folder / "run" / "best.ckpt"))
    handle = serve.run(deployed, _local_testing_mode=True)
    images = sorted((folder / "dicom" / "images").iterdir())[:2]
    found = [handle.predict.remote(path.read_bytes()).result() for path in images]
    print(found)
    return found


if "CHECKPOINT" in os.environ:  # as `serve run` wants it
    app = Mammograms.bind(os.environ["CHECKPOINT"])
if __name__ == "__main__":
    main()
