"""In which order parts take their turns."""

import pytest

from gatewise.moe.turns import Turn, turns


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_every_part_passes_every_block_step_by_step(
    blocks: int, parts: int, is_sharded: bool
) -> None:
    order = turns(blocks, parts, is_sharded=is_sharded)
    place = {turn: index for index, turn in enumerate(order)}
    assert len(place) == 5 * blocks * parts
    for part in range(parts):
        own = [
            place[Turn(step, block, part)]
            for block in range(blocks)
            for step in ("enter", "send", "gather", "work", "collect")
        ]
        assert own == sorted(own)


@pytest.mark.parametrize("parts", [4, 5, 8])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_rows_travel_beside_the_work_of_another_part(parts: int, is_sharded: bool) -> None:
    order = list(turns(3, parts, is_sharded=is_sharded))
    for block in (0, 1):
        for part in range(parts):
            sent, works, again = (
                order.index(Turn(step, block + later, part))
                for step, later in (("send", 0), ("work", 0), ("enter", 1))
            )
            for between in (order[sent:works], order[works + 1 : again]):
                inside = [turn for turn in between if turn.step == "work" and turn.part != part]
                # before the first part works there is nothing that could
                assert inside or (block, part) < (0, parts - 2)


@pytest.mark.parametrize("parts", [4, 8])
def test_rows_of_split_experts_travel_beside_the_work_of_others(parts: int) -> None:
    order = list(turns(2, parts, is_sharded=True))
    for part in range(2, parts):
        sent, work, collect, again = (
            order.index(Turn(step, block, part))
            for step, block in (("send", 0), ("work", 0), ("collect", 0), ("enter", 1))
        )
        assert "work" in {turn.step for turn in order[sent:work]}  # dispatched and gathered
        assert "work" in {turn.step for turn in order[work + 1 : collect]}  # scattered
        assert {"send", "enter"} & {turn.step for turn in order[collect:again]}
