"""What goes wrong around a run: files, disks, devices, a second run, Ctrl-C. No traceback."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import pytest
import torch

from orthonet import certify, cli, evaluate, recipes
from orthonet.recipes import FlowConfig, digits, fit, train_flow
from orthonet.recipes.images.train import build
from orthonet.recipes.running import registry
from orthonet.recipes.running.files import replacing, write_atomically
from orthonet.recipes.running.folder import claimed, require_device
from tests.recipes.test_resume import SMALL, few

TINY = FlowConfig(blocks=1, hidden=4, batch_size=8, iterations=4)


@pytest.fixture
def small_disk():
    """No file of this process may grow beyond 2000 bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_sentence_and_the_old_file_stays(small_disk, tmp_path):
    path = tmp_path / "state.pt"
    path.write_bytes(b"old")
    for write in (
        lambda file: torch.save({"x": torch.zeros(5000)}, file),
        lambda file: file.write(b"x" * 5000),
    ):
        with pytest.raises(OSError, match=r"the file must fit on its disk.*state\.pt.*Free some"):
            write_atomically(path, write)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_an_earlier_certificate_and_report_whole(request, tmp_path):
    model, x = torch.nn.Linear(40, 40).eval(), torch.zeros(2, 40)
    with torch.no_grad():
        certificate = certify(model, x, lower=False)
        found = evaluate(model, [(x, torch.zeros(2).long())], [0.1], certificate, attack=False)
    plot = replace(found.plot(), svg=found.plot().svg + " " * 2000)
    names = ("certificate.json", "report.html", "figure.svg")
    saves = (certificate.save, found.save, plot.save)
    for name, save in zip(names, saves, strict=True):
        save(tmp_path / name)
    old = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(old) == 4  # with the constants
    request.getfixturevalue("small_disk")
    for name, save in zip(names, saves, strict=True):
        with pytest.raises(OSError, match=r"the file must fit on its disk.*Free some"):
            save(tmp_path / name)
        with pytest.raises(FileNotFoundError, match="the folder of the file must exist"):
            save(tmp_path / "no" / name)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_an_error_of_the_block_is_left_as_it_is(tmp_path):
    def fails(file):
        file.write(b"half")
        raise RuntimeError("of the block")

    with pytest.raises(RuntimeError, match="of the block"):
        write_atomically(tmp_path / "file", fails)
    with (
        pytest.raises(FileNotFoundError, match="the folder of the file must exist"),
        replacing(tmp_path / "no" / "file"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_is_none_is_refused(tmp_path, capsys):
    command = "train flow --blocks 1 --hidden 4 --batch-size 8 --iterations 4 --resume --quiet"
    train_flow(TINY, tmp_path)
    path = tmp_path / "state.pt"
    whole, saved = torch.load(path, weights_only=True), path.read_bytes()
    for content, words in (
        (b"", "it is empty"),
        (b"hello", "the file must be the state of an interrupted orthonet train"),
        (saved[:-300], "cut off, damaged"),
        (saved[:300], "cut off, damaged"),
        ([1, 2], "its format is"),
        ({"format": "orthonet training 1"}, "it holds no configuration"),
        ({"format": "orthonet training 1", "config": {}}, "of the same training"),
        ({**whole, "history": 3}, "Remove it and train anew"),
        ({**whole, "generator": torch.zeros(3)}, "Remove it and train anew"),
        ({**whole, "model": {"weight": torch.zeros(2)}}, "Missing key"),
        ({**whole, "optimizer": {"state": {}}}, "Remove it and train anew"),
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        assert cli.main([*command.split(), "--out", str(tmp_path)]) == 1, words
        error = capsys.readouterr().err
        assert words in error and error.startswith("orthonet: error: --resume: "), error
        assert str(path) in error and error.count("\n") == 1


def test_resume_compares_only_what_training_depends_on(tmp_path):
    config = digits(**SMALL)
    _, history = fit(config, few(), folder=tmp_path)
    after = replace(config, attack_steps=3, radii=(0.2,), data_root="x", device="cpu:0")
    assert fit(after, few(), folder=tmp_path, resume=True)[1] == history
    for changes in ({"lr": 0.5}, {"seed": 1}, {"ortho_params": "qr"}, {"epochs": 9}):
        name = next(iter(changes))
        with pytest.raises(ValueError, match=rf"of the same training, got path=.*, {name}="):
            fit(replace(config, **changes), few(), folder=tmp_path, resume=True)
    data = few()
    fewer = recipes.Split(recipes.Images(*(t[:70] for t in data.train)), data.test)
    with pytest.raises(ValueError, match=r"images=.*70 \(there 80\)"):
        fit(config, fewer, folder=tmp_path, resume=True)


def test_foreign_checkpoints_are_refused(tmp_path, capsys):
    config = digits(**SMALL)
    model = build(config)
    state, values = model.state_dict(), config.to_dict()
    form = {"format": "orthonet checkpoint 1"}
    path = tmp_path / "model.pt"
    path.write_bytes(b"")
    contents = [
        (None, "it is empty"),
        (state, "its format is"),
        ({**form, "state_dict": state}, "its configuration cannot be used"),
        ({**form, "config": [3], "state_dict": state}, "its configuration cannot be used"),
        ({**form, "config": {"epochs": 3}, "state_dict": state}, "configuration cannot be used"),
        ({**form, "config": {**values, "color": "red"}, "state_dict": state}, "color"),
        ({**form, "config": {**values, "radii": None}, "state_dict": state}, "cannot be used"),
        (
            {**form, "config": {**values, "model_arguments": {"depth": 3}}, "state_dict": state},
            "its model cannot be built",
        ),
        ({**form, "config": values}, "it holds a NoneType, not a state_dict"),
        ({**form, "config": digits().to_dict(), "state_dict": state}, "this very model"),
    ]
    for content, words in contents:
        if content is not None:
            torch.save(content, path)
        assert cli.main(["certify", str(path), "--quiet"]) == 1, words
        error = capsys.readouterr().err
        assert words in error and str(path) in error and error.count("\n") == 1, error
    recipes.save_checkpoint(path, model, config)
    path.write_bytes(path.read_bytes()[:-2000])
    assert cli.main(["certify", str(path), "--quiet"]) == 1
    assert "cut off, damaged" in capsys.readouterr().err


def test_a_damaged_comparison_is_refused(tmp_path, capsys):
    for content in ("", "[3]", json.dumps({"runs": []}), json.dumps({"protocol": 3, "runs": []})):
        (tmp_path / "zoo.json").write_text(content)
        assert cli.main(["bench", "zoo", "--quiet", "--out", str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert "zoo.json" in error and "the runs of a comparison" in error


def test_a_device_that_is_not_there_is_one_sentence(tmp_path, capsys):
    wrong = ["cuda:99", "meta", "toaster"]
    if not torch.accelerator.is_available():
        wrong += ["cuda", "mps"]
    for device in wrong:
        command = ["train", "digits", "--device", device, "--out", str(tmp_path / "run")]
        assert cli.main([*command, "--quiet"]) == 1
        error = capsys.readouterr().err
        assert f"device must be one of this machine, got device='{device}'. Choose cpu" in error
    assert not (tmp_path / "run").exists()
    require_device("cpu:0")


def test_two_runs_may_not_share_a_folder(tmp_path, capsys):
    """Refused while the other lives, taken over when it was killed."""
    script = (  # what `claimed` does, without the seconds that torch takes to be imported
        "import fcntl, os, sys, time\n"
        "file = open(sys.argv[1], 'a+')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "file.write(str(os.getpid()))\n"
        "file.flush()\n"
        "print('held', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / ".lock")]
    train = ["train", "flow", "--iterations", "4", "--quiet", "--out", str(tmp_path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert cli.main(train) == 1
        expected = f"only one run at a time may use a folder, got folder={str(tmp_path)!r}, "
        assert f"{expected}process='{other.pid}'" in capsys.readouterr().err
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert (tmp_path / ".lock").exists()  # it was killed, and holds nothing any more
    with claimed(tmp_path), pytest.raises(BlockingIOError, match="only one run"):
        train_flow(TINY, tmp_path)  # nor may another thread of this process
    train_flow(TINY, tmp_path)
    assert not (tmp_path / ".lock").exists()
    with claimed(tmp_path / "new" / "folder"):
        pass
    assert not (tmp_path / "new" / "folder").exists()  # nothing was put there


def test_the_lock_is_not_inherited(tmp_path):
    """Workers of a run that is killed live some seconds longer than it."""
    with claimed(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside torch's threads
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with claimed(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(registry.Recipe, "configured", stop)
    for command, rest in (
        ("train digits --epochs 3", "; go on with: orthonet train digits --epochs 3 --resume"),
        ("train flow --resume", "; go on with: orthonet train flow --resume"),
        ("bench zoo --seeds 2", "; go on with: orthonet bench zoo --seeds 2"),
    ):
        assert cli.main(command.split()) == 130
        assert capsys.readouterr().err == f"\northonet: stopped{rest}\n"
    monkeypatch.setattr(recipes, "certify_checkpoint", stop)
    assert cli.main(["certify", __file__]) == 130
    assert capsys.readouterr().err == "\northonet: stopped\n"


@pytest.mark.slow
def test_a_training_stopped_by_a_signal_goes_on(tmp_path, capsys):
    arguments = ["train", "flow", "--iterations", "4000", "--quiet", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "orthonet", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "log.csv").exists():
        assert process.poll() is None
        time.sleep(0.05)
    assert cli.main(arguments) == 1
    assert f"process='{process.pid}'" in capsys.readouterr().err
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == f"\northonet: stopped; go on with: orthonet {' '.join(arguments)} --resume\n"
    assert (tmp_path / "state.pt").exists() and not (tmp_path / ".lock").exists()
