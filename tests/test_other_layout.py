"""A checkpoint that verifies but has another layout is one line that names it; nothing is overwritten."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from small_finetuning import config_of

from cluster import atomic, checkpoint
from cluster.distributed import World
from cluster.errors import UserError
from cluster.guard import Guard
from cluster.lifecycle import Run
from cluster.training import begin, load_optimizer
from detection import finetune
from pretraining.config import PretrainConfig
from pretraining.stage import Method, pretrain
from simclr import pretrain as simclr
from simclr.loss import nt_xent
from vicreg import pretrain as vicreg
from vicreg.loss import vicreg_loss

pytestmark = pytest.mark.usefixtures("one_thread")
SIMCLR = Method(name="simclr", loss=nt_xent, joint=True, last_norm=True, base_lr=simclr.base_lr)
VICREG = Method(name="vicreg", loss=vicreg_loss, joint=False, last_norm=False, base_lr=vicreg.base_lr)
TRAINERS = {
    "simclr": partial(pretrain, method=SIMCLR),
    "vicreg": partial(pretrain, method=VICREG),
    "finetune": finetune.main,
}


@pytest.fixture(scope="module", params=TRAINERS)
def begun(request, sheets, tmp_path_factory):
    """What goes on with a run of one step, its config, and the layout's name for its network."""
    exp_dir = tmp_path_factory.mktemp("begun") / "run"
    detector = config_of(sheets, exp_dir, steps=1)
    encoder = PretrainConfig(
        data_dir=sheets / "unlabeled",
        exp_dir=exp_dir,
        arch="resnet10t",
        projector=(16, 16),
        batch_size=4,
        steps=1,
        image_size=32,
        window=96,
        workers=0,
        device="cpu",
    )
    config = detector if request.param == "finetune" else encoder
    go_on = TRAINERS[request.param]
    go_on(config)
    return go_on, replace(config, steps=2), "model" if config is detector else "encoder"


def files(folder):
    """The content of each file in a run's folder, but for the beats and the flags of the last launch."""
    kept = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path: path.read_bytes() for path in kept if path.name != "rank_0"}


def at(*keys, value=None, gone=False):
    """A change of a state: at `keys`, in nested tables and lists, is `value`, or nothing any more."""

    def change(state, network):
        *way, last = (network if key == "NETWORK" else key for key in keys)
        for key in way:
            state = state[next(iter(state)) if key == "FIRST" else key]
        last = next(iter(state)) if last == "FIRST" else last
        if gone:
            del state[last]
        else:
            state[last] = value

    return change


SHORT = torch.zeros(3)
CHANGES = {
    "a weight less": (at("NETWORK", "FIRST", gone=True), "is absent, not float32 ["),
    "a momentum": (
        at("optimizer", "state", 0, "momentum_buffer", value=SHORT),
        "momentum_buffer of parameter 0 is [3]",
    ),
    "no guard": (at("guard", gone=True), "it has no 'guard'"),
}
OF_PRETRAINING = {"no windows": (at("windows", gone=True), "windows is missing")}
OF_FINETUNING = {
    "no spec": (at("spec", gone=True), "it has no 'spec'"),
    "another phase": (at("phases", 0, "kind", gone=True), "phases.kind is missing"),
    "no best": (at("best", value=None), "best is None, not a table"),
    "a number for pending": (at("pending", value=3), "pending is 3, not true or false"),
}
# Those that `begin` finds, whatever the trainer.
COMMON = CHANGES | {
    "no network": (at("NETWORK", gone=True), "it has no 'NETWORK'"),
    "a weight more": (at("NETWORK", "foreign", value=SHORT), "NETWORK.foreign is float32 [3], not absent"),
    "a shape": (at("NETWORK", "weight", value=SHORT), "weight is float32 [3], not float32 [2, 2]"),
    "a type": (at("NETWORK", "bias", value=torch.zeros(2).double()), "float64 [2], not float32 [2]"),
    "a list for a network": (at("NETWORK", value=[SHORT]), "is absent, not float32 ["),
    "a number for a weight": (at("NETWORK", "FIRST", value=1), "is absent, not float32 ["),
    "no optimizer": (at("optimizer", gone=True), "it has no 'optimizer'"),
    "text for an optimizer": (at("optimizer", value="sgd"), "its optimizer is no state of one"),
    "a group less": (at("optimizer", "param_groups", 0, gone=True), "its optimizer has other parameters"),
    "a parameter less": (at("optimizer", "param_groups", 0, "params", 0, gone=True), "other parameters"),
    "no momentum": (at("optimizer", "param_groups", 0, "momentum", gone=True), "has no momentum"),
    "a text for a rate": (at("optimizer", "param_groups", 0, "lr", value="high"), "has no lr, or"),
    "half a step": (at("guard", "offset", value=0.5), "offset is 0.5, not an integer"),
    "no step": (at("step", gone=True), "it has no 'step'"),
    "another step": (at("step", value=7), "its step is 7"),
    "a text for a step": (at("step", value="1"), "its step is '1'"),
}


