"""The partition against brute force over all small cases, and its refusals."""

import random
from itertools import combinations, pairwise, product

import pytest

from eetrain.errors import TopologyError
from eetrain.planning.partition import partition
from eetrain.planning.pieces import Piece, pipeline_pieces


def all_bounds(pieces: tuple[Piece, ...], stages: int) -> list[tuple[int, ...]]:
    """Every way to cut, each stage with a block, the earliest cuts first."""
    cuts = [(0, *inner, len(pieces)) for inner in combinations(range(1, len(pieces)), stages - 1)]
    return [
        bounds
        for bounds in cuts
        if all(any(piece.kind == "block" for piece in pieces[a:b]) for a, b in pairwise(bounds))
    ]


def brute_force(pieces: tuple[Piece, ...], costs: list[int], stages: int) -> tuple[int, ...]:
    def key(bounds: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
        sums = [sum(costs[a:b]) for a, b in pairwise(bounds)]
        return max(sums), sum(cost * cost for cost in sums), bounds

    return min(all_bounds(pieces, stages), key=key)


def test_pieces_stand_in_their_order():
    assert [piece.name for piece in pipeline_pieces(3, [3, 1])] == [
        "embed", "block 1", "exit 1", "block 2", "block 3", "exit 3", "tail"
    ]  # fmt: skip
    assert pipeline_pieces(1, []) == (Piece("embed"), Piece("block", 1), Piece("tail"))


def test_all_small_cases_are_best():
    cases = 0
    for blocks in range(1, 5):
        for exits in (chosen for size in range(3) for chosen in combinations(range(1, blocks + 1), size)):
            pieces = pipeline_pieces(blocks, exits)
            for costs in product((0, 1, 2), repeat=len(pieces)):
                cases += 1
                if len(pieces) > 5 and cases % 23:  # a share of the many largest
                    continue
                for stages in range(1, blocks + 1):
                    assert partition(pieces, costs, stages) == brute_force(pieces, list(costs), stages)
    assert cases == sum(
        3 ** (blocks + 2 + size) * count
        for blocks, counts in {1: (1, 1), 2: (1, 2, 1), 3: (1, 3, 3), 4: (1, 4, 6)}.items()
        for size, count in enumerate(counts)
    )


def test_larger_cases_with_random_costs_are_best():
    generator = random.Random(0)
    for _ in range(60):
        blocks = generator.randint(5, 9)
        pieces = pipeline_pieces(blocks, generator.sample(range(1, blocks + 1), 2))
        costs = [generator.randint(0, 30) for _ in pieces]
        stages = generator.randint(1, 5)
        assert partition(pieces, costs, stages) == brute_force(pieces, costs, stages)


def test_rounding_decides_nothing():
    # Prefix sums in floats would make the stages 0.1 | 0.30000000000000004 - 0.1 and prefer 0.2 | 0.1.
    assert partition(pipeline_pieces(3, []), [0.0, 0.1, 0.1, 0.1, 0.0], 2) == (0, 2, 5)


def test_an_exit_may_start_a_stage_but_never_is_one():
    pieces = pipeline_pieces(2, [1])
    assert partition(pieces, [0, 5, 3, 1, 0], 2) == (0, 2, 5), "the exit balances the second stage"
    assert partition(pieces, [0, 1, 3, 5, 0], 2) == (0, 3, 5)
    assert partition(pieces, [0, 1, 99, 1, 0], 2) == (0, 2, 5), "equal in maximum and squares: the earlier cut"


@pytest.mark.parametrize(
    ("stages", "message", "hint"),
    [
        (5, "stages=5, but the backbone has 4 blocks and every stage needs one.", "Set stages to 4 or fewer."),
        (0, "stages=0, but a pipeline has at least one.", "Set it to 1 or more."),
    ],
)
def test_impossible_numbers_of_stages(stages, message, hint):
    pieces = pipeline_pieces(4, [2])
    with pytest.raises(TopologyError) as caught:
        partition(pieces, [1.0] * len(pieces), stages)
    assert (caught.value.message, caught.value.hint) == (message, hint)
