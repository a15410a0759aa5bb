"""Make the real test model: a small CNN trained on scikit-learn's handwritten digits.

    python tests/generators/digits.py tests/data   (needs torch, numpy and scikit-learn; about 10 seconds)

Writes digits.pt (the whole trained model, torch.save) and digits_samples.npz (32 held-out
images, their labels and PyTorch's logits). Seeded and single-threaded, so a second run on the
same machine and versions gives the same weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

SEED = 0
EPOCHS = 40
BATCH = 64
HELD_OUT = 360  # a fifth of the 1797 images
SAMPLES = 32


def load_split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return train images, train labels, test images, test labels; pixels 0..16 become 0..1."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels))
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    return images[train], labels[train], images[test], labels[test]


def build() -> nn.Sequential:
    """Return the untrained network: [N, 1, 8, 8] in, [N, 10] logits out."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 4 * 4, 10),
    )


def train(model: nn.Sequential, images: Tensor, labels: Tensor) -> None:
    """Train the model in place and leave it in eval mode."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    model.eval()


def main(folder: Path) -> None:
    """Train, measure on the held-out images, and write both files."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    train_x, train_y, test_x, test_y = load_split()
    model = build()
    train(model, train_x, train_y)
    with torch.no_grad():
        logits = model(test_x)
        sample_logits = model(test_x[:SAMPLES])
    accuracy = (logits.argmax(1) == test_y).float().mean().item()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model, folder / "digits.pt")
    np.savez_compressed(
        folder / "digits_samples.npz",
        images=test_x[:SAMPLES].numpy(),
        labels=test_y[:SAMPLES].numpy(),
        logits=sample_logits.numpy(),
    )
    print(f"held-out accuracy {accuracy:.2%} on {len(test_y)} images")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/generators/digits.py OUTPUT_FOLDER")
    main(Path(sys.argv[1]))
