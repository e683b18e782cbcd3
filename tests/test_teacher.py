"""What a teacher's boxes are worth, and what a student makes of them: thresholds, jitter, doubt, ranks."""

import dataclasses

import pytest
import torch
from processes import Ranks
from small_detector import small_spec
from torchvision.ops import box_iou

from cluster import distributed
from cluster.training import parallel
from detection import teacher
from detection.model import Detector
from detection.student import student_losses, without_doubtful
from detection.teacher import BINS, FIRST, LEAST, MOST, Candidates, Pseudo
from detection.teaching import Teaching

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE, WINDOWS = 128, 6


def counts(*scores: tuple[float, int]) -> torch.Tensor:
    """A class's distribution [1, BINS], from scores and how often each occurs."""
    found = torch.zeros(1, BINS, dtype=torch.float64)
    for score, count in scores:
        found[0, int(score * BINS)] += count
    return found


def test_a_threshold_parts_symbols_from_mistakes_and_stays_in_bounds():
    (low,) = teacher.thresholds(counts((0.15, 60), (0.2, 40), (0.65, 20), (0.7, 20))).tolist()
    (high,) = teacher.thresholds(counts((0.55, 60), (0.6, 40), (0.95, 40))).tolist()
    assert 0.25 < low < 0.64 and 0.62 <= high <= MOST and low < high
    assert teacher.thresholds(counts((0.9, 5))).tolist() == [FIRST], "too few to tell"
    assert teacher.thresholds(counts((0.15, 500), (0.25, 500))).tolist() == [LEAST], "mistakes alone"
    assert teacher.thresholds(torch.zeros(3, BINS)).tolist() == pytest.approx([FIRST] * 3)


def test_a_place_has_one_box_that_names_both_classes_and_faint_boxes_are_none():
    boxes = torch.tensor([[0.0, 0, 20, 20], [1, 0, 21, 20], [50, 50, 70, 70]])
    shares = torch.tensor([[0.1, 0.5, 0.4], [0.2, 0.1, 0.7], [0.93, 0.04, 0.03]])
    found = teacher.candidates(shares.log(), boxes, iou=0.5, most=10)
    assert found.boxes.tolist() == [[1, 0, 21, 20]] and found.labels.tolist() == [1]
    torch.testing.assert_close(found.scores, torch.tensor([0.7]))
    torch.testing.assert_close(found.soft, torch.tensor([[0.125, 0.875]]))
    assert teacher.count_scores(found).nonzero().tolist() == [[1, int(0.7 * BINS)]]


def test_the_spread_of_a_box_is_that_of_what_jittered_copies_become():
    box = torch.tensor([[10.0, 10, 30, 50]])
    offsets = torch.tensor([[0.05] * 4, [-0.05] * 4])
    copies = teacher.jittered(box, offsets)
    assert copies[:, 0].tolist() == [[11, 12, 31, 52], [9, 8, 29, 48]]
    # Standard deviations of 1 in x and 2 in y; half of width and height is 30.
    torch.testing.assert_close(teacher.spread(copies), torch.tensor([1.5 / 30]))
    assert teacher.spread(box.expand(10, 1, 4)).tolist() == [0]


def test_what_a_student_is_told_lies_in_its_window_and_a_true_box_is_right_once():
    found = Candidates(
        torch.tensor([[10.0, 10, 30, 30], [90, 90, 110, 110], [40, 10, 60, 30]]),
        torch.tensor([0.9, 0.8, 0.3]),
        torch.eye(3),
    )
    # Twice the size around the upper left corner, then mirrored: the second box is beyond the edge.
    matrix = torch.tensor([[-2.0, 0, 128], [0, 2, 0]])
    told = teacher.taught(found, torch.full((3,), 0.5), torch.ones(3, dtype=torch.bool), matrix, 128, 0.6)
    assert told.boxes.tolist() == [[68, 20, 108, 60], [8, 20, 48, 60]]
    assert told.sure.tolist() == told.stable.tolist() == [True, False], "what is unsure teaches no box"
    assert told.seen.tolist() == [0, 0, 128, 128]
    half = torch.tensor([[0.5, 0, 0], [0, 0.5, 0]])
    seen = teacher.taught(found, torch.full((3,), 0.5), torch.ones(3, dtype=torch.bool), half, 128, 0.6).seen
    assert seen.tolist() == [0, 0, 64, 64]
    assert teacher.share_within(torch.tensor([[54.0, 0, 74, 10]]), seen, 128).tolist() == [0.5]
    twice = torch.tensor([[10.0, 10, 30, 30], [11, 10, 31, 30], [90, 90, 110, 110]])
    right = teacher.agreement(twice, torch.tensor([0, 0, 2]), found.boxes[:2], torch.tensor([0, 1]))
    assert right.tolist() == [True, False, False], "a second box, and one of another class, are wrong"


