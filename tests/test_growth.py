"""A detector goes on with other classes: what it knew stays, by name."""

import json
from pathlib import Path

import pytest
import torch
from small_finetuning import config_of, weights_of

from cluster import entry
from cluster.errors import UserError
from detection.config import FinetuneConfig
from detection.finetune import main
from detection.growth import SCORES, grow
from detection.inference import load_detector
from schematics.coco import ANNOTATIONS, read_split
from schematics.synthetic import write_sheets


def renamed(data: Path, names: dict[str, str], ids: int) -> None:
    """Give classes of a data set other names, and all of them ids from `ids` on, in another order."""
    for path in data.glob(f"*/{ANNOTATIONS}"):
        document = json.loads(path.read_text())
        new = {row["id"]: ids + n for n, row in enumerate(reversed(document["categories"]))}
        for row in document["categories"]:
            row["id"], row["name"] = new[row["id"]], names.get(row["name"], row["name"])
        document["categories"].sort(key=lambda row: row["id"])
        for row in document["annotations"]:
            row["category_id"] = new[row["category_id"]]
        path.write_text(json.dumps(document))


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> Path:
    """A detector of a few steps, and its data."""
    folder = tmp_path_factory.mktemp("known")
    write_sheets(folder / "data", sheets=3, seed=1, size=(256, 256))
    main(config_of(folder / "data", folder / "run", steps=2))
    return folder


@pytest.fixture
def others(tmp_path, known) -> Path:
    """The same sheets where one class has another name, under other ids."""
    write_sheets(tmp_path / "data", sheets=3, seed=1, size=(256, 256))
    name = load_detector(known / "run" / "model.pt").spec.categories[2][1]
    renamed(tmp_path / "data", {name: "heat pump"}, ids=40)
    return tmp_path / "data"


def test_classes_of_its_name_keep_their_weights_and_all_else_is_the_old_detectors(known, others):
    old = load_detector(known / "run" / "model.pt")
    split = read_split(others / "train")
    new, told = grow(known / "run" / "model.pt", split, None, seed=0)
    before, after = old.state_dict(), new.state_dict()
    assert before.keys() == after.keys()
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert differ == {f"{SCORES}.weight", f"{SCORES}.bias"}
    labels = {name: label for label, (_, name) in enumerate(old.spec.categories, 1)}
    for label, (number, name) in enumerate(new.spec.categories, 1):
        assert number >= 40
        row = after[f"{SCORES}.weight"][label]
        assert (name == "heat pump") or torch.equal(row, before[f"{SCORES}.weight"][labels[name]])
    assert torch.equal(after[f"{SCORES}.weight"][0], before[f"{SCORES}.weight"][0]), "the background"
    assert new.spec.anchors == old.spec.anchors and new.spec.window == old.spec.window
    lost = (set(labels) - {name for _, name in new.spec.categories}).pop()
    assert f"{len(before)} of {len(before)} tensors" in told
    assert told.endswith(f"classes: {len(labels) - 1} go on; 1 new (heat pump); 1 dropped ({lost})")
    again, _ = grow(known / "run" / "model.pt", split, 128, seed=0)
    assert again.spec.window == 128 and torch.equal(
        again.state_dict()[f"{SCORES}.weight"], after[f"{SCORES}.weight"]
    )


def test_a_run_goes_on_from_it_without_a_backbone_and_resumes_without_the_file(
    known, others, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # where no backbone lies in checkpoints/
    flags = ["--from", str(tmp_path / "model.pt"), "--data-dir", str(others)]
    (tmp_path / "model.pt").write_bytes((known / "run" / "model.pt").read_bytes())
    digest = (known / "run" / "model.pt.sha256").read_text()
    (tmp_path / "model.pt.sha256").write_text(digest)
    parsed = entry.parse(FinetuneConfig, flags)
    assert parsed.grow == tmp_path / "model.pt"
    config = config_of(others, tmp_path / "run", grow=parsed.grow, steps=2, lr=0.0)
    main(config)
    assert "1 new (heat pump)" in capsys.readouterr().out
    grown, _ = grow(parsed.grow, read_split(others / "train"), 256, seed=0)
    for name, value in weights_of(tmp_path / "run" / "model.pt").items():
        assert torch.equal(value, grown.state_dict()[name]) or "running" in name or "tracked" in name
    (tmp_path / "model.pt").unlink()
    main(config_of(others, tmp_path / "run", grow=parsed.grow, steps=3, lr=0.0))
    assert "going on at step 2" in capsys.readouterr().out


def test_what_can_not_be_grown_is_one_line(known, others, tmp_path):
    (tmp_path / "torn.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"torn\.pt"):
        main(config_of(others, tmp_path / "run", grow=tmp_path / "torn.pt"))
    of_it = load_detector(known / "run" / "model.pt").spec.categories
    renamed(others, {name: f"other {name}" for _, name in of_it}, ids=70)
    with pytest.raises(UserError, match="knows none of the classes of these sheets; leave it out"):
        main(config_of(others, tmp_path / "run", grow=known / "run" / "model.pt"))
    assert not (tmp_path / "run").exists()
