"""Any program. The lines of JSON that it prints are its metrics; a resume runs it anew."""

import argparse
import json
import math
import random


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    random.seed(0)
    slope, offset = 0.0, 0.0
    for step in range(given.steps):
        x = random.uniform(-1.0, 1.0)
        error = slope * x + offset - (3.0 * x + 1.0)
        slope, offset = slope - given.lr * error * x, offset - given.lr * error
        print(json.dumps({"step": step, "loss": error * error}), flush=True)
    with open("result.json", "w") as file:
        json.dump({"slope": slope, "offset": offset, "distance": math.hypot(slope - 3.0, offset - 1.0)}, file)


if __name__ == "__main__":
    main()
