"""A training loop of one's own. What `relight.Run` is given survives a kill: run it again, and it goes on."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import relight

EPOCHS = 20


def main() -> None:
    torch.manual_seed(0)
    x = torch.linspace(-3.0, 3.0, 1024).unsqueeze(1)
    data = DataLoader(TensorDataset(x, torch.sin(2 * x)), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    run = relight.Run(model=model, optimizer=optimizer, data=data)
    for _ in run.epochs(EPOCHS):
        for inputs, targets in run.batches():
            loss = nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.report(loss=loss)


if __name__ == "__main__":
    main()
