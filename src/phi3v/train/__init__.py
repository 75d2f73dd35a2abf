from typing import Any


def __getattr__(name: str) -> Any:
    """`from phi3v.train import train`, without importing the loop for the sake of a smaller module of this package."""
    if name == "train":
        from phi3v.train.loop import train

        return train
    raise AttributeError(f"module 'phi3v.train' has no attribute {name!r}")
