"""Who of a process group has which image."""

import pytest

from gigamorph.engine.parallel.process_group import ProcessGroup


@pytest.mark.parametrize("size", [1, 2, 4, 9])
@pytest.mark.parametrize("images", [1, 7, 8])
def test_each_image_is_of_one_process(size, images):
    order = list(range(100, 100 + images))
    groups = [ProcessGroup(rank, size) for rank in range(size)]
    shares = [group.share(order) for group in groups]
    assert len({len(share) for share in shares}) == 1 and {i for share in shares for i in share} == set(order)
    counted = [
        image
        for number in range(len(shares[0]))
        for group, share in zip(groups, shares, strict=True)
        if group.counts(number, images)
        for image in [share[number]]
    ]
    assert counted == order
    assert groups[0].done(len(shares[0]), images) == images


def test_an_image_that_is_split_is_of_all():
    assert [ProcessGroup(rank, 3, split=True).share([4, 2, 9]) for rank in range(3)] == [[4, 2, 9]] * 3


def test_each_image_is_of_one_pair():
    order = list(range(100, 113))
    groups = [ProcessGroup(rank, 6, split=object(), together=2) for rank in range(6)]
    shares = [group.share(order) for group in groups]
    assert shares[::2] == shares[1::2] == [ProcessGroup(turn, 3).share(order) for turn in range(3)]
    assert [group.at_once for group in groups] == [3] * 6 and [group.turn for group in groups] == [0, 0, 1, 1, 2, 2]
