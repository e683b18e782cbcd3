"""How finetuning ends and goes on: signals in a validation, patience, checkpoints around skipped steps."""

import dataclasses
import os
import shutil
import signal
import time

import pytest
import torch
from small_finetuning import config_of, lines_of, weights_of

from cluster import checkpoint, training
from cluster.distributed import World
from cluster.errors import UserError
from detection import validation
from detection.finetune import main
from detection.start import refuse_unsynced
from schematics import draws

pytestmark = pytest.mark.usefixtures("one_thread")
EPOCH = 4  # steps in an epoch: it has eight windows, and a step takes two


@pytest.fixture
def config(sheets, tmp_path):
    return config_of(sheets, tmp_path / "run", window=256, overlap=64, steps=2 * EPOCH, validate_every=1)


def test_a_signal_in_a_validation_saves_at_once_and_the_validation_is_made_up_for(config, monkeypatch):
    main(config)
    parts = dataclasses.replace(config, exp_dir=config.exp_dir.with_name("parts"))
    calls = iter(range(1000))

    def detect_and_signal(*arguments):
        if next(calls) == 1:  # the second sheet of the first validation
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.5)  # gives the thread that handles the signal time to see it
        return detect(*arguments)

    detect = validation.detect
    monkeypatch.setattr(validation, "detect", detect_and_signal)
    with pytest.raises(SystemExit) as stopped:
        main(parts)
    assert stopped.value.code == 75 and next(calls) == 2, "the other sheets can wait"
    assert checkpoint.listed(parts.exp_dir / "checkpoints")[0][0] == EPOCH
    assert not any("valid_AP" in line for line in lines_of(parts.exp_dir))
    main(parts)
    assert lines_of(parts.exp_dir) == lines_of(config.exp_dir)
    assert sum("valid_AP" in line for line in lines_of(parts.exp_dir)) == 2
    for name in ("model.pt", "last.pt"):
        one, other = weights_of(config.exp_dir / name), weights_of(parts.exp_dir / name)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_patience_ends_a_run_where_it_stands_and_more_patience_goes_on(config, capsys):
    still = dataclasses.replace(config, lr=0.0, steps=4 * EPOCH, patience=1)
    main(still)
    assert checkpoint.check_final(still.exp_dir)["step"] == 2 * EPOCH, "the second validation was no better"
    assert len([line for line in lines_of(still.exp_dir) if "loss" in line]) == 2 * EPOCH
    capsys.readouterr()
    main(still)
    assert f"finished at step {2 * EPOCH}, nothing to do" in capsys.readouterr().out
    main(dataclasses.replace(still, patience=3))
    assert checkpoint.check_final(still.exp_dir)["step"] == 4 * EPOCH
    assert [line["step"] for line in lines_of(still.exp_dir) if "loss" in line] == list(range(4 * EPOCH))


def test_nothing_is_saved_while_steps_are_skipped(config, monkeypatch):
    """A checkpoint is due after every step, but the state that a run goes back to must not be a bad one."""
    calls = iter(range(1000))
    clip = training.clip_grad_norm_

    def spoilt(parameters, limit):
        norm = clip(parameters, limit)
        return norm * float("nan") if 2 <= next(calls) <= 4 else norm

    monkeypatch.setattr(training, "clip_grad_norm_", spoilt)
    skipped = []
    write = checkpoint.write
    monkeypatch.setattr(
        checkpoint, "write", lambda *a: skipped.append((a[1], a[2]["guard"]["skipped"])) or write(*a)
    )
    main(dataclasses.replace(config, checkpoint_every=0.0, keep=20))
    assert len(skipped) > 2 and all(count == 0 for _, count in skipped), skipped
    steps = [line["step"] for line in lines_of(config.exp_dir) if "loss" in line]
    assert steps == list(range(2 * EPOCH))
    assert checkpoint.check_final(config.exp_dir)["step"] == 2 * EPOCH


def test_a_finished_run_that_is_made_longer_equals_the_long_one(config, monkeypatch):
    """That holds even if a signal stops it in a validation: by then the earlier final.json must be gone."""
    long = dataclasses.replace(config, exp_dir=config.exp_dir.with_name("long"))
    main(long)
    main(dataclasses.replace(config, steps=EPOCH))
    detect, calls = validation.detect, iter(range(1000))

    def detect_and_signal(*arguments):
        if next(calls) == 5:  # in the second validation; calls 0 to 3 repeated the first, on its four sheets
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.5)
        return detect(*arguments)

    monkeypatch.setattr(validation, "detect", detect_and_signal)
    with pytest.raises(SystemExit):
        main(config)
    assert not (config.exp_dir / "final.json").exists()
    main(config)
    assert lines_of(config.exp_dir) == lines_of(long.exp_dir)
    finals = [checkpoint.check_final(run.exp_dir) for run in (config, long)]
    assert finals[0]["files"] == finals[1]["files"] and finals[0]["step"] == finals[1]["step"] == 2 * EPOCH


def test_patience_counts_from_the_best_model_of_a_finished_run(config):
    """Its last checkpoint was written before the validation that found the best model."""
    main(dataclasses.replace(config, steps=EPOCH))
    main(dataclasses.replace(config, steps=4 * EPOCH, patience=1))
    assert checkpoint.check_final(config.exp_dir)["step"] > EPOCH


def test_a_run_that_ran_out_of_patience_is_finished_without_its_checkpoints(config):
    ended = dataclasses.replace(config, lr=0.0, steps=4 * EPOCH, patience=1)
    main(ended)
    signed = checkpoint.check_final(config.exp_dir)
    shutil.rmtree(config.exp_dir / "checkpoints")
    main(ended)
    assert checkpoint.check_final(config.exp_dir) == signed and signed["step"] < 4 * EPOCH


def test_batch_norm_is_not_taken_to_several_cpu_processes():
    refuse_unsynced("sync", World())
    refuse_unsynced("group", World(size=2))
    with pytest.raises(UserError, match="2 CPU processes can't sync BatchNorm"):
        refuse_unsynced("sync", World(size=2))


def test_a_run_of_a_version_with_other_draws_goes_on_and_says_so(config, capsys):
    main(dataclasses.replace(config, steps=EPOCH))
    step, newest = checkpoint.listed(config.exp_dir / "checkpoints")[0]
    state = checkpoint.read(newest)
    assert step == EPOCH and state.pop("draws") == draws.WINDOWS_VERSION
    checkpoint.write_file(newest, state)
    capsys.readouterr()
    main(dataclasses.replace(config, steps=EPOCH + 1))
    assert capsys.readouterr().out.count(draws.CHANGED) == 1
