"""Names that options have elsewhere, with ours."""

TRANSLATED = {
    "ulysses_sequence_parallel_size": "engine.ulysses_sequence_parallel_size",  # verl, at the top level
}
