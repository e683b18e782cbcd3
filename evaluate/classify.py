"""Train a classifier of symbols, from random weights or from a backbone, all of it or its head alone.

    python -m schematics.symbols DATA crops
    python evaluate/classify.py --checkpoint none --arch resnet18 --exp-dir checkpoints/scratch
    python evaluate/classify.py --checkpoint RUN/backbone.safetensors --exp-dir checkpoints/whole
    python evaluate/classify.py --checkpoint RUN/backbone.safetensors --exp-dir checkpoints/head --freeze

The backbone's pooled features go into a linear layer. After each epoch the crops of valid are classified, and
the weights of the epoch with the best top-1 are kept; those are tested. The exp-dir gets classifier.pt; on
the crops of test classify.json, as evaluate/linear.py writes linear.json, with raw 16 x 16 pixels beside it,
and confusion.png; epochs.csv and epochs.png with loss and top-1 of each epoch and the seconds that it took.
The same command, run again, resumes where it stopped. `--freeze` standardises the features by the statistics
of the batches, as MAE's linear probe does (He et al., arXiv 2111.06377, appendix A.1).
"""

from cluster.entry import run
from pretraining.classifier_config import ClassifierConfig


def main(config: ClassifierConfig) -> None:
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    from pretraining.classifier_stage import train_classifier

    train_classifier(config)


if __name__ == "__main__":
    run(ClassifierConfig, main)