def refused(newest, change, said, network, go_on):
    """Check that `go_on` refuses the newest checkpoint after `change`, and leaves all files as they are."""
    whole, exp_dir = newest.read_bytes(), newest.parent.parent
    state = torch.load(newest, weights_only=True)
    change(state, network)
    checkpoint.write_file(newest, state)
    before = files(exp_dir)
    with pytest.raises(UserError) as error:
        go_on()
    line = str(error.value)
    assert line.startswith(f"{newest}: ") and "give another --exp-dir, or move this file away" in line
    assert said.replace("NETWORK", network) in line and "\n" not in line, line
    assert files(exp_dir) == before
    newest.write_bytes(whole)
    atomic.sidecar(newest).write_text(f"{atomic.file_hash(newest)}  {newest.name}\n")


def test_a_checkpoint_of_another_layout_is_named_and_nothing_is_overwritten(begun):
    go_on, config, network = begun
    newest = checkpoint.step_path(config.exp_dir / "checkpoints", 1)
    for change, said in (CHANGES | (OF_FINETUNING if network == "model" else OF_PRETRAINING)).values():
        refused(newest, change, said, network, partial(go_on, config))


def life(exp_dir, steps):
    """A run of the smallest network."""
    model = torch.nn.Linear(2, 2)
    optimizer, guard = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), Guard()

    def state():
        return {"net": model.state_dict(), "optimizer": optimizer.state_dict(), "guard": guard.state()}

    def restore(saved):
        model.load_state_dict(saved["net"])
        load_optimizer(optimizer, saved)

    with Run(exp_dir, World()) as run:
        for _ in range(begin(run, run.resume(), guard, state, restore), steps):
            model(torch.ones(2)).sum().backward()
            optimizer.step()
        run.save(steps, state, wait=True)


@pytest.mark.parametrize("name", COMMON)
def test_every_other_layout_of_network_optimizer_and_guard(name, tmp_path):
    life(tmp_path, 1)
    newest = checkpoint.step_path(tmp_path / "checkpoints", 1)
    refused(newest, *COMMON[name], "net", partial(life, tmp_path, 2))
    life(tmp_path, 2)


def test_a_checkpoint_of_another_trainer_is_named(begun, sheets, tmp_path):
    go_on, config, _ = begun
    newest = checkpoint.step_path(tmp_path / "run" / "checkpoints", 1)
    newest.parent.mkdir(parents=True)
    checkpoint.write_file(newest, {"step": 1, "weights": {"conv1.weight": SHORT}})
    with pytest.raises(UserError, match=rf"{newest}: has another layout than this code writes, it has no "):
        go_on(replace(config, exp_dir=tmp_path / "run"))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    life(tmp_path, 1)
    for _, path in checkpoint.listed(tmp_path / "checkpoints"):
        path.write_bytes(b"")
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"step_00000001.pt: truncated.* or remove the folder to begin anew"):
        life(tmp_path, 2)
    assert files(tmp_path) == before


@pytest.mark.parametrize("error", [KeyError("weight"), RuntimeError("CUDA error: illegal access")])
def test_a_bug_in_what_restores_is_a_traceback(error, tmp_path, monkeypatch):
    def broken(*_):
        raise error

    life(tmp_path, 1)
    monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", broken)
    with pytest.raises(type(error), match=str(error)):
        life(tmp_path, 2)
