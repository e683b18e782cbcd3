"""Whether pretraining has helped: how good the frozen backbone is on labelled crops, at the start and later.

Without labelled crops, how often it finds the second view of a window stands in for that.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from cluster import atomic, distributed
from cluster.backbone import Judged
from cluster.config import setting
from cluster.errors import UserError
from cluster.facts import check_facts
from cluster.journal import Journal
from cluster.lifecycle import Run
from pretraining.data import Pairs, spread
from pretraining.encoder import Encoder
from pretraining.features import ClassFolder, class_features, class_names, embed
from pretraining.probe import accuracy, knn_predict, pair_accuracy
from schematics import draws

T = TypeVar("T")
KEPT = "start.json"  # in the exp-dir: what the backbone is compared with
WINDOWS = 256  # of the pool at most, where there are no labels
NEIGHBOURS, QUERIES = 4096, 2048  # crops that are used at most, evenly spread over their split
PROBING = 3600.0  # seconds that a probe may take before the run counts as hung
CHANCE = 2.0  # standard errors of the difference of two accuracies up to which it may be chance


@dataclass(frozen=True)
class Before:
    """What a backbone is compared with: accuracies by the run's first weights and by raw pixels."""

    data: str  # folder of the crops, or the pool
    neighbours: int = setting(least=1)  # crops that vote, or views
    queries: int = setting(least=1)  # crops that are classified, or views
    start: float = setting(least=0, most=1)
    raw: float = setting(least=0, most=1)


