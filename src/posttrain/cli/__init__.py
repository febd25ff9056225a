from posttrain.cli.app import main

__all__ = ["main"]
