"""A plain PyTorch loop: handwritten digits, dropout, a moving average of the weights, a scheduler."""

import copy
import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=50, shuffle=True)

model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
average = copy.deepcopy(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30 * epochs)


@torch.no_grad()
def accuracy():
    model.eval()
    right = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    model.train()
    return right


for epoch in range(epochs):
    for x, y in loader:
        loss = nn.functional.cross_entropy(model(x + 0.1 * torch.randn_like(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(weight, 0.05)
    measured = accuracy()
    print(epoch, float(measured))
