"""The random numbers of training data: each is a function of (seed, epoch, sample, view) and of its use.

No worker, rank or earlier draw has any influence, so that a resumed run equals an uninterrupted one and the
number of workers changes nothing.

Two kinds of data that are drawn once have generators of their own: the sheets of schematics.synthetic, so
that what older versions drew stays the same, and schematics.splits. The Philox streams here can't coincide
with theirs.
"""

import operator
from enum import Enum, unique

import numpy as np
from numpy.random.bit_generator import ISeedSequence

# To be raised when what pretraining, or finetuning, draws changes; checkpoints hold it. In 2 a view of
# `drawing` looks at 64 pixels for ink, not 512, and takes the paper that its store knows and its noise from a
# strip. The blur of all recipes rounds halves otherwise. In 2 of finetuning a window has its noise from that
# strip too.
VIEWS_VERSION, WINDOWS_VERSION = 2, 2
CHANGED = "this run was begun by a version that drew other orders and changes: its data differs from here on"
LARGEST = 2**64 - 1  # of any argument: each is a word of Philox's key or counter


@unique
class Use(Enum):
    """What random numbers are for. A number stays with its use for ever: results would change with it."""

    VIEWS = 0  # two views of a window in pretraining; view 2 is what both share
    PRETRAINING_ORDER = 1  # the order of an epoch's windows in pretraining
    DETECTION_ORDER = 2  # the choice and the order of an epoch's tiles in finetuning
    DETECTION_WINDOW = 3  # how a tile is moved and changed: sample is its place in the epoch, view the tile
    TRAINING_SHARE = 4  # which of the labelled training sheets a share of them has
    SHOTS = 5  # the order in which a draw of a few labelled crops a class takes them; sample is the draw
    CROP_ORDER = 6  # the order of an epoch's crops in training a classifier
    CROP_CHANGES = 7  # how a crop is moved and scaled: sample is its place in the epoch, view the crop
    PASTE = 8  # which symbols are laid on a tile in finetuning, and where: sample, view as in 3
    POOL_ORDER = 9  # the order of an epoch's unlabelled windows in finetuning
    POOL_WINDOW = 10  # how an unlabelled window is moved and changed: sample is its place, view the window
    INK_ORDER = 12  # the order of an epoch's windows in pretraining a detector
    INK_VIEWS = 13  # how its two views show a window, and which boxes: view 2 is what both share
    COUNTED_SHEETS = 16  # which sheets are counted, and which are labelled, in a split that tries ranges
    NOVEL_CLASSES = 20  # which classes are novel in a trial of detection.find; sample is the split
    EXAMPLES = 21  # which labelled boxes are examples of a class there; sample is the draw, view the class
    PLANTED_FAULTS = 22  # which labels are made wrong, and how, to see if that is found; sample is the fault


class _Key(ISeedSequence):
    """Hands its key to Philox, which otherwise asks the system for a seed first, two thirds of its time."""

    def __init__(self, key: np.ndarray) -> None:
        self.key = key

    def generate_state(self, n_words: int, dtype: object = np.uint32) -> np.ndarray:
        return self.key


def draw(use: Use, seed: int, epoch: int = 0, sample: int = 0, view: int = 0) -> np.random.Generator:
    """A generator whose stream of numbers no other arguments share.

    It is Philox (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011) with the seed and the use
    as its key. The lowest word of its counter counts the blocks of numbers, and the other three words are
    view, sample and epoch. Raises ValueError for an argument that is negative or above 2**64 - 1, and
    TypeError for one that is no integer.
    """
    for name, number in (("seed", seed), ("epoch", epoch), ("sample", sample), ("view", view)):
        if not 0 <= operator.index(number) <= LARGEST:
            raise ValueError(f"{name} must be from 0 to {LARGEST}, got {number}")
    key = np.array([seed, use.value], np.uint64)
    counter = np.array([0, view, sample, epoch], np.uint64)
    return np.random.Generator(np.random.Philox(_Key(key), counter=counter))  # type: ignore[arg-type]