class RawPixels(nn.Module):
    """The least that a backbone has to beat: an image's 16 x 16 pixels, less their mean.

    uint8 [N, 3, S, S] -> [N, 768]. They are less bound to the paper's tone than the pixels of
    `baselines.raw_pixels`, which `evaluate/knn.py` has beside it, and do better among neighbours.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1 / 255), requires_grad=False)  # says on which device it is

    def forward(self, images: Tensor) -> Tensor:
        pixels = nn.functional.adaptive_avg_pool2d(images * self.scale, 16).flatten(1)
        return pixels - pixels.mean(dim=1, keepdim=True)


class Probe:
    """kNN top-1 on the class folders of `data_dir`: crops of train/ vote on those of valid/, else of test/.

    Test is left alone where there is a valid/, so that what is chosen by the probe can still be tested. Of
    many crops some are taken, evenly spread and always the same. size: of the images, px.
    Raises UserError or DataError if there are no such folders or no crops in them.
    """

    name = "kNN"

    def __init__(self, data_dir: Path, size: int, color_mode: str, device: torch.device) -> None:
        splits = ["train", "valid" if (data_dir / "valid").is_dir() else "test"]
        self.classes = class_names(data_dir, splits)
        self.train, self.test = (
            ClassFolder(data_dir / split, self.classes, size, color_mode) for split in splits
        )
        for folder, most in ((self.train, NEIGHBOURS), (self.test, QUERIES)):
            folder.files = [folder.files[i] for i in spread(len(folder), most)]
        self.device = device
        self.about: dict[str, Any] = {
            "data": str(data_dir),
            "neighbours": len(self.train),
            "queries": len(self.test),
        }

    def __call__(self, network: nn.Module) -> float:
        """The accuracy by the features of a network, uint8 [N, 3, size, size] -> [N, D], in 0..1.

        They are computed in eval mode, and torch's generators stay as they are: a loader draws a seed.
        """
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            train, train_labels = class_features(network, self.train, self.device, workers=0)
            test, test_labels = class_features(network, self.test, self.device, workers=0)
        return accuracy(knn_predict(train, train_labels, test, len(self.classes)), test_labels)[0]


class SecondViews:
    """How often the second view of a window of the pool is the one that is most similar to the first.

    It needs no labels. Of the signs that were tried it is the one that agrees with kNN (docs/results.md). The
    windows are evenly spread over the pool, and the views those of an epoch that no run reaches.
    """

    name = "second views found"

    def __init__(self, pairs: Pairs) -> None:
        self.pairs, self.chosen = pairs, spread(len(pairs), WINDOWS)
        count = 2 * len(self.chosen)
        self.about: dict[str, Any] = {"data": "windows of the pool", "neighbours": count, "queries": count}

    def __call__(self, network: nn.Module) -> float:
        """The share of the views, by the features of a network, uint8 [N, C, S, S] -> [N, D]."""
        items = [self.pairs[draws.LARGEST, 0, i][:2] for i in self.chosen]
        z1, z2 = (embed(network, torch.stack(views)) for views in zip(*items, strict=True))
        return pair_accuracy(z1, z2).item()


class Benefit:
    """The comparison of a run's backbone with the one that it began with.

    data_dir: of labelled crops, for a Probe; None for SecondViews. Create it while the encoder has the
    weights of the start, as before a checkpoint is restored: so a run that gets its --probe-dir later has its
    true start as well. Rank 0 measures, and the others wait for it. run: None for a dry run, which measures
    nothing. new: whether this is the run's first launch; the later ones read what it measured.
    Raises UserError or DataError as `Probe` does.
    """

    def __init__(
        self, data_dir: Path | None, pairs: Pairs, encoder: Encoder, run: Run | None, new: bool
    ) -> None:
        self.network = nn.Sequential(encoder.normalise, encoder.backbone)
        self.device = next(encoder.parameters()).device
        self.run, self.labelled = run, data_dir is not None
        self.now: float | None = None  # as it was measured last; on rank 0, as all that follows
        self.trial: Probe | SecondViews

        def begin() -> None:
            color_mode = pairs.store.color_mode
            self.trial = (
                Probe(data_dir, pairs.size, color_mode, self.device) if data_dir else SecondViews(pairs)
            )
            if run:
                self.before = self._before(run.exp_dir / KEPT, new)

        self._on_main(begin)

    def measure(self, journal: Journal, step: int) -> None:
        """Record in line `step` of the journal how good the backbone is now; nothing without labels."""

        def work() -> None:
            self.now = self.trial(self.network)
            journal.record(step, knn=self.now, knn_start=self.before.start, knn_raw=self.before.raw)

        if self.labelled:
            self._on_main(work)

    def judgement(self) -> Judged:
        """What becomes of the comparison, as measured last, or now if this launch has not measured."""

        def work() -> Judged:
            now = self.trial(self.network) if self.now is None else self.now
            return judge(self.trial.name, now, self.before)

        return self._on_main(work)

    def _on_main(self, work: Callable[[], T]) -> T:
        with self.run.allow(PROBING) if self.run else contextlib.nullcontext():
            return distributed.on_main(work)

    def _before(self, path: Path, new: bool) -> Before:
        try:
            kept = {} if new or not path.exists() else json.loads(path.read_text())
        except ValueError:
            raise UserError(f"{path}: not JSON; remove it, and the start is measured again") from None
        about = self.trial.about
        if all(kept.get(name) == value for name, value in about.items()):
            return Before(**check_facts(Before, kept, str(path), "remove it"))
        raw = self.trial(RawPixels().to(self.device))
        before = Before(**about, start=self.trial(self.network), raw=raw)
        atomic.write_text(path, json.dumps(asdict(before), indent=2) + "\n")
        told = f"{self.trial.name}, {before.queries} of {before.data}: {before.start:.2f} at the start"
        print(f"{told}, {raw:.2f} by raw 16 x 16 pixels", flush=True)
        return before


def judge(name: str, now: float, before: Before) -> Judged:
    """Compare an accuracy, which `name` stands for, with those of before.

    It is better or worse than the start where the difference is more than two standard errors of two
    independent samples. That is wide for the same crops twice, which makes up for crops of one sheet that are
    alike.
    """
    variance = sum(p * (1 - p) for p in (now, before.start)) / before.queries
    apart = now - before.start
    chance = apart**2 <= CHANCE**2 * variance
    verdict: Literal["better", "same", "worse"] = "same" if chance else "better" if apart > 0 else "worse"
    told = {"same": "no better than", "better": "better than", "worse": "worse than"}[verdict]
    figures = f"{name} {now:.2f}, at the start {before.start:.2f}, raw 16 x 16 pixels {before.raw:.2f}"
    return Judged(verdict, f"{figures}: these weights are {told} those you began with")
