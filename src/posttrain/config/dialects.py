"""Names that options have elsewhere, with ours."""

TRANSLATED = {
    "ulysses_sequence_parallel_size": "engine.ulysses_sequence_parallel_size",  # verl, at the top level
    "custom_reward_function.path": "reward.path",
    "custom_reward_function.name": "reward.name",
}
