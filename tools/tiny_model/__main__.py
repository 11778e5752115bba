"""``python -m tools.tiny_model`` prints the folder of the tiny model, trained if need be."""

from tools.tiny_model.cache import ensure_tiny_model

if __name__ == "__main__":
    print(ensure_tiny_model().base.parent)
