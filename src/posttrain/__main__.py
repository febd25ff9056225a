"""`python -m posttrain` is `posttrain`, also under torchrun."""

from posttrain.cli import main

if __name__ == "__main__":
    main()
