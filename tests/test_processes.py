"""How processes agree, and what they do where rows cannot be packed."""

import pytest

import forked
from conftest import Command, records
from posttrain.distributed.device import choose_device
from posttrain.distributed.world import join_world
from posttrain.errors import InputError


def agreeing(rank: int, size: int) -> None:
    with join_world(choose_device("cpu")) as world:
        with pytest.raises(InputError, match="only rank 1"):
            world.everyone(lambda: fail() if rank == 1 else None)
        with pytest.raises(InputError, match="only rank 1"):
            world.on_main(fail)
        assert world.on_main(lambda: rank) == 0
        assert world.gather(rank) == list(range(size))
        assert float(world.total(2.0)) == 2.0 * size


def fail():
    raise InputError("only rank 1")


def test_an_error_of_one_process_is_raised_on_all(tmp_path):
    forked.start_server()
    group = forked.start(agreeing, 3, said=tmp_path / "said")
    group.ends([0, 0, 0])


def test_unpacked_rows_of_two_processes_give_the_losses_of_packed_ones(tiny, tmp_path):
    forked.start_server()
    losses = []
    for size, packing in ((1, "true"), (2, "false")):
        run = tmp_path / f"on-{size}"
        options = Command(tiny, tmp_path).sft_options(
            str(run), data__packing=packing, data__train_batch_size=7, trainer__total_training_steps=3
        )
        forked.run(["sft", *options], tmp_path, size)
        losses.append([r["loss"] for r in records(run)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
