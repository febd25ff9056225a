"""What processes forked from the test server find done: transformers' table of how files are converted, 0.4 s of regular expressions."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("qwen2")