def told_of(boxes: list, sure: list[bool], seen: float = SIDE) -> Pseudo:
    """Two classes, of which the first is half likely."""
    count, yes = len(boxes), torch.tensor(sure, dtype=torch.bool)
    within = torch.tensor([0.0, 0, seen, SIDE])
    return Pseudo(torch.tensor(boxes).view(-1, 4), torch.full((count, 2), 0.5), yes, yes.clone(), within)


def detector_of(seed: int = 0) -> Detector:
    torch.manual_seed(seed)
    return Detector(small_spec(arch="test_resnet", score_threshold=0.01, proposals=64)).train()


def window_of(seed: int, count: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def target_of(x: float) -> dict[str, torch.Tensor]:
    return {"boxes": torch.tensor([[x, 20, x + 30, 50]]), "labels": torch.ones(1, dtype=torch.int64)}


@pytest.mark.parametrize("head", ["mlp", "conv"])
def test_a_window_of_which_nothing_is_sure_teaches_nothing_and_the_labelled_ones_as_ever(head):
    torch.manual_seed(0)
    detector = Detector(small_spec(arch="test_resnet", head=head)).train()
    images, targets = window_of(1, 2), [target_of(20.0)]
    alone = detector(images[:1], targets, [7])
    for told in (told_of([], []), told_of([[20.0, 20, 50, 50]], [False]), told_of([], [], seen=0)):
        losses = student_losses(detector, images, targets, [told], [7, 8])
        assert {name: loss.item() for name, loss in losses.items() if name not in alone} == {
            "teacher_classifier": 0,
            "teacher_box_reg": 0,
            "teacher_objectness": 0,
        }
        for name, loss in alone.items():
            torch.testing.assert_close(losses[name], loss)


def test_an_unstable_box_teaches_its_class_and_not_its_place():
    detector, images, targets = detector_of(), window_of(1, 2), [target_of(20.0)]
    told = told_of([[20.0, 20, 50, 50]], [True])
    loose = dataclasses.replace(told, stable=torch.tensor([False]))
    exact, rough = (student_losses(detector, images, targets, [of], [7, 8]) for of in (told, loose))
    assert exact["teacher_box_reg"] > 0 and rough["teacher_box_reg"] == 0
    assert exact["teacher_classifier"] == rough["teacher_classifier"] > 0


def test_soft_classes_pull_towards_the_distribution():
    """Where both classes are as likely as the teacher says, only regions of background move them."""
    detector, images, targets = detector_of(), window_of(1, 2), [target_of(20.0)]
    predictor = detector.roi_heads.box_predictor.cls_score
    with torch.no_grad():
        predictor.weight.zero_()
        predictor.bias.copy_(torch.tensor([-40.0, 0, 0]))
    losses = student_losses(detector, images, targets, [told_of([[20.0, 20, 50, 50]], [True])], [7, 8])
    (slope,) = torch.autograd.grad(losses["teacher_classifier"], predictor.bias)
    assert slope[1] > 0 and slope[1] == pytest.approx(slope[2].item())


def test_doubtful_places_are_not_background():
    """An unsure box, or a part that the teacher did not see, keeps anchors and proposals out of the loss."""
    detector, images, targets = detector_of(), window_of(1, 2), [target_of(20.0)]
    sure = [90.0, 90, 120, 120]
    plain = student_losses(detector, images, targets, [told_of([sure], [True])], [7, 8])
    all_doubted = student_losses(detector, images, targets, [told_of([sure], [True], seen=0)], [7, 8])
    assert 0 < all_doubted["teacher_objectness"] < plain["teacher_objectness"], "of the symbol alone"
    assert 0 < all_doubted["teacher_classifier"] < plain["teacher_classifier"]
    told = told_of([[10.0, 10, 30, 30]], [False], seen=100)
    boxes = torch.tensor([[12.0, 12, 32, 32], [60, 60, 90, 90], [90, 60, 120, 90], [12, 10, 32, 30]])
    labels = without_doubtful(torch.tensor([0, 0, 0, 1]), boxes, told, SIDE, box_iou)
    assert labels.tolist() == [-1, 0, -1, 1], (
        "at an unsure box; background; mostly unseen; a symbol stays one"
    )


def pool_of(first: int, last: int) -> dict:
    """Windows of the pool, some with a true box."""
    jitter = torch.rand(WINDOWS, 10, 4, generator=torch.Generator().manual_seed(3)) * 0.12 - 0.06
    jitter[::2] /= 6  # heads that were never trained leave boxes where they are: so far apart they are stable
    matrix = torch.tensor([[1.1, 0, -4], [0, 1.1, 6]]).expand(last - first, 2, 3)
    truth = {"boxes": torch.tensor([[20.0, 20, 50, 50]]), "labels": torch.zeros(1, dtype=torch.int64)}
    return {
        "weak": window_of(4, WINDOWS)[first:last],
        "strong": window_of(5, WINDOWS)[first:last],
        "jitter": jitter[first:last],
        "matrix": matrix,
        "seed": list(range(first, last)),
        "truth": [truth if n % 2 else None for n in range(first, last)],
    }


def teach_a_share(out) -> None:
    """One step of a global batch of labelled and unlabelled windows; rank 0 writes gradient and teacher."""
    world = distributed.start("cpu")
    student, shown = detector_of(), detector_of(1).eval()
    torch.manual_seed(2)
    torch.nn.init.normal_(
        shown.roi_heads.box_predictor.cls_score.weight, std=0.15
    )  # sure of some, not of all
    teaching = Teaching(shown, 2.0, 1)
    share = distributed.per_rank(WINDOWS, world)
    first, last = world.rank * share, (world.rank + 1) * share
    targets, seeds = [target_of(10.0 + 10 * n) for n in range(first, last)], [*range(first, last)]
    wrapped = parallel(student, world)
    losses = teaching.losses(wrapped, window_of(6, WINDOWS)[first:last], targets, seeds, pool_of(first, last))
    sum(losses.values()).backward()
    gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    if world.main:
        terms = {name: loss.item() for name, loss in losses.items()}
        torch.save({"gradient": gradient, "losses": terms, **teaching.state()}, out)
    distributed.stop()


@pytest.fixture(scope="module")
def alone(one_thread, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "step.pt"
    teach_a_share(out)
    return torch.load(out)


def test_the_step_on_one_rank_teaches(alone):
    assert min(alone["losses"].values()) > 0, "every loss counts"
    given, measured, right, true = alone["tally"].sum(0).tolist()
    assert given > measured > 0 and true == WINDOWS // 2 and right <= true
    assert alone["windows"] == WINDOWS and alone["scores"].sum() > given, "some were not sure"


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_take_the_gradient_and_keep_the_teacher_of_one(size, alone, tmp_path):
    with Ranks(teach_a_share, tmp_path / "step.pt", size=size, logs=tmp_path / "logs") as ranks:
        assert ranks.statuses(120) == [0] * size, ranks.log()
    ours = torch.load(tmp_path / "step.pt")
    assert torch.equal(ours["scores"], alone["scores"]) and torch.equal(ours["tally"], alone["tally"])
    assert ours["windows"] == WINDOWS
    expected = alone["gradient"]
    assert f"{ours['gradient'].norm() / expected.norm():.4f}" == "1.0000"
    torch.testing.assert_close(ours["gradient"], expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_the_verdict_names_the_better_one():
    teaching = Teaching(detector_of().eval(), 1.0, 40)
    assert "ended within its burn-in of 40 steps" in teaching.verdict({"AP": 0.2, "step": 20})
    teaching.burnt = 0.25
    assert teaching.verdict({"AP": 0.31, "step": 80}).endswith(
        "0.310 with the teacher's labels (step 80), in model.pt"
    )
    assert "never more" in teaching.verdict({"AP": 0.25, "step": 40})
    assert teaching.state()["burnt"] == 0.25
