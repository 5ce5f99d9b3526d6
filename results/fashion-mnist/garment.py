"""A small network and a garment for the first picture of notebook 01.

    python results/fashion-mnist/garment.py                    # under a minute on one core

It trains on clean Fashion-MNIST and prints its accuracy on the test images. Beside this file it
writes garment.npz, the weights in half precision, and garment.npy, the test image of number GARMENT
(uint8, 28 x 28; Xiao et al. 2017, MIT licence). The notebook takes both, so that it needs no
download.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import certify

HERE = Path(__file__).resolve().parent
GARMENT = 0                                                    # the first test image, an ankle boot
EPOCHS = 8


def build():
    """(B, 1, 28, 28) in [0, 1] -> logits (B, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2),                         # B 16 12 12
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2),                        # B 32 4 4
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def load(file=HERE / "garment.npz"):
    """The committed network, in eval mode."""
    network = build()
    weights = {name: torch.from_numpy(array).float() for name, array in np.load(file).items()}
    network.load_state_dict(weights)
    return network.eval()


def open_split(train):
    images = certify.open_images("fashion-mnist", "data", train, 28, 1, "cpu")
    pixels, labels = images.items.tensors
    return pixels, labels


def train(network, pixels, labels):
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(pixels)).split(128):
            loss = nn.functional.cross_entropy(network(pixels[batch] / 255), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main():
    torch.manual_seed(0)
    network = build()
    train(network, *open_split(train=True))
    weights = {name: tensor.half().numpy() for name, tensor in network.state_dict().items()}
    np.savez(HERE / "garment.npz", **weights)

    pixels, labels = open_split(train=False)
    np.save(HERE / "garment.npy", pixels[GARMENT, 0].numpy())
    with torch.no_grad():
        right = load()(pixels / 255).argmax(dim=1) == labels
    print(f"{right.float().mean():.1%} of {len(labels)} test images are right")


if __name__ == "__main__":
    main()
