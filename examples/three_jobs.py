"""The three jobs of a first hour: convert a CNN, train it with a preset, certify it and report.

python -m examples.three_jobs [--out DIR] [--epochs N]
python -m examples.three_jobs --fresh [--packages DIR]

With `--fresh` the jobs run in a new virtual environment into which this repository is installed by
pip, and the time of each step is printed. `--packages` names a folder of installed packages, such
as PyTorch, that the environment sees.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path


def jobs(out: Path, epochs: int) -> None:
    """Convert, train and certify a small CNN on the digits of scikit-learn."""
    import torch
    from torch import nn

    import orthonet
    from orthonet.losses import OffsetCrossEntropyLoss
    from orthonet.recipes import load

    torch.manual_seed(0)
    stock = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip

    # 1. Replace the layers. 2. Pick a preset: here another one for the linear layers.
    model = orthonet.orthogonalize(
        stock,
        weights="reset",
        norm="centering",
        pool="l2",
        activation="abs",
        rules={nn.Linear: {"ortho_params": "cholesky"}},
    )

    data = load("digits")
    loss = OffsetCrossEntropyLoss(offset=2**0.5 * 0.1, temperature=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(data.train.x)).split(64):
            optimizer.zero_grad()
            loss(model(data.train.x[index]), data.train.y[index]).backward()
            optimizer.step()

    # 3. Certify it, and save what was found.
    batches = list(zip(data.test.x.split(120), data.test.y.split(120), strict=True))
    found = orthonet.evaluate(model.eval(), batches, [0.0, 0.1, 0.25], bounds=(0.0, 1.0))
    print(found)
    found.save(out / "report.html")
    found.certificate.save(out / "certificate.json")
    torch.save(orthonet.to_plain(model), out / "plain.pt")


def fresh(out: Path, epochs: int, packages: Path | None) -> None:
    """Run the jobs in a new environment; print what each step took."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        if packages is not None:
            site = next(Path(folder, "lib").glob("python*/site-packages"))
            (site / "packages.pth").write_text(f"{packages}\n")
        _told("environment", start)
        root = Path(__file__).parents[1]
        start = time.perf_counter()
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"{root}[demo]"], check=True)
        _told("pip install", start)
        start = time.perf_counter()
        command = [python, __file__, "--out", out, "--epochs", str(epochs)]
        subprocess.run(command, check=True, cwd=folder)
        _told("three jobs", start)


def _told(what: str, start: float) -> None:
    print(f"{what}: {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/three_jobs"))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--fresh", action="store_true", help="in a new environment")
    parser.add_argument("--packages", type=Path, help="a folder of packages that it sees")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.fresh:
        fresh(given.out.resolve(), given.epochs, given.packages)
    else:
        jobs(given.out, given.epochs)


if __name__ == "__main__":
    sys.exit(main())
